"""Checks of the fixture kinds dit.model, sit.model, dit.functions and dit.init_stats."""

import math
import re

import torch

from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from zigflow.models.dit import DiT
from zigflow.nn import LabelEmbedder, sincos_positions, sinusoidal_embedding
from zigflow.official import load_official, official_arguments
from zigflow.samplers.guidance import Guided


def check_gradients(fixture: Fixture, model: torch.nn.Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """The stored gradients of sum(out * w)."""
    (out * fixture.tensors["w"]).sum().backward()
    assert_close("grad x", x.grad, fixture.tensors["grad.x"], of_max=GRADIENT_RTOL_OF_MAX)
    stored = fixture.under("grad.param.")
    assert stored
    for name, want in stored.items():
        assert_close(name, model.get_parameter(name).grad, want, of_max=GRADIENT_RTOL_OF_MAX)


def _check_guided(fixture: Fixture, model: DiT, x, t, y, scale: float, want: torch.Tensor) -> None:
    """The published call, and the sampler's guidance on the first half, which the call leaves in its first half."""
    floor = fixture.tolerance()
    assert_close(f"cfg {scale}", model.forward_with_cfg(x, t, y, scale), want, floor=floor)
    if model.class_dropout_prob <= 0:
        return
    rows = len(x) // 2
    assert torch.equal(model.null_condition(y[:rows]), y[rows:])
    guided = Guided(model, scale, channels=model.guided_channels)(x[:rows], t[:rows], y[:rows])
    assert_close(f"guided {scale}", guided, want[:rows], floor=floor)


@parity_kind("dit.model")
def check_dit(fixture: Fixture, case: str) -> None:
    kwargs = fixture.meta["kwargs"].plain()
    model = load_official("dit", kwargs, fixture.under("state."))
    t = fixture.tensors
    if "init.pos_embed_sincos" in t:
        fresh = DiT(**official_arguments("dit", kwargs))
        assert_close("positions", fresh.pos_embed, t["init.pos_embed_sincos"])
    inner = {}
    model.blocks[0].register_forward_hook(
        lambda module, args, out: inner.update(x_embed_plus_pos=args[0], cond=args[1])
    )
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: inner.update({f"block{i}": out}))
    x = t["in.x"].requires_grad_()
    out = model(x, t["in.t"], t.get("in.y", None))
    assert_close("out", out, t["out.forward"], floor=fixture.tolerance())
    for name, want in fixture.under("mid.").items():
        assert_close(name, inner[name], want)
    check_gradients(fixture, model, x, out)
    for scale in fixture.names("cfg.out."):
        given = t["cfg.in.x"], t["cfg.in.t"], t["cfg.in.y"], float(scale)
        _check_guided(fixture, model, *given, t[f"cfg.out.{scale}"])


@parity_kind("sit.model")
def check_sit(fixture: Fixture, case: str) -> None:
    model = load_official("sit", fixture.meta["kwargs"].plain(), fixture.under("state."))
    assert model.time_scale == 1
    t = fixture.tensors
    x = t["in.x"].requires_grad_()
    out = model(x, t["in.t"], t.get("in.y", None))
    assert_close("out", out, t["out.forward"], floor=fixture.tolerance())
    check_gradients(fixture, model, x, out)
    if "out.cfg" in t:
        given = t["in.cfg_x"], t["in.cfg_t"], t["in.cfg_y"], fixture.meta["cfg_scale"]
        _check_guided(fixture, model, *given, t["out.cfg"])


@parity_kind("dit.functions")
def check_functions(fixture: Fixture, case: str) -> None:
    t = fixture.tensors
    for name in fixture.names("sincos2d."):
        dim, side = map(int, re.fullmatch(r"D(\d+)\.G(\d+)", name).groups())
        assert_close(f"positions {name}", sincos_positions(side, side, dim)[0], t[f"sincos2d.{name}"])
    for dim in fixture.numbered("temb.dim"):
        assert_close(f"time {dim}", sinusoidal_embedding(t["temb.t"], dim), t[f"temb.dim{dim}"])
    if "labeldrop.out" in t:
        classes = int(fixture.setting("num_classes", r"(\d+) classes"))
        embedder = LabelEmbedder(classes, 4, dropout_prob=0.1)
        rows = embedder.embedding_table.weight[t["labeldrop.out"]]
        assert torch.equal(embedder(t["labeldrop.labels"], t["labeldrop.force"] == 1), rows)


def statistics_of(fixture: Fixture):
    """What the fixture stores by parameter; beside them may stand ``kwargs``."""
    return {
        k: fixture.meta[k]
        for k in fixture.meta
        if k not in ("fixture_kind", "kwargs", "note", "repo", "seed")
    }


@parity_kind("dit.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    stored = statistics_of(fixture)
    if "kwargs" in fixture.meta:
        arguments = official_arguments("dit", fixture.meta["kwargs"].plain())
    else:
        arguments = _shape_of(stored)
    torch.manual_seed(0)
    own = dict(DiT(**arguments).named_parameters())
    assert list(own) == list(stored)
    for name, want in stored.items():
        if "requires_grad" in want:
            assert own[name].requires_grad == want["requires_grad"], name
        check_statistics(name, own[name].detach(), want)


def _shape_of(stored) -> dict:
    """What the shapes tell of the model; the number of heads shows in none of them and changes no statistic."""
    dim, channels, patch, _ = stored["x_embedder.proj.weight"]["shape"]
    tokens = stored["pos_embed"]["shape"][1]
    outputs = stored["final_layer.linear.bias"]["shape"][0]
    return {
        "embed_dim": dim,
        "in_channels": channels,
        "patch_size": patch,
        "img_dim": patch * math.isqrt(tokens),
        "depth": 1 + max(int(k.split(".")[1]) for k in stored if k.startswith("blocks.")),
        "num_heads": 1,
        "mlp_ratio": stored["blocks.0.mlp.fc1.bias"]["shape"][0] / dim,
        "num_classes": stored["y_embedder.embedding_table.weight"]["shape"][0] - 1,
        "learn_sigma": outputs == 2 * channels * patch**2,
    }
