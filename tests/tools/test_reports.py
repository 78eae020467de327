"""``doctor``, ``list`` and ``show-config`` tell what is there, and say what is not."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from zigflow.environment import VARIABLES
from zigflow.paths import config_dir
from zigflow.plugins import compose_config
from zigflow.tools import __main__ as tools
from zigflow.tools import doctor
from zigflow.tools import list as listing
from zigflow.tools.show_config import origins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def printed(capsys, *arguments, code=0):
    assert tools.main(list(arguments)) == code
    return capsys.readouterr().out


def test_doctor_knows_what_each_extra_installs():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = doctor.requirements()
    assert {r.name for r in found[""]} == {Requirement(line).name for line in table["dependencies"]}
    assert set(found) - {""} == set(table["optional-dependencies"])
    assert not any(r.name == "zigflow" for needs in found.values() for r in needs)


def test_doctor_reports_in_words_and_in_json(capsys):
    found = json.loads(printed(capsys, "doctor", "--json"))
    assert set(found) == {"machine", "torch", "backends", "packages", "plugins", "launch", "problems"}
    assert found["problems"] == []
    import torch

    assert found["torch"]["version"] == str(torch.__version__)
    assert "gloo" in found["torch"]["collectives"]
    assert {"selective_scan/reference", "causal_conv1d/reference"} <= set(found["backends"])
    text = printed(capsys, "doctor")
    assert "no problems found" in text
    for section in found:
        if section != "problems":
            assert f"{section}:\n" in text


def test_doctor_names_the_extra_of_what_is_missing(monkeypatch):
    import importlib.metadata as metadata

    real = metadata.version

    def version(name):
        if name == "hydra-joblib-launcher":
            raise metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "accelerate" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = doctor.report()
    assert found["packages"]["hydra-joblib-launcher"] == "missing: pip install 'zigflow[sweep]'"
    # An optional package that is missing is no problem; an old one that every run needs is.
    (problem,) = found["problems"]
    assert re.match(r"accelerate 0\.0\.1, but >=\S+ is needed: pip install zigflow", problem)


def test_doctor_says_why_a_backend_cannot_run(monkeypatch):
    import dis_mamba

    monkeypatch.setattr(dis_mamba, "available_backends", lambda: {"fast": "no GPU", "reference": None})
    found = doctor.report()
    assert found["backends"]["selective_scan/fast"] == "cannot run: no GPU"
    assert found["problems"] == []
    monkeypatch.setattr(dis_mamba, "available_backends", lambda: {"fast": "no GPU"})
    assert doctor.report()["problems"] == ["no backend of selective_scan can run on this machine"]


def test_doctor_says_which_backend_would_run(monkeypatch):
    from dis_kernels import native

    found = doctor.report()
    try:
        told = native.compiler_version(tuple(native.compiler())).splitlines()[0]
    except native.NativeError as error:
        told = f"none: {error}"
    assert told in found["machine"]["C++ compiler"]
    assert found["backends"]["triton's version"]
    monkeypatch.setenv("ZIGFLOW_BACKEND", "torch")
    found = doctor.report()
    for op in ("selective_scan", "causal_conv1d"):
        assert found["backends"][op].startswith("torch would run (float32 on ")
    assert found["launch"]["variables"]["ZIGFLOW_BACKEND"] == "torch"
    monkeypatch.setenv("ZIGFLOW_BACKEND", "troch")
    found = doctor.report()
    assert found["backends"]["causal_conv1d"].startswith("none would run: ")
    assert len(found["problems"]) == 4 and "torch" in found["problems"][0]
    monkeypatch.delenv("ZIGFLOW_BACKEND")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX = 'no-such-compiler' is not found" in doctor.report()["machine"]["C++ compiler"]


@pytest.mark.parametrize(
    "environ, part",
    [
        ({"MASTER_ADDR": "host"}, "MASTER_ADDR set without WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            "2 machines and no RUN_ID",
        ),
    ],
)
def test_doctor_finds_the_traps_of_a_launch(environ, part, monkeypatch, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = json.loads(printed(capsys, "doctor", "--json", code=1))
    assert found["launch"]["variables"] == environ
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(part)


def test_doctor_shows_no_secret(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-value")
    assert "a-very-secret-value" not in printed(capsys, "doctor", "--json")


def test_options_may_stand_between_the_overrides(capsys):
    last = printed(capsys, "show-config", "data.batch_size=3", "optim.lr=1", "--origins")
    assert "data.batch_size=3" in last
    assert printed(capsys, "show-config", "data.batch_size=3", "--origins", "optim.lr=1") == last


def test_list_has_everything_registered(capsys):
    from scans import list_scans
    from zigflow.engine.optim import OPTIMIZERS
    from zigflow.models import list_variants
    from zigflow.samplers import DIFFUSION_SAMPLERS, ODE_SOLVERS, SDE_STEPS

    found = json.loads(printed(capsys, "list", "--json"))
    assert set(found) == set(listing.KINDS)
    assert list(found["scans"]) == list_scans()
    assert set(list_variants()) < set(found["models"])
    assert set(found["samplers"]) == {
        f"{group}.sampling_method={name}"
        for group, names in (("ode", ODE_SOLVERS), ("sde", SDE_STEPS), ("diffusion", DIFFUSION_SAMPLERS))
        for name in names
    }
    assert list(found["optimizers"]) == OPTIMIZERS.names()
    folders = {
        "data": "data", "models": "model", "metrics": "metrics", "codecs": "codec", "experiments": "experiment",
        "processes": "process", "debug": "debug", "accelerate": "accelerate",
    }  # fmt: skip
    for kind, folder in folders.items():
        for file in (config_dir() / folder).glob("*.yaml"):
            assert found[kind][file.stem], f"{file} does not begin with a line that says what it is"


def test_list_shows_plug_ins_and_those_that_fail(monkeypatch, capsys, tmp_path):
    """What a package brings stands beside ours; a package that fails is named and takes nothing down."""
    import importlib.metadata as metadata
    import sys

    package = tmp_path / "extra_things"
    (package / "config" / "data").mkdir(parents=True)
    (package / "config" / "data" / "extra.yaml").write_text("# A source from elsewhere.\nname: extra\n")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = {
        "good": metadata.EntryPoint("good", "extra_things", "zigflow.plugins"),
        "bad": metadata.EntryPoint("bad", "not_there_at_all", "zigflow.plugins"),
    }
    real = metadata.entry_points
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda **wanted: (
            list(entries.values()) if wanted.get("group") == "zigflow.plugins" else real(**wanted)
        ),
    )
    assert listing.names("plugins") == {
        "zigflow.plugins/good": "extra_things ?",
        "zigflow.plugins/bad": "not_there_at_all ? failed to load",
    }
    assert listing.names("data")["extra"] == "A source from elsewhere."
    assert doctor.report()["problems"] == [
        "plug-in zigflow.plugins/bad: not_there_at_all ? failed to load",
    ]
    sys.modules.pop("extra_things", None)


def test_list_of_one_kind(capsys):
    text = printed(capsys, "list", "optimizers")
    assert text.startswith("optimizers:\n") and "optim.name=adamw" in text and "optim.name=muon" in text
    with pytest.raises(SystemExit):
        tools.main(["list", "everything"])


def test_every_value_has_an_origin():
    from omegaconf import OmegaConf

    from zigflow.engine.run_dir import flat

    overrides = ["scan=hilbert", "+debug=cpu_tiny", "optim.lr=3e-4", "+model.scan_seed=3", "run_dir=x"]
    found = origins(overrides, "default")
    keys = set(flat(OmegaConf.to_container(compose_config(overrides), resolve=True)))
    assert keys <= set(found)
    expected = {
        "scan.name": "registered scan",
        "model.depth": "config/debug/cpu_tiny.yaml",
        "model.scan_type": "config/model/digits_zigzag8.yaml",
        "optim.betas": "config/recipe/digits.yaml",
        "optim.lr": "command line",
        "model.scan_seed": "command line",
        "run_dir": "command line",
        "resume": "config/default.yaml",
        "process.path_type": "config/process/flow.yaml: ${train.path_type}",
    }
    assert {key: found[key] for key in expected} == expected


def test_an_origin_names_the_file_whose_value_it_is():
    """Changing each key in turn moves its origin to the command line and no other's."""
    before = origins([], "default")
    for key in ("data.batch_size", "loop.compile", "ckpt_every", "ode.num_steps"):
        after = origins([f"{key}=1"], "default")
        assert {k for k in after if after[k] != before.get(k)} == {key}


def test_show_config_prints_what_would_run(capsys):
    import yaml

    shown = yaml.safe_load(printed(capsys, "show-config", "optim.lr=3e-4", "run_dir=here"))
    assert shown["optim"]["lr"] == 3e-4
    assert shown["run_dir"] == "here"
    text = printed(capsys, "show-config", "--origins", "optim.lr=3e-4")
    assert re.search(r"^optim\.lr=0\.0003 +# command line$", text, flags=re.M)
    assert re.search(r"^data\.name=\"digits\" +# config/data/digits\.yaml$", text, flags=re.M)


def test_show_config_answers_a_mistake_in_one_line(capsys):
    assert tools.main(["show-config", "data.bath_size=3"]) == 1
    assert capsys.readouterr().err == "error: unknown key data.bath_size: did you mean data.batch_size?\n"


def test_show_config_of_sampling(capsys):
    assert "offline_sample_local_bs" in printed(capsys, "show-config", "--command", "sample", "--origins")
