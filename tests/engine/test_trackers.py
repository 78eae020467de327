"""Trackers: what they get, that they continue, that they never stop a run and never hold a key."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.evaluation_toys import in_loop
from tests.engine.test_real_model import MODELS
from tests.engine.toys import make_trainer
from zigflow import plugins
from zigflow.engine import checkpoint
from zigflow.engine.log import read_metrics
from zigflow.engine.ranks import Ranks
from zigflow.engine.track_wandb import choose_mode
from zigflow.engine.trackers import Trackers, flat_numbers
from zigflow.settings import SettingsError

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef0123456789abcdef01234567"


class Notes:
    """A tracker that remembers."""

    def __init__(self, run):
        self.run, self.rows, self.pictures, self.finished = run, [], [], 0

    def log(self, values, step):
        self.rows.append((step, dict(values)))

    def image(self, name, path, step):
        self.pictures.append((name, path.read_bytes()[:4], step))

    def state(self):
        return {"id": self.run.stored.get("id", "made at first")}

    def finish(self):
        self.finished += 1


def notes():
    made = []

    def make(run):
        made.append(Notes(run))
        return made[-1]

    return made, Trackers({"notes": make})


@pytest.mark.parametrize("family", MODELS)
def test_the_chosen_scan_is_drawn(family, tmp_path):
    from omegaconf import OmegaConf

    from zigflow.evaluation_job import _ScanPicture
    from zigflow.plugins import compose_config
    from zigflow.settings import Settings

    cfg = compose_config(["scan=hilbert", "run_dir=unused"])
    settings = Settings.from_mapping(OmegaConf.to_container(cfg, resolve=True))
    made, trackers = notes()
    hook = _ScanPicture(settings, MODELS[family][0](0))
    make_trainer(tmp_path, steps=1, trackers=trackers, hooks=[hook]).fit()
    assert made[0].pictures == [("scans", b"\x89PNG", 0)]


def test_a_tracker_gets_the_lines_of_the_log_and_the_evaluations(tmp_path):
    made, trackers = notes()
    make_trainer(tmp_path, steps=4, trackers=trackers, hooks=[in_loop(Ranks(), 4)], config={"a": 1}).fit()
    (tracker,) = made
    assert (tracker.run.config, tracker.run.step, tracker.run.stored) == ({"a": 1}, 0, {})
    assert tracker.run.run_id == json.loads((tmp_path / "run.json").read_text())["run_id"]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    train = [(s, v) for s, v in tracker.rows if "train/loss" in v]
    assert [(s, v["train/loss"]) for s, v in train] == [(x["step"], x["loss"]) for x in lines if "loss" in x]
    assert any(name.startswith("train/loss_by_time/") for name in train[0][1])
    assert tracker.rows[-1] == (4, {"eval/frechet": lines[-1]["eval"]["frechet"]})
    assert tracker.pictures == [("samples", b"\x89PNG", 4)]
    assert tracker.finished == 1


def test_a_resumed_run_continues_with_the_stored_state(tmp_path):
    for steps in (3, 6):
        made, trackers = notes()
        make_trainer(tmp_path, steps=steps, log_every=1, trackers=trackers).fit()
    assert (made[0].run.stored, made[0].run.step) == ({"id": "made at first", "step": 3}, 3)
    assert [step for step, _ in made[0].rows] == [4, 5, 6]
    stored = checkpoint.open_checkpoint(tmp_path).trainer["counters"]["tracking"]
    assert stored == {"notes": {"id": "made at first", "step": 6}}
    make_trainer(tmp_path, steps=7).fit()
    assert checkpoint.open_checkpoint(tmp_path).trainer["counters"]["tracking"] == stored, (
        "kept when it is off"
    )


@pytest.mark.parametrize("method", ["__init__", "log", "image", "state", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path, caplog, monkeypatch, method):
    class Broken(Notes):
        pass

    def fail(self, *args):
        raise OSError(f"no route to host with key {SECRET}\nand more")

    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(Broken, method, fail)
    made, good = notes()
    trackers = Trackers({"broken": Broken, **good._makers})
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(
            tmp_path, steps=4, log_every=1, ckpt_every=1, trackers=trackers, hooks=[in_loop(Ranks(), 2)]
        )
        assert trainer.fit().step == 4
    told = [r.getMessage() for r in caplog.records if "broken failed" in r.getMessage()]
    assert len(told) == 1
    assert "no route to host" in told[0] and "switched off" in told[0]
    assert SECRET not in caplog.text
    assert len(made[0].rows) == 6, "the other one gets everything"


def test_numbers_are_flattened_and_the_rest_left_out():
    values = {"a": 1, "b": {"c": True, "d": "text", "e": None}, "f": [1]}
    assert flat_numbers(values, "x/") == {"x/a": 1.0, "x/b/c": 1.0}


@pytest.mark.parametrize(
    "asked, environment, netrc, mode",
    [
        ("disabled", {"WANDB_API_KEY": SECRET}, None, "disabled"),
        (None, {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET}, None, "offline"),
        (None, {"WANDB_API_KEY": SECRET}, None, "online"),
        (None, {}, None, "offline"),
        (None, {}, f"machine api.wandb.ai login user password {SECRET}", "online"),
        (None, {}, f"machine example.org login user password {SECRET}", "offline"),
        (None, {}, "garbage {", "offline"),
    ],
)
def test_offline_by_itself_without_a_key(tmp_path, monkeypatch, caplog, asked, environment, netrc, mode):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    with caplog.at_level(logging.INFO):
        assert choose_mode(asked) == mode
    said = [r for r in caplog.records if "no key" in r.getMessage()]
    assert len(said) == (mode == "offline" and not environment)
    assert SECRET not in caplog.text


class Charts:
    """In wandb's place, by its published rule: steps only rise, what is logged below the last one is dropped."""

    def __init__(self):
        self.runs = {}

    def init(self, id, **options):
        self.runs.setdefault(id, {"rows": [], "step": -1, "axes": {}, "dropped": 0})
        return ChartedRun(self.runs[id])

    Settings = dict

    def Image(self, path):
        return path

    def lines(self, id, name):
        """(x, y) of a chart, in the order of its rows."""
        run = self.runs[id]
        axis = run["axes"].get(name, run["axes"].get("*"))
        rows = [row for row in run["rows"] if name in row]
        return [(row["_step"] if axis is None else row.get(axis), row[name]) for row in rows]


class ChartedRun:
    def __init__(self, run):
        self.run = run

    def define_metric(self, name, step_metric=None):
        if step_metric is not None:
            self.run["axes"][name] = step_metric

    def log(self, values, step=None):
        step = self.run["step"] + 1 if step is None else step
        if step < self.run["step"]:
            self.run["dropped"] += 1
            return
        self.run["step"] = step
        self.run["rows"].append({**values, "_step": step})

    def finish(self):
        pass


@pytest.mark.parametrize("ckpt_every", [3, 100], ids=["behind its last checkpoint", "before its first"])
def test_wandb_shows_the_steps_that_a_cut_run_makes_again(tmp_path, monkeypatch, ckpt_every):
    from zigflow.engine.track_wandb import WandbTracker

    charts = Charts()
    monkeypatch.setitem(sys.modules, "wandb", charts)

    def kill(trainer, record):
        if record.step == 5:
            raise KeyboardInterrupt

    def go(hooks, **options):
        trackers = Trackers({"wandb": lambda run: WandbTracker(run, mode="offline")})
        options = {"log_every": 1, "ckpt_every": ckpt_every, "trackers": trackers, **options}
        make_trainer(tmp_path, steps=6, hooks=hooks, **options).fit()

    with pytest.raises(KeyboardInterrupt):
        go([kill])
    go([in_loop(Ranks(), 6)])
    ((id, run),) = charts.runs.items()
    assert run["dropped"] == 0
    shown = dict(charts.lines(id, "train/loss"))
    lines = {x["step"]: x["loss"] for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x}
    assert set(shown) == set(lines) == {1, 2, 3, 4, 5, 6}
    assert shown == pytest.approx(lines)
    assert len(charts.lines(id, "train/loss")) > 6, "some steps were made twice"
    assert [x for x, _ in charts.lines(id, "samples")] == [6]


@pytest.mark.parametrize("ckpt_every", [3, 100], ids=["behind its last checkpoint", "before its first"])
def test_tensorboard_hides_what_a_cut_run_had_written_past_its_checkpoint(tmp_path, ckpt_every):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from zigflow.engine.track_tensorboard import TensorBoardTracker

    class Killed(BaseException):
        pass

    def kill(trainer, record):
        if record.step == 5:
            raise Killed

    options = {"log_every": 1, "ckpt_every": ckpt_every}
    with pytest.raises(Killed):
        make_trainer(
            tmp_path, steps=6, hooks=[kill], trackers=Trackers({"tb": TensorBoardTracker}), **options
        ).fit()
    hooks = [in_loop(Ranks(), 6)]
    make_trainer(
        tmp_path, steps=6, hooks=hooks, trackers=Trackers({"tb": TensorBoardTracker}), **options
    ).fit()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    losses = [(e.step, e.value) for e in found.Scalars("train/loss")]
    lines = [x for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x]
    assert [step for step, _ in losses] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in losses] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert found.Tags()["images"] == ["samples"]


@pytest.mark.slow
def test_wandb_runs_offline_with_one_id_and_no_key_anywhere(tmp_path):
    pytest.importorskip("wandb")
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"
    }  # fmt: skip
    for steps in (2, 4):
        done = subprocess.run(
            [
                sys.executable, str(ROOT / "train_acc.py"), "+debug=cpu_tiny", "run_dir=run", "loop.progress=false",
                "use_wandb=true", "wandb.project=toys", f"data.train_steps={steps}", "ckpt_every=2",
                "data.sample_fid_every=2", "data.sample_fid_n=20", "data.sample_fid_bs=20", "metrics=none",
                "ode.sampling_method=euler", "ode.num_steps=3",
            ],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "switched off" not in done.stderr
        assert SECRET not in done.stdout + done.stderr
    found = checkpoint.open_checkpoint(tmp_path / "run").trainer["counters"]["tracking"]["wandb"]
    assert found["step"] == 4
    runs = sorted(p.name for p in (tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(name.endswith(f"-{found['id']}") for name in runs)
    assert list((tmp_path / "run" / "wandb").glob("*/files/media/images/samples_*.png"))
    assert list((tmp_path / "run" / "wandb").glob("*/files/media/images/scans_*.png"))
    holding = [p for p in tmp_path.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert not holding, f"the key stands in {holding}"


WITH_KEY = {
    "typed": [f"wandb.key={SECRET}"],
    "added in a sweep": ["-m", f"+wandb.key={SECRET}"],
    "by another name": [f"++wandb.api_key={SECRET}"],
    "a group": [f"+wandb={{key: {SECRET}}}"],
    "for hydra to export": [f"+hydra.job.env_set.WANDB_API_KEY={SECRET}"],
    "a file": ["--config-dir=own", "+mine=key"],
    "a file that replaces ours": ["--config-dir", "own", "wandb=secret"],
    "a file of all": ["-cd", "own", "-cn", "whole"],
    "a file that exports": ["--config-dir=own", "+mine=export"],
    "a file that reads the environment": ["--config-dir=own", "+mine=environment"],
    "a sweep of files": ["-m", "--config-dir=own", "+mine=good,key"],
}


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "mine").mkdir(parents=True)
    (tmp_path / "own" / "wandb").mkdir()
    for name, text in {
        "mine/good": "wandb: {project: monkeys, name: a token}",
        "mine/key": f"wandb: {{key: {SECRET}}}",
        "mine/export": f"hydra: {{job: {{env_set: {{WANDB_API_KEY: {SECRET}}}}}}}",
        "mine/environment": "note: ${oc.env:WANDB_API_KEY}",
        "wandb/secret": f"login_token: {SECRET}",
        "whole": f"defaults: [default, _self_]\nwandb: {{key: {SECRET}}}",
    }.items():
        (tmp_path / "own" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    (tmp_path / "own" / "wandb" / "secret.yaml").write_text(f"login_token: {SECRET}\n")
    return tmp_path


@pytest.mark.parametrize("config_name", ["default", "sample"])
@pytest.mark.parametrize("given", WITH_KEY.values(), ids=WITH_KEY)
def test_a_key_is_refused_before_anything_is_written(own_files, monkeypatch, config_name, given):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    plugins.prepare()
    with pytest.raises(SettingsError, match="run wandb login, or export WANDB_API_KEY") as refused:
        plugins.check_command_line(given, config_name)
    assert SECRET not in str(refused.value)


def test_what_only_sounds_like_a_key_is_none(own_files, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    for given in (["--config-dir=own", "+mine=good"], ["wandb.project=keys", "note=token: 3"]):
        plugins.check_command_line(given, "default")


@pytest.mark.parametrize("script", ["train_acc.py", "sample_acc.py"])
@pytest.mark.slow
def test_a_key_in_a_command_or_a_file_is_refused_and_written_nowhere(own_files, script):
    files = set(own_files.rglob("*"))
    for extra in (WITH_KEY["added in a sweep"], [*WITH_KEY["a file"], "run_dir=run"]):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *extra],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2
        assert "WANDB_API_KEY" in done.stderr
        assert SECRET not in done.stdout + done.stderr
    assert set(own_files.rglob("*")) == files
