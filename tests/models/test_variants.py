"""Named sizes: every one is built and runs, and what ``model=`` composes under its name is the same model."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from model_zigma import SIZES as ZIGMA_SIZES
from model_zigma import ZigMa
from zigflow.models import build_variant, list_variants, register_variant
from zigflow.models.variants import VARIANTS

CONFIGS = Path(__file__).parents[2] / "config" / "model"
STATED = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in sorted(CONFIGS.glob("*.yaml"))}
# What a configuration of a published run says beyond the size: how it is trained.
TRAINING = {"official_backward_dt_init": "dis_", "use_checkpoint": "uvit_"}
# Sizes of U-ViT without a data set of their own: their configurations are of ImageNet.
OF_IMAGENET = {f"uvit_{size}" for size in ("small", "mid", "large", "huge")}


@pytest.mark.parametrize("name", list_variants())
def test_every_variant_is_built_and_has_a_forward_pass(name):
    with torch.device("meta"):
        model = build_variant(name, in_channels=4, img_dim=16, depth=2)
        y = torch.zeros(1, dtype=torch.int64) if model.num_classes > 0 else None
        out = model(torch.empty(1, 4, 16, 16), torch.empty(1), y)
    assert out.shape == (1, getattr(model, "out_channels", 4), 16, 16)


def test_unknown_variant_suggests_a_near_one():
    with pytest.raises(KeyError, match="zigma_b_2"):
        build_variant("zigma_b2")


def test_a_name_belongs_to_one_family():
    list_variants()
    with pytest.raises(
        ValueError, match=r"'dit_s_2' is already registered by zigflow\.models\.dit.*model_zigma"
    ):
        register_variant("dit_s_2", ZigMa, "ZigMa", embed_dim=16, depth=2)


def follows(value):
    return isinstance(value, str) and value.startswith("${")


@pytest.mark.parametrize("name", [name for name in list_variants() if name in STATED])
def test_a_size_is_the_same_by_name_and_by_configuration(name):
    node = {key: value for key, value in STATED[name].items() if key not in ("name", "_target_")}
    family = get_class(STATED[name]["_target_"])
    defaults = {key: p.default for key, p in inspect.signature(family).parameters.items()}
    assert VARIANTS.get(name).__module__ == family.__module__
    stated, fixed = {**defaults, **node}, {**defaults, **VARIANTS.get(name).fixed}
    different = {key for key in stated if stated[key] != fixed[key] and not follows(stated[key])}
    allowed = {key for key, prefix in TRAINING.items() if name.startswith(prefix)}
    if name in OF_IMAGENET:
        allowed |= {"num_classes", "class_dropout_prob"}
    assert different <= allowed, {key: (stated[key], fixed[key]) for key in different - allowed}


def test_every_published_size_of_a_configuration_has_a_name():
    own = re.compile(r"digits_|from_checkpoint$|.*(zigzag|sweep)\d")
    assert {name for name in STATED if not own.match(name)} <= set(list_variants())


@pytest.mark.parametrize(
    "name", [name for name, node in STATED.items() if node.get("_target_") == "model_zigma.ZigMa"]
)
def test_published_zigmas_have_the_sizes_of_their_letter(name):
    found = re.search(r"_([smblh])(\d)", name)
    if found is None:
        assert name == "digits_zigzag8"
        return
    width, depth = ZIGMA_SIZES[found[1]]
    patch = 2 if name.startswith("s1024") else int(found[2])
    assert (STATED[name]["embed_dim"], STATED[name]["depth"], STATED[name]["patch_size"]) == (
        width,
        depth,
        patch,
    )
