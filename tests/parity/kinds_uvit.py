"""Checks of the fixture kinds uvit.model, uvit_t2i.model, uvit.functions and uvit.init_stats."""

import torch

from tests.assertions import assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from tests.parity.kinds_dit import check_gradients
from zigflow.models.uvit import UViT
from zigflow.nn import PatchEmbed, unpatchify
from zigflow.official import load_official


def _check_model(fixture: Fixture, family: str) -> None:
    model = load_official(family, fixture.meta["kwargs"], fixture.under("state."))
    t = fixture.tensors
    x = t["in.x"].requires_grad_()
    out = model(x, t["in.t"], t.get("in.y", t.get("in.context")))
    assert_close("out", out, t["out.forward"])
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
    assert torch.equal(unpatchify(t["patchify2"], 4, 4, 2, 3), t["unpatchify2"])
    # The patch embedding with the identity for weights cuts an image into its patches.
    embed = PatchEmbed(3, 12, 2)
    with torch.no_grad():
        # Entry (p1, p2, c) of a patch, the channel fastest, is picked by a kernel that is 1 there.
        embed.proj.weight.copy_(torch.eye(12).reshape(12, 2, 2, 3).permute(0, 3, 1, 2))
        embed.proj.bias.zero_()
    assert_close("patchify", embed(t["x"]), t["patchify2"])


@parity_kind("uvit.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    stored = {k: v for k, v in fixture.meta.items() if k != "fixture_kind"}
    blocks = len({k.split(".")[1] for k in stored if k.startswith("in_blocks.")})
    model = UViT(
        in_channels=4, img_dim=8, patch_size=2, embed_dim=64, depth=2 * blocks, num_heads=4, num_classes=10,
        mlp_time_embed=True,
    )  # fmt: skip
    own = dict(model.named_parameters())
    assert list(own) == list(stored)
    for name, want in stored.items():
        check_statistics(name, own[name].detach(), want)
