"""A key is declared once: YAML files, types, defaults and ranges are held against the settings classes."""

import re

import pytest
from omegaconf import OmegaConf

from zigflow import plugins
from zigflow.command_help import keys_of
from zigflow.overrides import check_keywords
from zigflow.paths import config_dir
from zigflow.settings import Settings, SettingsError
from zigflow.typed import REQUIRED, convert, declared, has_field

KEYS = {key.path: key for key in keys_of("sample")}
PLAIN = {path: key for path, key in KEYS.items() if key.group is None}
# Nodes hold the arguments of the class that they name.
NODES = ("model", "process", "codec", "metrics", "scan", "dist", "data.source", "data.heldout", "optim.args")
FILES = sorted(p for p in config_dir().rglob("*.yaml") if p.parent.name != "accelerate")
# Of a set of data, which states them itself, and of a run.
STATED = ("data.", "run_dir", *NODES)


@pytest.mark.parametrize("path", KEYS)
def test_a_declaration_is_one_line_that_spells_its_choices(path):
    about = KEYS[path].about
    assert 3 <= len(about.text) <= 120 and "\n" not in about.text and not about.text.endswith(".")
    words = set(re.findall(r"[\w+-]+", about.text))
    assert {"null" if choice is None else str(choice) for choice in about.choices} - {"null"} <= words


@pytest.mark.parametrize("path", PLAIN)
def test_a_default_is_a_value_that_its_declaration_allows(path):
    key = PLAIN[path]
    if key.default is REQUIRED:
        assert path in ("run_dir", *NODES, "data.name", "data.train_steps", "data.batch_size")
        return
    assert convert(path, key.default, key.hint) == key.default
    key.about.check(path, key.default)


def typed_keys(node, package):
    """The keys that a YAML file sets, without those of nodes; ``package``: where the file stands."""
    for name, value in node.items():
        path = f"{package}.{name}" if package else name
        if path in NODES or any(path.startswith(f"{n}.") for n in NODES):
            continue
        if isinstance(value, dict) and path not in PLAIN:
            yield from typed_keys(value, path)
        else:
            yield path


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(config_dir())))
def test_every_key_of_every_file_is_declared(file):
    cfg = OmegaConf.to_container(OmegaConf.load(file), resolve=False) or {}
    for name in ("defaults", "hydra"):
        cfg.pop(name, None)
    group = "" if file.parent == config_dir() or "@package _global_" in file.read_text() else file.parent.name
    if file.stem == "from_checkpoint":
        cfg.pop("name", None)
    found = list(typed_keys(cfg, group))
    unknown = [path for path in found if path not in KEYS]
    assert not unknown, f"{file} sets {unknown}, which no settings class declares"


def test_the_defaults_of_the_files_are_those_of_the_classes(monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        monkeypatch.delenv(name, raising=False)
    values = OmegaConf.to_container(plugins.compose_config(["data=none", "run_dir=x"]), resolve=True)
    compared = 0
    for key in declared(Settings):
        if key.group or key.path.startswith(STATED):
            continue
        found = values
        for name in key.path.split("."):
            # A key that no file lists is one that is off.
            found = found.get(name)
        given = convert(key.path, found, key.hint)
        assert given == key.default, f"{key.path}: {given} in the YAML, {key.default} in the class"
        compared += 1
    assert compared > 70


def test_what_sampling_leaves_to_the_checkpoint_is_null_and_the_rest_as_declared():
    values = OmegaConf.to_container(plugins.compose_config(["run_dir=x"], "sample"), resolve=True)
    for path, value in values.items():
        key = KEYS[path]
        if key.group or path.startswith(STATED) or value is None:
            continue
        assert convert(path, value, key.hint) == key.default, path


@pytest.mark.parametrize("group", ["model", "process", "codec", "metrics"])
def test_nodes_hold_arguments_of_their_classes(group):
    seen = 0
    for file in sorted((config_dir() / group).glob("*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if node.get("_target_"):
            check_keywords(group, node["_target_"], node)
            seen += 1
    assert seen
    for file in sorted((config_dir() / "data").glob("*.yaml")):
        data = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for split in ("source", "heldout"):
            if (data.get(split) or {}).get("_target_"):
                check_keywords(f"data.{split}", data[split]["_target_"], data[split])


def test_a_wrong_argument_of_a_node_is_found():
    with pytest.raises(
        SettingsError, match=r"model\.depht: ZigMa has no argument depht, did you mean model\.depth"
    ):
        check_keywords("model", "model_zigma.ZigMa", {"name": "x", "_target_": "", "depht": 3})
    assert has_field(Settings, "optim.lr") and not has_field(Settings, "optim.lrr")
