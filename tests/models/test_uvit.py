"""U-ViT: manifests, variants, skips and tokens, official weights and the null text."""

import json
from pathlib import Path

import pytest
import torch

from tests.assertions import assert_close
from tests.models.transformers import filled, inputs
from zigflow.models import build_variant
from zigflow.models.uvit import PUBLISHED, UViT
from zigflow.official import load_official, official_arguments, read_official
from zigflow.plugins import compose_config

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures" / "dit_uvit" / "manifests"
MANIFESTS = sorted(FIXTURES.glob("uvit_*.json"))
TINY = {"in_channels": 2, "img_dim": 4, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
OFFICIAL = {"img_size": 4, "patch_size": 2, "in_chans": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
# The file's name says data set, size and whether it is deep.
NAMES = {
    path.stem: "_".join([path.stem.split("uvit_")[2], path.stem.split("_")[1]]).replace("mscoco", "coco")
    for path in MANIFESTS
}


def configured(name):
    node = dict(compose_config(["data=none", f"model={name}", "run_dir=unused"])["model"])
    assert node.pop("name") == name
    assert node.pop("_target_") == "zigflow.models.uvit.UViT"
    return node


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_names_shapes_and_totals_equal_the_manifest(path):
    manifest = json.loads(path.read_text())
    family = "uvit_t2i" if manifest["nnet"]["name"] == "uvit_t2i" else "uvit"
    kwargs = official_arguments(family, manifest["nnet"])
    with torch.device("meta"):
        published = UViT(**kwargs)
        variant = build_variant(f"uvit_{NAMES[path.stem]}")
        own = UViT(**configured(f"uvit_{NAMES[path.stem]}"))
    shapes = {k: list(p.shape) for k, p in published.state_dict().items()}
    assert list(shapes.items()) == list(manifest["state_dict"].items())
    assert sum(p.numel() for p in published.parameters()) == manifest["params_total"]
    # Ours is the same but for the null text, which the published data sets held.
    for model in (variant, own):
        state = {k: list(p.shape) for k, p in model.state_dict().items()}
        null = state.pop("null_text", None)
        assert null == ([77, 768] if family == "uvit_t2i" else None)
        assert state == shapes
        assert model.img_dim == published.img_dim
        dropped = manifest["full_config"]["dataset"].get("p_uncond", 0.0)
        assert model.class_dropout_prob == dropped
    assert own.mid_block.checkpoint_policy == ("block" if manifest["nnet"].get("use_checkpoint") else "none")


def test_every_published_variant_has_a_manifest():
    assert set(NAMES.values()) == set(PUBLISHED)


@pytest.mark.parametrize("size", ["small", "mid", "large", "huge"])
def test_sizes_by_name(size):
    node = configured(f"uvit_{size}")
    with torch.device("meta"):
        model, variant = UViT(**node), build_variant(f"uvit_{size}", num_classes=1000, class_dropout_prob=0.1)
    assert str(model) == str(variant)


def test_skips_join_the_blocks_in_reverse_order():
    model = filled(UViT(**TINY)).eval()
    given = inputs(model)
    seen = {}
    for name, block in model.named_blocks().items():
        block.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[1], out)}))
    model(*given)
    assert seen["out_blocks.0"][0] is seen["in_blocks.1"][1]
    assert seen["out_blocks.1"][0] is seen["in_blocks.0"][1]
    assert seen["mid_block"][0] is None
    without = UViT(**TINY, skip=False)
    assert not any("skip_linear" in name for name in without.state_dict())


@pytest.mark.parametrize("depth", [4, 5])
def test_depth_counts_the_middle_block_once(depth):
    assert len(UViT(**{**TINY, "depth": depth}).named_blocks()) == 5


def test_extra_tokens_stand_before_the_patches():
    labels = UViT(**TINY, num_classes=3)
    assert labels.pos_embed.shape == (1, 2 + 4, 16)
    text = UViT(**TINY, has_text=True, d_context=6, n_context_token=5)
    assert text.pos_embed.shape == (1, 6 + 4, 16)
    x, t, y = inputs(labels)
    tokens, mask, grid = labels._tokens(x, t, y)
    assert (mask, grid) == (None, (2, 2))
    assert_close("label", tokens[:, 0], labels.label_emb(y) + labels.pos_embed[:, 0])
    # Interpolation leaves the extra tokens' positions alone.
    larger = labels._tokens(torch.randn(2, 2, 8, 6), t, y)[0]
    assert larger.shape == (2, 2 + 12, 16)
    assert torch.equal(larger[:, :2], tokens[:, :2])


def test_official_classes_count_the_null_class():
    source = filled(UViT(**TINY, num_classes=10, class_dropout_prob=0.1)).eval()
    plain = load_official("uvit", {**OFFICIAL, "num_classes": 11}, source.state_dict())
    guided = load_official(
        "uvit", {**OFFICIAL, "num_classes": 11}, source.state_dict(), class_dropout_prob=0.1
    )
    assert (plain.num_classes, guided.num_classes) == (11, 10)
    x, t, _ = inputs(source)
    y = torch.tensor([3, 10])
    assert torch.equal(plain(x, t, y), source(x, t, y))
    assert torch.equal(guided(x, t, y), source(x, t, y))
    assert guided.null_condition(y).tolist() == [10, 10]
    with pytest.raises(ValueError, match="class_dropout_prob"):
        plain.null_condition(y)
    # With our keywords the number is ours.
    ours = {**TINY, "num_classes": 10, "class_dropout_prob": 0.1}
    assert load_official("uvit", ours, source.state_dict()).num_classes == 10
    with pytest.raises(ValueError, match="qk_scale"):
        load_official("uvit", {**OFFICIAL, "qk_scale": 0.1}, source.state_dict())


def test_official_text_models_are_given_their_null_text():
    text = {**OFFICIAL, "clip_dim": 6, "num_clip_token": 5}
    source = filled(UViT(**TINY, has_text=True, d_context=6, n_context_token=5)).eval()
    plain = load_official("uvit_t2i", text, source.state_dict())
    x, t, y = inputs(source)
    assert torch.equal(plain(x, t, y), source(x, t, y))
    null = torch.randn(5, 6)
    guided = load_official("uvit_t2i", text, source.state_dict(), null_text=null)
    assert_close("none", guided(x, t), source(x, t, null.expand(2, -1, -1)), of_max=1e-6)
    with pytest.raises(ValueError, match=r"empty_context\.npy"):
        load_official("uvit_t2i", text, source.state_dict(), class_dropout_prob=0.1)
    with pytest.raises(ValueError, match="null_text"):
        load_official("uvit_t2i", text, source.state_dict(), null_text=null[:3])


def test_a_folder_of_the_training_script_gives_its_average(tmp_path):
    folder = tmp_path / "500.ckpt"
    folder.mkdir()
    torch.save({"pos_embed": torch.ones(1, 6, 16)}, folder / "nnet_ema.pth")
    torch.save({"pos_embed": torch.zeros(1, 6, 16)}, folder / "nnet.pth")
    assert read_official(folder, "uvit").state_dict["pos_embed"].min() == 1
    assert read_official(folder / "nnet.pth", "uvit").state_dict["pos_embed"].max() == 0
    (folder / "nnet_ema.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"500\.ckpt/nnet_ema\.pth"):
        read_official(folder, "uvit")
