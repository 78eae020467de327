"""Checks of the fixture kinds dit.model, sit.model, dit.functions and dit.init_stats."""

import torch

from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from zigflow.models.dit import DiT
from zigflow.nn import LabelEmbedder, sincos_positions, sinusoidal_embedding
from zigflow.official import load_official
from zigflow.samplers.guidance import Guided


def check_gradients(fixture: Fixture, model: torch.nn.Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """The stored gradients of sum(out * w)."""
    (out * fixture.tensors["w"]).sum().backward()
    assert_close("grad x", x.grad, fixture.tensors["grad.x"], of_max=GRADIENT_RTOL_OF_MAX)
    stored = fixture.under("grad.param.")
    assert stored
    for name, want in stored.items():
        assert_close(name, model.get_parameter(name).grad, want, of_max=GRADIENT_RTOL_OF_MAX)


def _guided(model: DiT, x, t, y, scale: float) -> torch.Tensor:
    """The sampler's guidance on the first half, which the published call leaves in the first half of its output."""
    rows = len(x) // 2
    assert torch.equal(model.null_condition(y[:rows]), y[rows:])
    return Guided(model, scale, channels=model.guided_channels)(x[:rows], t[:rows], y[:rows])


@parity_kind("dit.model")
def check_dit(fixture: Fixture, case: str) -> None:
    model = load_official("dit", fixture.meta["kwargs"], fixture.under("state."))
    t = fixture.tensors
    fresh = DiT(
        img_dim=fixture.meta["kwargs"]["input_size"],
        patch_size=model.patch_size,
        embed_dim=32,
        depth=1,
        num_heads=2,
    )
    assert_close("positions", fresh.pos_embed, t["init.pos_embed_sincos"])
    inner = {}
    model.blocks[0].register_forward_hook(
        lambda module, args, out: inner.update(x_embed_plus_pos=args[0], cond=args[1], block0=out)
    )
    x = t["in.x"].requires_grad_()
    out = model(x, t["in.t"], t["in.y"])
    assert_close("out", out, t["out.forward"])
    for name, want in fixture.under("mid.").items():
        assert_close(name, inner[name], want)
    check_gradients(fixture, model, x, out)
    scales = [name.removeprefix("cfg.out.") for name in t if name.startswith("cfg.out.")]
    assert scales
    for scale in scales:
        given = t["cfg.in.x"], t["cfg.in.t"], t["cfg.in.y"], float(scale)
        want = t[f"cfg.out.{scale}"]
        assert_close(f"cfg {scale}", model.forward_with_cfg(*given), want)
        assert_close(f"guided {scale}", _guided(model, *given), want[: len(want) // 2])


@parity_kind("sit.model")
def check_sit(fixture: Fixture, case: str) -> None:
    model = load_official("sit", fixture.meta["kwargs"], fixture.under("state."))
    assert model.time_scale == 1
    t = fixture.tensors
    x = t["in.x"].requires_grad_()
    out = model(x, t["in.t"], t["in.y"])
    assert_close("out", out, t["out.forward"])
    check_gradients(fixture, model, x, out)
    given = t["in.cfg_x"], t["in.cfg_t"], t["in.cfg_y"], fixture.meta["cfg_scale"]
    assert_close("cfg", model.forward_with_cfg(*given), t["out.cfg"])
    assert_close("guided", _guided(model, *given), t["out.cfg"][: len(t["out.cfg"]) // 2])


@parity_kind("dit.functions")
def check_functions(fixture: Fixture, case: str) -> None:
    t = fixture.tensors
    for dim, side in ((64, 4), (96, 8)):
        assert_close("positions", sincos_positions(side, side, dim)[0], t[f"sincos2d.D{dim}.G{side}"])
    for dim in (256, 32, 7):
        assert_close("time", sinusoidal_embedding(t["temb.t"], dim), t[f"temb.dim{dim}"])
    embedder = LabelEmbedder(9, 4, dropout_prob=0.1)
    rows = embedder.embedding_table.weight[t["labeldrop.out"]]
    assert torch.equal(embedder(t["labeldrop.labels"], t["labeldrop.force"] == 1), rows)


@parity_kind("dit.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    stored = {k: v for k, v in fixture.meta.items() if k != "fixture_kind"}
    depth = 1 + max(int(k.split(".")[1]) for k in stored if k.startswith("blocks."))
    model = DiT(img_dim=8, embed_dim=64, depth=depth, num_classes=10)
    own = dict(model.named_parameters())
    assert list(own) == list(stored)
    for name, want in stored.items():
        assert own[name].requires_grad == want["requires_grad"], name
        check_statistics(name, own[name].detach(), want)
