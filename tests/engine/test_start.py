"""Starting from the weights of another grid or patch size: what is copied, adapted, new, left over."""

import pytest
import torch

from model_zigma import ZigMa
from tests.assertions import assert_close
from tests.models.transformers import filled, inputs
from zigflow.engine.start import start_model
from zigflow.engine.tensors import named_floating
from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT
from zigflow.registry import UnknownNameError
from zigflow.shapes import token_grid

FAMILIES = {
    "zigma": (ZigMa, {"depth": 2, "use_pe": 2, "ssm_cfg": {"d_state": 4}}, "pos_embed"),
    "zigma-frozen": (ZigMa, {"depth": 2, "use_pe": 1, "ssm_cfg": {"d_state": 4}}, "pos_embed"),
    "dit": (DiT, {"depth": 2, "num_heads": 2}, "pos_embed"),
    "uvit": (UViT, {"depth": 3, "num_heads": 2}, "pos_embed"),
    "dis": (DiS, {"depth": 2, "ssm_cfg": {"d_state": 4}}, "pos_embed"),
    "dim": (DiM, {"depth": 3, "ssm_cfg": {"d_state": 4}}, "additional_embed"),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    family, own, _ = FAMILIES[name]
    base = {"in_channels": 2, "img_dim": 4, "patch_size": 2, "embed_dim": 16, "num_classes": 3,
            "class_dropout_prob": 0.1}  # fmt: skip
    return filled(family(**{**base, **own, **options})).eval()


@every_family
def test_a_larger_grid_starts_where_the_small_model_is(name):
    small, large = build(name), build(name, 1, img_dim=8)
    start = start_model(large, small.state_dict(), {}, built=(1, 2, 2))
    assert list(start.report.adapted) == [FAMILIES[name][2]] and "2 x 2 -> 4 x 4" in str(start.report.adapted)
    assert not start.report.new and not start.report.left_over
    assert len(start.report.copied) == len(small.state_dict()) - 1
    x, t, y = inputs(small, 2, size=(8, 8))
    # What the small model does with the larger image is what the large one now starts from.
    assert_close("out", large(x, t, y), small(x, t, y), of_max=1e-5)
    # An official file does not say its grid: it has the proportions of the model's.
    again = build(name, 2, img_dim=8)
    start_model(again, small.state_dict(), {})
    assert torch.equal(again(x, t, y), large(x, t, y))


@every_family
def test_the_same_model_is_copied_bit_by_bit(name):
    first, second = build(name), build(name, 1)
    report = start_model(second, first.state_dict(), {}, built=(1, 2, 2)).report
    assert not report.adapted and not report.new and not report.left_over
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@every_family
def test_larger_patches_see_and_draw_the_means_of_the_small_ones(name):
    small, large = build(name), build(name, 1, img_dim=8, patch_size=4)
    report = start_model(large, small.state_dict(), {}, built=(1, 2, 2)).report
    assert len(report.adapted) == 3 and all("2 x 2 -> 4 x 4 pixels" in how for how in report.adapted.values())
    x, t, y = inputs(small, 2)
    enlarged = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    want = small(x, t, y)
    if name == "uvit":
        return  # its last 3 x 3 convolution acts on the larger picture
    want = want.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert_close("out", large(enlarged, t, y), want, of_max=1e-4)
    back = build(name, 2)
    start_model(back, large.state_dict(), {}, built=(1, 2, 2))
    assert_close("there and back", back(x, t, y), small(x, t, y), of_max=1e-5)


def test_patches_as_published_repeat_the_first_pixel():
    small, large = build("dim"), build("dim", 1, img_dim=8, patch_size=4)
    start_model(large, small.state_dict(), {}, built=(1, 2, 2), patches="as_published")
    first = small.pos_embed.proj.weight[:, :, 0, 0]
    assert torch.equal(large.pos_embed.proj.weight, first[..., None, None].expand(-1, -1, 4, 4))
    rows, bias = large.proj_out_2.weight.view(16, 2, 16), large.proj_out_2.bias.view(16, 2)
    assert torch.equal(rows, small.proj_out_2.weight[:2].expand(16, 2, 16))
    assert torch.equal(bias, small.proj_out_2.bias[:2].expand(16, 2))
    with pytest.raises(UnknownNameError, match="as_published"):
        start_model(large, small.state_dict(), {}, patches="published")


def test_classes_and_what_only_one_side_has():
    small = build("dit")
    other = build("dit", 1, num_classes=5)
    before = other.y_embedder.embedding_table.weight.clone()
    report = start_model(other, small.state_dict(), {}, built=(1, 2, 2)).report
    assert list(report.new) == ["y_embedder.embedding_table.weight"]
    assert "4 rows there, 6 here" in report.new["y_embedder.embedding_table.weight"]
    assert torch.equal(other.y_embedder.embedding_table.weight, before)
    plain = build("dit", 1, class_dropout_prob=0.0)
    report = start_model(plain, small.state_dict(), {}, built=(1, 2, 2), same_classes=True).report
    assert list(report.adapted) == ["y_embedder.embedding_table.weight"]
    table = small.y_embedder.embedding_table.weight
    assert torch.equal(plain.y_embedder.embedding_table.weight, table[:3])
    state = {**small.state_dict(), "extra.weight": torch.zeros(1)}
    del state["x_embedder.proj.bias"]
    kept = other.x_embedder.proj.bias.clone()
    report = start_model(other, state, {}, built=(1, 2, 2)).report
    assert report.left_over == ["extra.weight"] and "x_embedder.proj.bias" in report.new
    assert torch.equal(other.x_embedder.proj.bias, kept)


@pytest.mark.parametrize("now", [("bee", "dog", "cat"), ("cat", "bee", "ant", "dog"), ("ant", "bee", "cat")])
def test_classes_of_the_same_name_start_from_each_other(now):
    small, other = build("dit"), build("dit", 1, num_classes=len(now))
    table, initial = (m.y_embedder.embedding_table.weight.detach().clone() for m in (small, other))
    before = ("ant", "bee", "cat")
    averages = {"slow": {k: 2 * v.detach() for k, v in named_floating(small).items()}}
    start = start_model(
        other, small.state_dict(), averages, built=(1, 2, 2), same_classes=True, classes=(before, now)
    )
    rows = other.y_embedder.embedding_table.weight
    for place, name in enumerate(now):
        assert torch.equal(rows[place], table[before.index(name)] if name in before else initial[place])
    assert torch.equal(rows[-1], table[-1])
    key = "y_embedder.embedding_table.weight"
    assert torch.equal(start.averages["slow"][key][now.index("cat")], 2 * table[2])
    told = start.report.adapted.get(key, "")
    assert ("new: dog" in told) == ("dog" in now) and (key in start.report.copied) == (now == before)
    # Names that say no more than their numbers are none.
    plain = build("dit", 1)
    digits = (("0", "1", "2"), ("cat", "bee", "ant"))
    start_model(plain, small.state_dict(), {}, built=(1, 2, 2), same_classes=True, classes=digits)
    assert torch.equal(plain.y_embedder.embedding_table.weight, table)


def test_averages_are_adapted_like_the_weights():
    small, large = build("zigma"), build("zigma", 1, img_dim=8)
    averages = {"slow": {k: 2 * v.detach() for k, v in named_floating(small).items()}}
    start = start_model(large, small.state_dict(), averages, built=(1, 2, 2), images=640)
    assert start.images == 640 and start.averages["slow"].keys() == named_floating(large).keys()
    for key, value in named_floating(large).items():
        assert_close(key, start.averages["slow"][key], 2 * value.detach(), of_max=1e-5)


def test_frames_and_the_grid_of_a_configuration():
    options = {"scan_type": "zzvideo_st", "use_pe": 2, "tpe": True}
    short = build("zigma", video_frames=2, **options)
    long = build("zigma", 1, video_frames=4, img_dim=8, **options)
    report = start_model(long, short.state_dict(), {}, built=(2, 2, 2)).report
    assert report.adapted["temporal_pos_embedding"] == "2 -> 4 frames, linear"
    assert report.adapted["pos_embed"].startswith("2 x 2 x 2 -> 4 x 4 x 4")
    assert token_grid({"img_dim": [8, 4], "patch_size": 2, "video_frames": 3}) == (3, 4, 2)
    assert token_grid({"img_dim": 8, "patch_size": 2}) == (1, 4, 4)
    assert token_grid({"img_dim": 8}) is None


def test_what_has_no_rule_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"pos_embed is .* only positions, patch layers and class tables"):
        start_model(build("dit"), build("dit", embed_dim=32).state_dict(), {})
    with pytest.raises(ValueError, match="no grid"):
        start_model(build("dit", img_dim=(8, 4)), build("dit", img_dim=(8, 6)).state_dict(), {})
    with pytest.raises(ValueError, match="multiple or a divisor"):
        start_model(build("dit", img_dim=6, patch_size=3), build("dit").state_dict(), {}, built=(1, 2, 2))
