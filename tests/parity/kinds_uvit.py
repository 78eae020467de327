"""Checks of the fixture kinds uvit.model, uvit_t2i.model, uvit.functions and uvit.init_stats."""

import math

import torch

from tests.assertions import assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from tests.parity.kinds_dit import check_gradients, statistics_of
from zigflow.models.uvit import UViT
from zigflow.nn import PatchEmbed, unpatchify
from zigflow.official import load_official, official_arguments


def condition_of(fixture: Fixture, prefix: str = "in."):
    """Labels, text, or None."""
    return next(
        (fixture.tensors[prefix + k] for k in ("y", "context") if prefix + k in fixture.tensors), None
    )


def _check_model(fixture: Fixture, family: str) -> None:
    model = load_official(family, fixture.meta["kwargs"].plain(), fixture.under("state."))
    t = fixture.tensors
    x = t["in.x"].requires_grad_()
    out = model(x, t["in.t"], condition_of(fixture))
    assert_close("out", out, t["out.forward"], floor=fixture.tolerance())
    check_gradients(fixture, model, x, out)


@parity_kind("uvit.model")
def check_uvit(fixture: Fixture, case: str) -> None:
    _check_model(fixture, "uvit")


@parity_kind("uvit_t2i.model")
def check_uvit_text(fixture: Fixture, case: str) -> None:
    _check_model(fixture, "uvit_t2i")


@parity_kind("uvit.functions")
def check_functions(fixture: Fixture, case: str) -> None:
    t = fixture.tensors
    channels = t["x"].shape[1]
    sizes = fixture.numbered("patchify")
    assert sizes and sizes == fixture.numbered("unpatchify")
    for patch in sizes:
        h, w = (side // patch for side in t["x"].shape[2:])
        patches = t[f"patchify{patch}"]
        assert torch.equal(unpatchify(patches, h, w, patch, channels), t[f"unpatchify{patch}"])
        # The patch embedding with the identity for weights cuts an image into its patches.
        width = channels * patch**2
        embed = PatchEmbed(channels, width, patch)
        with torch.no_grad():
            # Entry (p1, p2, c) of a patch, the channel fastest, is picked by a kernel that is 1 there.
            picks = torch.eye(width).reshape(width, patch, patch, channels)
            embed.proj.weight.copy_(picks.permute(0, 3, 1, 2))
            embed.proj.bias.zero_()
        assert_close(f"patchify{patch}", embed(t["x"]), patches)


@parity_kind("uvit.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    stored = statistics_of(fixture)
    if "kwargs" in fixture.meta:
        kwargs = fixture.meta["kwargs"].plain()
        family = "uvit_t2i" if "clip_dim" in kwargs or "num_clip_token" in kwargs else "uvit"
        arguments = official_arguments(family, kwargs)
    else:
        arguments = _shape_of(stored)
    torch.manual_seed(0)
    own = dict(UViT(**arguments).named_parameters())
    assert list(own) == list(stored)
    for name, want in stored.items():
        check_statistics(name, own[name].detach(), want)


def _shape_of(stored) -> dict:
    """What names and shapes tell of the model; the number of heads shows in none of them and changes no statistic."""
    dim, channels, patch, _ = stored["patch_embed.proj.weight"]["shape"]
    blocks = len({k.split(".")[1] for k in stored if k.startswith("in_blocks.")})
    text, labels = stored.get("context_embed.weight"), stored.get("label_emb.weight")
    tokens = stored["pos_embed"]["shape"][1]
    if text:
        # A square of patches, the rest of the table is time and text.
        side = math.isqrt(tokens - 2)
        extras = {"has_text": True, "d_context": text["shape"][1], "n_context_token": tokens - 1 - side**2}
    else:
        side = math.isqrt(tokens - 1 - bool(labels))
        extras = {"num_classes": labels["shape"][0] if labels else -1}
    return {
        **extras,
        "embed_dim": dim,
        "in_channels": channels,
        "patch_size": patch,
        "img_dim": patch * side,
        "depth": 2 * blocks,
        "num_heads": 1,
        "mlp_ratio": stored["mid_block.mlp.fc1.bias"]["shape"][0] / dim,
        "qkv_bias": "mid_block.attn.qkv.bias" in stored,
        "mlp_time_embed": "time_embed.0.weight" in stored,
        "conv": "final_layer.weight" in stored,
        "skip": any(".skip_linear." in name for name in stored),
    }
