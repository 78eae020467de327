"""A package of somebody else adds one of each kind: trained, resumed, sampled and measured with no change here."""

import importlib
import importlib.metadata
import json
import sys

import pytest
from hydra.core.config_store import ConfigStore

import dis_mamba.registry
from dis_mamba.backends import SCAN
from scans import list_scans, registry
from tests.packaging.environments import ROOT, build_wheel, empty_environment, install, run
from tests.packaging.runs import PACKAGE, RUNS, SAMPLED
from zigflow import plugins
from zigflow.data.source import check_source
from zigflow.engine.optim import OPTIMIZERS
from zigflow.engine.trackers import TRACKERS
from zigflow.evaluation_job import watch
from zigflow.processes import INTERPOLANTS
from zigflow.samplers import DIFFUSION_SAMPLERS, ODE_SOLVERS, SDE_STEPS
from zigflow.tools.list import names

REGISTRIES = (OPTIMIZERS, TRACKERS, INTERPOLANTS, DIFFUSION_SAMPLERS, ODE_SOLVERS, SDE_STEPS)


@pytest.fixture
def added(monkeypatch, tmp_path):
    """The package as if it were installed, in this process and until the test ends."""
    monkeypatch.chdir(tmp_path)
    for each in REGISTRIES:
        monkeypatch.setattr(each, "_entries", dict(each._entries))
        monkeypatch.setattr(each, "_origins", dict(each._origins))
    monkeypatch.setattr(dis_mamba.registry, "_mixers", dict(dis_mamba.registry._mixers))
    monkeypatch.setattr(SCAN, "backends", SCAN.backends)
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.syspath_prepend(PACKAGE)
    points = [
        importlib.metadata.EntryPoint("one_of_each", value, group)
        for group, value in (("zigflow.scans", "one_of_each_scans"), ("zigflow.plugins", "one_of_each"))
    ]
    real = importlib.metadata.entry_points

    def entry_points(**wanted):
        ours = [point for point in points if point.group == wanted.get("group")]
        return ours or real(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    yield
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("one_of_each", "one_of_each_scans")
    ]:
        del sys.modules[name]
    ConfigStore.instance().repo["scan"].pop("each_columns.yaml", None)


def facts(run_dir, step):
    folder = run_dir / "checkpoints" / f"step-{step:07d}"
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("trainer", "config")]


def check_run(name, run_dir, folder):
    """What a run that was trained two steps, resumed for a third and sampled has left behind."""
    trainer, config = facts(run_dir, 3)
    assert trainer["plugins"] == ["one_of_each"]
    assert trainer["counters"]["step"] == 3
    assert config["codec"] == {"_target_": "one_of_each.codec.Negative"}
    assert config["data"]["source"]["_target_"] == "one_of_each.source.Stripes"
    lines = [json.loads(line) for line in (run_dir / "each_lines.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in str(line)][:1] == [1] and lines[-1]["step"] == 3
    assert trainer["counters"]["tracking"]["each_lines"]["lines"] >= 3
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["metrics"]["brightness_error"] <= 255
    typed = " ".join(RUNS[name].sample)
    assert f"sampling_method={results['protocol']['sampler']['sampling_method']}" in typed
    assert len(list(folder.glob("[0-9]*.png"))) == 4


@pytest.mark.parametrize("name", list(RUNS)[:1])
def test_a_run_uses_them(added, name, tmp_path, caplog):
    from zigflow.sample_job import sample_from_config
    from zigflow.train_job import train_from_config

    case = RUNS[name]
    for steps in (2, 3):
        typed = [*case.train, f"data.train_steps={steps}", "ckpt_every=1", "run_dir=run"]
        # As the command checks it.
        plugins.check_command_line(typed, "default")
        with caplog.at_level("INFO"):
            train_from_config(plugins.compose_config(typed), watch)
    assert case.log in caplog.text
    folder = sample_from_config(
        plugins.compose_config(["ckpt=run", *case.sample, *SAMPLED, "run_dir=log"], "sample")
    )
    check_run(name, tmp_path / "run", folder)


def test_they_are_listed_and_near_matches_are_found(added):
    assert "each_columns" in list_scans()
    plugins.load_plugins()
    check_source(importlib.import_module("one_of_each.source").Stripes(16, 4))
    kinds = (
        "models",
        "mixers",
        "data",
        "samplers",
        "metrics",
        "codecs",
        "optimizers",
        "trackers",
        "backends",
    )
    listed = {kind: set(names(kind)) for kind in kinds}
    assert "each_pixelwise" in listed["models"] and "each_stripes" in listed["data"]
    assert "each_brightness" in listed["metrics"] and "each_negative" in listed["codecs"]
    assert "each_average" in listed["mixers"] and "each_lines" in listed["trackers"]
    assert "each_sign" in listed["optimizers"] and "selective_scan/each_loop" in listed["backends"]
    assert {"each_ralston", "each_late_noise", "each_ddim"} <= {
        n.rpartition("=")[2] for n in listed["samplers"]
    }
    for typed, found in (
        ("ode.sampling_method=each_ralstn", "each_ralston"),
        ("optim.name=each_sgn", "each_sign"),
        ("train.path_type=EachQuadrtic", "EachQuadratic"),
        ("loop.trackers=[each_line]", "each_lines"),
        ("model.mixer=each_avrage", "each_average"),
        ("scan=each_colums", "each_columns"),
    ):
        with pytest.raises(Exception, match=found) as refused:
            plugins.check_command_line([typed, "run_dir=x"], "default")
        assert plugins.is_mistake(refused.value)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_of_each")
    python = empty_environment(folder / "venv")
    install(python, build_wheel(ROOT, folder / "ours"))
    install(python, build_wheel(PACKAGE, folder / "theirs"))
    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_commands_use_what_is_installed(python, name, tmp_path):
    case, commands = RUNS[name], python.parent
    for steps in (2, 3):
        done = run(
            commands / "zigflow-train", *case.train, f"data.train_steps={steps}", "run_dir=run", cwd=tmp_path,
            env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert case.log in done.stderr
    sampled = ("sample_dir=samples", "ckpt=run", *case.sample, *SAMPLED)
    run(commands / "zigflow-sample", *sampled, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    check_run(name, tmp_path / "run", tmp_path / "samples")
