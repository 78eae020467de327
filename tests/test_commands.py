"""The two commands as a user runs them: killed and resumed, other scans, other options."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TINY = ["+debug=cpu_tiny", "loop.progress=false"]

pytestmark = pytest.mark.slow


def command(script, *arguments):
    return [sys.executable, str(ROOT / script), *arguments]


def run(folder, script, *arguments, code=0):
    done = subprocess.run(
        command(script, *arguments), cwd=folder, env=ENV, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{script} {arguments}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


def weights(folder, run_dir, step):
    checkpoint = folder / run_dir / "checkpoints" / f"step-{step:07d}"
    files = [p for p in checkpoint.iterdir() if p.suffix == ".safetensors"]
    assert len(files) >= 4
    return {p.name: p.read_bytes() for p in files}


def test_killed_at_any_moment_and_continued_equals_never_stopped(folder):
    options = [*TINY, "data.train_steps=60", "ckpt_every=5", "loop.keep_last=20", "model.drop_path_rate=0.2"]
    run(folder, "train_acc.py", *options, "run_dir=straight")
    process = subprocess.Popen(
        command("train_acc.py", *options, "run_dir=cut"), cwd=folder, env=ENV, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (folder / "cut" / "checkpoints" / "step-0000010").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = sorted((folder / "cut" / "checkpoints").glob("step-*"))
    assert saved and saved[-1].name < "step-0000060", "the run ended before it could be killed"
    run(folder, "train_acc.py", *options, "run_dir=cut")
    assert weights(folder, "cut", 60) == weights(folder, "straight", 60)
    lines = [json.loads(x) for x in (folder / "cut" / "metrics.jsonl").read_text().splitlines()]
    straight = [json.loads(x) for x in (folder / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in lines] == [(r["step"], r["loss"]) for r in straight]


def test_resume_never_and_another_model_are_refused_in_one_line(folder):
    run(folder, "train_acc.py", *TINY, "run_dir=used")
    for extra, part in ((["resume=never"], "resume=never"), (["model.embed_dim=24"], "model.embed_dim")):
        done = run(folder, "train_acc.py", *TINY, "run_dir=used", *extra, code=1)
        assert part in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["model.scan_type=randomN4"],
        ["model.scan_type=parallelN3"],
        ["scan=hilbert", "model.use_pe=1"],
        ["model.use_pe=3", "loop.checkpoint_policy=selective"],
        ["grad_accum=2", "ema_rate=0.9", "mixed_precision=bf16"],
        ["train.path_type=GVP", "train.prediction=data"],
        ["train.path_type=VP", "train.prediction=noise", "train.loss_weight=velocity"],
        [
            "process.time_law=logit_normal",
            "optim.schedule=cosine",
            "model.num_classes=-1",
            "model.class_dropout_prob=0",
        ],
    ],
    ids=lambda o: "+".join(x.rpartition("=")[2] for x in o),
)
def test_trained_and_sampled(folder, options):
    name = "_".join(x.replace("=", "-").replace(".", "-") for x in options)
    run(folder, "train_acc.py", *TINY, *options, "data.train_steps=3", f"run_dir={name}")
    judged = [] if "model.num_classes=-1" not in options else ["metrics=none"]
    run(
        folder, "sample_acc.py", f"ckpt={name}", "num_fid_samples=20", "ode.sampling_method=heun",
        "ode.num_steps=4", "loop.progress=false", *judged,
    )  # fmt: skip
    assert len(list(folder.glob(f"{name}/samples/*/[0-9]*.png"))) == 20
    assert len(list(folder.glob(f"{name}/samples/*/results.json"))) == 1


def test_the_same_images_however_the_work_is_cut(folder):
    run(folder, "train_acc.py", *TINY, "run_dir=split")
    images = []
    for count, target in ((20, "a"), (30, "b")):
        run(
            folder, "sample_acc.py", "ckpt=split", f"num_fid_samples={count}", "offline_sample_local_bs=10",
            f"sample_dir={target}", "ode.num_steps=4", "ode.sampling_method=euler", "metrics=none",
        )  # fmt: skip
        images.append(np.stack([np.asarray(Image.open(folder / target / f"{i:06d}.png")) for i in range(20)]))
    assert np.array_equal(*images)


def test_stochastic_sampling_and_likelihood(folder):
    run(folder, "train_acc.py", *TINY, "run_dir=modes")
    run(
        folder, "sample_acc.py", "ckpt=modes", "sample_mode=SDE", "sde.num_steps=5", "num_fid_samples=20",
        "sde.diffusion_form=increasing-decreasing", "sde.last_step=Tweedie", "loop.progress=false",
    )  # fmt: skip
    run(
        folder, "sample_acc.py", "ckpt=modes", "likelihood=1", "num_fid_samples=20", "ode.sampling_method=heun",
        "ode.num_steps=5", "loop.progress=false",
    )  # fmt: skip
    found = json.loads(next(folder.glob("modes/samples/likelihood_*/results.json")).read_text())
    assert 0 < found["metrics"]["bits_per_dim"] < 20


def test_fine_tuning_starts_from_the_weights(folder):
    run(folder, "train_acc.py", *TINY, "run_dir=first")
    run(folder, "train_acc.py", *TINY, "run_dir=second", "ckpt=first", "data.train_steps=1", "optim.lr=1e-12")
    from safetensors.numpy import load_file

    first = load_file(folder / "first/checkpoints/step-0000008" / "ema_half_life_20000.safetensors")
    second = load_file(folder / "second/checkpoints/step-0000001" / "model.safetensors")
    for name, value in first.items():
        assert np.abs(second[name] - value).max() < 1e-6, name
