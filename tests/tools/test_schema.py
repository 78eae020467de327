"""The JSON schema of configurations takes what is right and refuses what is wrong, as the settings do."""

import json

import jsonschema
import pytest
from omegaconf import OmegaConf

from zigflow import plugins
from zigflow.paths import config_dir
from zigflow.settings import Settings, SettingsError
from zigflow.tools.__main__ import main
from zigflow.tools.schema import schema

EXPERIMENTS = sorted((config_dir() / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module", params=["default", "sample"])
def job(request):
    made = schema(request.param)
    jsonschema.Draft202012Validator.check_schema(made)
    return request.param, jsonschema.Draft202012Validator(made)


def composed(name, *overrides):
    cfg = plugins.compose_config(["run_dir=outputs/x", *overrides], name)
    return [OmegaConf.to_container(cfg, resolve=resolve) for resolve in (False, True)]


def test_composed_configurations_and_unresolved_ones_are_valid(job):
    name, validator = job
    for overrides in (
        [],
        ["experiment=dim_cifar10_s", "scan=hilbert"],
        ["experiment=uvit_coco_small", "debug=cpu_tiny"],
    ):
        for values in composed(name, *overrides):
            validator.validate(values)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_the_file_of_an_experiment_is_valid(file, job):
    _, validator = job
    validator.validate(OmegaConf.to_container(OmegaConf.load(file), resolve=False))


@pytest.mark.parametrize(
    "wrong, place",
    [
        ({"data": {"bath_size": 3}}, "data"),
        ({"ckpt_evry": 3}, ""),
        ({"optim": {"lr": -1}}, "optim.lr"),
        ({"optim": {"lr": "fast"}}, "optim.lr"),
        ({"optim": {"betas": [0.9]}}, "optim.betas"),
        ({"optim": {"schedule": "cosin"}}, "optim.schedule"),
        ({"optim": {"name": "adamWW"}}, "optim.name"),
        ({"ode": {"num_steps": 1}}, "ode.num_steps"),
        ({"ode": {"sampling_method": "heunn"}}, "ode.sampling_method"),
        ({"train": {"path_type": "Lineer"}}, "train.path_type"),
        ({"sample_mode": "OED"}, "sample_mode"),
        ({"loop": {"compile": 2}}, "loop.compile"),
        ({"data": {"batch_size": 1.5}}, "data.batch_size"),
        ({"data": {"image_size": [1, 2, 3]}}, "data.image_size"),
        ({"scan": {"name": "hilbrt"}}, "scan.name"),
        ({"model": 3}, "model"),
        ({"wandb": {"key": "hush"}}, "wandb"),
    ],
)
def test_what_the_settings_refuse_the_schema_refuses_at_the_same_key(wrong, place, job):
    _, validator = job
    errors = list(validator.iter_errors(wrong))
    assert [".".join(map(str, error.absolute_path)) for error in errors] == [place]


@pytest.mark.parametrize(
    "right",
    [
        {"ode": {"sampling_method": "torchdiffeq/dopri8"}},
        {"data": {"image_size": [24, 32], "class_names": ["cat", 3]}},
        {"model": {"_target_": "mine.Net", "anything": {"nested": 1}}},
        {"max_grad_norm": None, "use_latent": 1, "optim": {"lr": 1}},
        {"diffusion": {"num_steps": 50}},
        {"grad_accum": "${launched:grad_accum,1}", "defaults": [{"override /data": "digits"}]},
    ],
)
def test_what_the_settings_take_the_schema_takes(right, job):
    job[1].validate(right)


def test_keys_of_sampling_are_in_its_schema_alone():
    given = {"seeds": "0-9", "labels": ["cat", 3], "weights": None}
    jsonschema.validate(given, schema("sample"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given, schema("default"))
    # Left to the checkpoint; a training needs a value.
    jsonschema.validate({"data": {"batch_size": None}}, schema("sample"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"data": {"batch_size": None}}, schema("default"))


def test_the_line_that_a_yaml_file_begins_with(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["schema", "--output", "there/zigflow.schema.json"]) == 0
    line = capsys.readouterr().out.strip()
    path = tmp_path / "there" / "zigflow.schema.json"
    assert line == f"# yaml-language-server: $schema={path}"
    text = f"{line}\n# @package _global_\noptim:\n  lr: 1.0e-3\n"
    jsonschema.validate(OmegaConf.to_container(OmegaConf.create(text)), json.loads(path.read_text()))
    assert main(["schema", "--job", "sample"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(schema("sample")))


def test_the_settings_refuse_what_the_schema_shows_as_wrong():
    values = composed("default")[1]
    values["optim"]["lr"] = -1
    with pytest.raises(SettingsError, match=r"optim\.lr"):
        Settings.from_mapping(values)
