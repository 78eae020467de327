"""A sampling command completed by its checkpoint: what is taken over, and what contradicts it."""

import json
import re

import pytest
from omegaconf import OmegaConf

from zigflow.engine.run_dir import RunDirError, check_same_config
from zigflow.engine.sample_plan import SampleOptions
from zigflow.plugins import compose_config
from zigflow.preflight import scaled_codec
from zigflow.settings import Settings, SettingsError
from zigflow.stored_config import complete_from_checkpoint, complete_from_defaults


def plain(overrides=(), name="default"):
    return OmegaConf.to_container(compose_config(["run_dir=r", *overrides], name), resolve=True)


def completed(*overrides, stored=()):
    given = plain(overrides, "sample")
    given.pop("weights")
    SampleOptions.take_from(given)
    return complete_from_checkpoint(given, plain(stored), "run")


def test_the_checkpoint_says_what_the_command_leaves_open():
    settings = Settings.from_mapping(completed("num_fid_samples=7", "data.num_workers=1"))
    assert settings.model["embed_dim"] == plain()["model"]["embed_dim"]
    assert settings.data.num_workers == 1
    assert settings.data.batch_size == plain()["data"]["batch_size"]
    assert settings.num_fid_samples == 7
    assert settings.metrics["_target_"].endswith("DigitJudge")


def test_naming_the_same_model_is_no_contradiction():
    name = plain()["model"]["name"]
    merged = completed(f"model={name}", "data=digits")
    assert merged["model"] == plain()["model"]


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["model=zigzag8_b1"], ["model.name=zigzag8_b1", plain()["model"]["name"]]),
        (["scan=hilbert"], ["scan.name=hilbert", "scan.name=from_model"]),
        (["train.prediction=noise"], ["train.prediction=noise", "train.prediction=velocity"]),
    ],
)
def test_contradictions_name_both_values(overrides, parts):
    with pytest.raises(SettingsError) as error:
        completed(*overrides)
    for part in parts:
        assert part in str(error.value)


def test_numerical_margins_may_change():
    merged = completed("train.sample_eps=0.01", stored=["train.prediction=noise"])
    assert merged["train"]["sample_eps"] == 0.01
    assert merged["train"]["prediction"] == "noise"
    # The process was resolved from train.* when the run was stored: it must see the change too.
    assert merged["process"]["sample_eps"] == 0.01


def test_an_official_file_takes_defaults_and_its_own_keywords():
    given = plain((), "sample")
    merged = complete_from_defaults(given, "x.pt", {"in_channels": 4, "img_dim": 8})
    assert merged["model"]["img_dim"] == 8
    assert merged["process"]["_target_"].endswith("Flow")
    with pytest.raises(SettingsError, match="model=NAME"):
        complete_from_defaults(given, "x.pt")


def test_data_that_moved_is_found_by_its_new_root():
    merged = completed("data.source.root=/elsewhere/train", stored=[])
    # What is stored here names no classes, as of release 0.1, which enlarged images without being asked.
    old = {split: {**plain()["data"][split], "enlarge": True} for split in ("source", "heldout")}
    assert merged["data"]["source"] == {**old["source"], "root": "/elsewhere/train"}
    assert merged["data"]["heldout"] == old["heldout"]


OLD_CODEC = {"_target_": "zigflow.codec.AutoencoderKLCodec", "path": "/training/vae", "scale": 0.18215}


def folder_that_says(folder, **config):
    layout = {"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}
    (folder / "config.json").write_text(json.dumps({**layout, **config}))
    return folder


def test_a_checkpoint_of_0_1_keeps_its_scale(tmp_path):
    """It recorded the scale alone, and shifted nothing."""

    def sampled(*overrides, **config):
        given = plain([f"codec.path={folder_that_says(tmp_path, **config)}", *overrides], "sample")
        given.pop("weights")
        SampleOptions.take_from(given)
        merged = complete_from_checkpoint(given, {**plain(), "codec": OLD_CODEC}, "run")
        return scaled_codec(merged["codec"])

    for config in ({}, {"scaling_factor": 0.18215, "shift_factor": None}):
        codec = sampled(**config)
        assert (codec["scale"], codec["shift"], codec["latents_mean"]) == (0.18215, 0.0, None)
    for config, said in (
        ({"scaling_factor": 0.13025}, "codec.scale=0.18215 .*scaling_factor=0.13025"),
        ({"shift_factor": 0.1159}, "codec.shift=0.0 .*shift_factor=0.1159"),
        ({"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}, "codec.*latents_mean=.*0.0, 0.0"),
    ):
        with pytest.raises(SettingsError, match=said):
            sampled(**config)
        assert sampled("codec.own_scale=true", **config)["shift"] == 0.0
    with pytest.raises(SettingsError, match=r"codec.scale=0.5 contradicts the checkpoint"):
        sampled("codec.scale=0.5")


def test_a_run_of_0_1_continues_with_the_scale_that_it_was_trained_with(tmp_path):
    vae = str(folder_that_says(tmp_path, scaling_factor=0.13025))
    now = ["codec=sd_vae", f"codec.path={vae}", "use_latent=true"]
    stored = {"codec": {**OLD_CODEC, "path": vae}}

    def continued(*overrides):
        check_same_config({"codec": scaled_codec(plain([*now, *overrides])["codec"])}, stored)

    with pytest.raises(RunDirError, match="has 0.18215, the command says 0.13025") as error:
        continued()
    named = re.search(r"codec\.scale=\S+ codec\.own_scale=true", str(error.value))
    assert named is not None
    continued(*named[0].split())
    folder_that_says(tmp_path)
    continued()
    folder_that_says(tmp_path, shift_factor=0.5)
    with pytest.raises(RunDirError, match=r"codec.shift: the checkpoint has 0.0, the command says 0.5"):
        continued()


def test_a_run_records_what_its_autoencoder_says(tmp_path):
    statistics = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    for said in ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, {"scaling_factor": 0.5, **statistics}):
        folder_that_says(tmp_path, **said)
        node = scaled_codec(plain(["codec=sd_vae", f"codec.path={tmp_path}"])["codec"])
        assert node["scale"] == said["scaling_factor"]
        assert node["shift"] == said.get("shift_factor")
        assert node["latents_mean"] == said.get("latents_mean")
        # Read again, from its JSON and beside the folder.
        assert scaled_codec(json.loads(json.dumps(node))) == node
    published = plain(
        ["data=mscoco256_features", f"codec.path={folder_that_says(tmp_path, scaling_factor=0.18215)}"]
    )
    assert scaled_codec(published["codec"])["scale"] == 0.2301
