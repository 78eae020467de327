"""docs/migration.md: our commands compose, its Python runs, the names it gives exist."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from scans import list_scans
from tests.zigma_shards import save_autoencoder
from zigflow import plugins
from zigflow.engine.sample_plan import SampleOptions
from zigflow.preflight import check_training
from zigflow.settings import Settings
from zigflow.stored_config import complete_from_defaults

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.M | re.S)
OURS = [line for language, body in BLOCKS if not language for line in body.splitlines()]
THEIRS = [line for language, body in BLOCKS if language == "text" for line in body.splitlines()]
SNIPPETS = [body for language, body in BLOCKS if language == "python"]
CHOICE = re.compile(r"^\+?(data|model|scan|codec|experiment)=(\w+)$")


def overrides_of(command):
    words = shlex.split(command)
    return words[next(i for i, word in enumerate(words) if word.endswith("_acc.py")) + 1 :]


def compose(overrides, name):
    cfg = plugins.compose_config(["run_dir=unused", *overrides], name)
    return OmegaConf.to_container(cfg, resolve=True)


def test_there_is_something_to_test():
    assert len(OURS) >= 20 and len(THEIRS) == 3 and len(SNIPPETS) == 1
    for script in ("train_acc.py", "sample_acc.py"):
        assert any(script in line for line in OURS)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What the commands name: a folder of tars, images, and an autoencoder as far as its description goes."""
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDER", "photos", "sd-vae-ft-ema"):
        Path(name).mkdir()
    Path("FOLDER/train-000000.tar").touch()
    Path("sd-vae-ft-ema/config.json").write_text('{"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}')


@pytest.mark.parametrize("command", [c for c in OURS + THEIRS if "train_acc.py" in c])
def test_training_commands_pass_every_check_before_the_device(command, folders):
    overrides = overrides_of(command)
    missing = (
        []
        if "data.tar_base=FOLDER" in overrides or "data=image_folder" in overrides
        else ["data.tar_base=FOLDER"]
    )
    check_training(Settings.from_mapping(compose([*overrides, *missing], "default")))


@pytest.mark.parametrize("command", [c for c in OURS + THEIRS if "sample_acc.py" in c])
def test_sampling_commands_compose(command, folders):
    given = compose(overrides_of(command), "sample")
    given.pop("weights")
    SampleOptions.take_from(given)
    if given["ckpt"].endswith(".pt"):
        settings = Settings.from_mapping(complete_from_defaults(given, given["ckpt"]))
        assert settings.codec["scale"] == 0.18215
    else:
        assert given["model"]["name"] == "from_checkpoint"


@pytest.mark.parametrize("command", [c for c in OURS if "_acc.py" not in c])
def test_tools_exist_and_their_overrides_compose(command):
    from zigflow.tools.__main__ import COMMANDS

    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "zigflow.tools"]
    assert words[3] in COMMANDS
    compose([word for word in words[4:] if "=" in word], "default")


def test_names_in_the_text_exist():
    for code in re.findall(r"`([^`]+)`", PAGE):
        match = CHOICE.match(code)
        if match:
            group, choice = match.groups()
            assert choice in plugins.group_choices(group) or (group == "scan" and choice in list_scans()), (
                code
            )
    names = re.search(r"`data=` names: (.*?)\. `model=` names: (.*?)\. ", PAGE, flags=re.S)
    data = re.findall(r"[a-z0-9_]+", names[1].replace("also", ""))
    models = re.findall(r"[a-z0-9_]+", names[2].replace("both with `_pe2`", "sweep2_b1_pe2 zigzag8_b1_pe2"))
    assert set(data) <= set(plugins.group_choices("data")) and len(data) == 10
    assert set(models) <= set(plugins.group_choices("model")) and len(models) == 7


@pytest.mark.slow
def test_latents_are_extracted_as_shown(tmp_path, monkeypatch):
    from zigflow.datasets.shards import ShardSource

    monkeypatch.chdir(tmp_path)
    save_autoencoder(tmp_path / "sd-vae-ft-ema")
    rng = np.random.default_rng(0)
    for index, name in enumerate(("bee", "ant", "bee")):
        os.makedirs(f"photos/{name}", exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (256, 300, 3), dtype=np.uint8)).save(
            f"photos/{name}/{index}.png"
        )
    exec(compile(SNIPPETS[0], "migration.md", "exec"), {})
    source = ShardSource("data/churches256", {"img_feature256.npy": "latents"})
    assert (len(source), source.image_shape) == (3, (4, 32, 32))
    # The usual suffixes find the labels, too, and the index the names.
    labelled = ShardSource("data/churches256")
    assert sorted(labelled[i]["labels"] for i in range(3)) == [0, 1, 1]
    assert labelled.class_names == ("ant", "bee")
