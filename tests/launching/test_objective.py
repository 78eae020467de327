"""What a job returns to a sweeper: a number of the run, found by name before or after the run."""

import functools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.launching.commands import run
from zigflow import plugins
from zigflow.metrics.results import PROTOCOL_KEYS, write_results
from zigflow.objective import LOGGED, check_objective, objective_of
from zigflow.settings import SettingsError


def log(folder, *rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def judged(file, metrics, best_by=None):
    write_results(file, metrics, dict.fromkeys(PROTOCOL_KEYS) | {"best_by": best_by})


def test_a_run_without_evaluation_returns_its_last_loss(tmp_path):
    log(tmp_path, {"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 9, "loss": 0.5, "grad_norm": 3.0})
    assert objective_of(tmp_path, None) == ("loss", 0.5)
    assert objective_of(tmp_path, "grad_norm") == ("grad_norm", 3.0)


def test_the_last_evaluation_goes_before_the_loss(tmp_path):
    log(tmp_path, {"step": 1, "loss": 2.0}, {"step": 1, "eval": {"frechet": 7.0}})
    for step, value in ((5, 7.0), (10, 4.0)):
        metrics = {"frechet": value, "agreement": 0.5, "passed": True}
        judged(tmp_path / "eval" / f"step-{step:07d}.json", metrics, ["frechet", "min"])
    assert objective_of(tmp_path, None) == ("frechet", 4.0)
    assert objective_of(tmp_path, "agreement") == ("agreement", 0.5)
    assert objective_of(tmp_path, "loss") == ("loss", 2.0)
    for wrong, near in (("frechett", "frechet"), ("agrement", "agreement"), ("passed", "known: agreement")):
        with pytest.raises(SettingsError, match=f"loop.objective={wrong} is no number of .*{near}"):
            objective_of(tmp_path, wrong)


def test_samples_return_what_their_metric_is_judged_by(tmp_path):
    judged(tmp_path / "results.json", {"fid": 3.5, "n": 50}, ["fid", "min"])
    assert objective_of(tmp_path, None) == ("fid", 3.5)
    judged(tmp_path / "results.json", {"n": 50})
    assert objective_of(tmp_path, None) is None
    assert objective_of(tmp_path / "nowhere", None) is None


def test_a_loss_that_is_no_number_stays_none(tmp_path):
    log(tmp_path, {"step": 1, "loss": "nan"})
    assert math.isnan(objective_of(tmp_path, None)[1])


@functools.cache
def _composed():
    return plugins.validated(plugins.compose_config(["run_dir=unused"]))


@given(st.sampled_from([*LOGGED, "frechet", "los", "anything"]), st.sampled_from([0, 10]))
def test_a_number_that_no_evaluation_will_make_is_refused_before_training(name, every):
    composed = _composed()
    loop, data = replace(composed.loop, objective=name), replace(composed.data, sample_fid_every=every)
    settings = replace(composed, loop=loop, data=data)
    if every or name in LOGGED:
        check_objective(settings)
        return
    with pytest.raises(SettingsError, match=f"loop.objective={name} .*data.sample_fid_every"):
        check_objective(settings)


def test_another_sweeper_s_job_is_composed_with_what_it_leaves_alone(monkeypatch, tmp_path):
    """A sweeper that is chosen in a YAML file is seen too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "search.yaml").write_text(
        "# @package _global_\nhydra:\n  sweeper:\n    _target_: somewhere.Sweeper\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUN_ID", "set-back-after-the-test")
    swept = ["optim.lr=interval(1e-4,1e-3)", "model.norm_epsilon=interval(0,1)"]
    line = ["-m", "--config-dir", ".", "+mine=search", *swept]
    assert plugins.check_command_line(line, "default").arguments == [*line[:-1], f"++{line[-1]}"]
    with pytest.raises(Exception, match="INTERVAL_SWEEP"):
        plugins.check_command_line(["-m", "optim.lr=interval(1e-4,1e-3)"], "default")


@pytest.mark.slow
def test_optuna_finds_the_better_of_two_trials(tmp_path):
    line = (
        "python train_acc.py -m +debug=cpu_tiny loop.progress=false hydra/sweeper=optuna hydra.sweeper.n_trials=2 "
        "hydra.sweeper.n_jobs=1 hydra.sweeper.sampler.seed=1 optim.lr=interval(1e-5,1e-2) hydra.sweep.dir=search"
    )
    run(line.replace("interval(1e-5,1e-2)", "'interval(1e-5,1e-2)'"), tmp_path)
    losses = {}
    for trial in "01":
        (folder,) = (tmp_path / "search").glob(f"{trial}_optim.lr-*")
        rate = json.loads((folder / "checkpoints/step-0000008/config.json").read_text())["optim"]["lr"]
        losses[rate] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    best = (tmp_path / "search" / "optimization_results.yaml").read_text()
    rate, loss = min(losses.items(), key=lambda pair: pair[1])
    assert len(losses) == 2
    assert f"best_value: {loss}" in best
    assert f"optim.lr: {rate}" in best
