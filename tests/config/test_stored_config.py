"""A sampling command completed by its checkpoint: what is taken over, and what contradicts it."""

import pytest
from omegaconf import OmegaConf

from zigflow.engine.sample_plan import SampleOptions
from zigflow.plugins import compose_config
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
    assert merged["data"]["source"] == {**plain()["data"]["source"], "root": "/elsewhere/train"}
    assert merged["data"]["heldout"] == plain()["data"]["heldout"]
