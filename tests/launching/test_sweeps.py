"""Hydra's multirun: one whole run per choice, one after another or in parallel."""

import json

import pytest

from tests.launching.commands import run

pytestmark = pytest.mark.slow
TINY = "debug=cpu_tiny loop.progress=false data.train_steps=4"


def weights(run_dir):
    return (run_dir / "checkpoints" / "step-0000004" / "model.safetensors").read_bytes()


def test_one_after_another_and_continued(tmp_path):
    line = f"python train_acc.py -m {TINY} optim.lr=1e-3,1e-4"
    run(line, tmp_path, RUN_ID="sweep")
    jobs = [
        tmp_path / "outputs" / "train" / "sweep" / name for name in ("0_optim.lr-0.001", "1_optim.lr-0.0001")
    ]
    rates = [
        json.loads((job / "checkpoints/step-0000004/config.json").read_text())["optim"]["lr"] for job in jobs
    ]
    assert rates == [1e-3, 1e-4]
    assert weights(jobs[0]) != weights(jobs[1])
    # A job of a sweep is the run that the same choice makes alone.
    run(f"python train_acc.py {TINY} optim.lr=1e-4 run_dir=alone", tmp_path)
    assert weights(jobs[1]) == weights(tmp_path / "alone")
    run(line, tmp_path, RUN_ID="sweep")
    assert [p.name for p in (tmp_path / "outputs" / "train").iterdir()] == ["sweep"]
    assert len((jobs[0] / "metrics.jsonl").read_text().splitlines()) == 4


def test_in_parallel_and_a_job_that_fails_does_not_stop_the_other(tmp_path):
    parallel = "hydra/launcher=joblib hydra.launcher.n_jobs=2"
    output = run(f"python train_acc.py -m {TINY} model.use_pe=7,0 {parallel}", tmp_path, expected=2)
    assert "use_pe" in output and "error" in output
    (sweep,) = (tmp_path / "outputs" / "train").iterdir()
    # A mistake leaves no directory of a run behind.
    assert {p.name for p in sweep.iterdir()} == {"1_model.use_pe-0", "multirun.yaml"}
    assert weights(sweep / "1_model.use_pe-0")
