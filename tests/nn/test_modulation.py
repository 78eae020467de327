"""What models make of the work on single tokens: norms of any kind are read, checkpoint policies recompute it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from dis_kernels.tokenwise import add_norm_modulate
from dis_mamba import MambaMixer
from tests.assertions import assert_close
from tests.kernels.operators import CountOperators, needs_compiler
from tests.kernels.tokenwise.definitions import a_walk, read_arguments
from zigflow.nn import LayerNorm, RMSNorm, modulate, permute, read_stream
from zigflow.nn.checkpointing import checkpointed

F32, BF16 = torch.float32, torch.bfloat16


@needs_compiler
def test_selective_checkpointing_computes_them_again():
    values = list(read_arguments(2, 9, 6, F32, F32).values())
    with CountOperators() as counter:
        checkpointed(
            "selective", lambda *a: add_norm_modulate(*a, backend="cpu")[0], *values
        ).sum().backward()
    assert counter.calls["zigflow::cpu_add_norm_modulate"] == 2
    assert counter.calls["zigflow::cpu_add_norm_modulate_backward"] == 1


def test_selective_checkpointing_computes_the_step_projection_again_and_no_other_product():
    mixer = MambaMixer(32, dt_rank=2, d_state=3, backend="torch")
    calls = {}
    for policy in ("none", "selective", "block"):
        x = torch.randn(2, 9, 32, requires_grad=True)
        with CountOperators() as counter:
            checkpointed(policy, mixer, x).sum().backward()
        calls[policy] = counter.calls["aten::mm"]
    assert calls["selective"] == calls["none"] + 1
    # Of four products the last one is needed by no gradient.
    assert calls["block"] == calls["none"] + 3


def test_selective_checkpointing_of_a_product_that_names_its_dtype():
    def product(x, weight):
        return torch.mm(x, weight, out_dtype=F32).sin()

    x, weight = (torch.empty(4, 4, dtype=BF16, device="meta", requires_grad=True) for _ in range(2))
    assert checkpointed("selective", product, x, weight).dtype == F32


@pytest.mark.parametrize("kind", ["rms", "layer", "affine", "hooked", "watched", "wrapped", "other"])
def test_a_norm_of_any_kind_is_read(kind, monkeypatch):
    norm = {
        "rms": RMSNorm(6, eps=1e-3),
        "layer": LayerNorm(6, eps=1e-3, elementwise_affine=False),
        "affine": LayerNorm(6),
        "hooked": RMSNorm(6),
        "watched": RMSNorm(6),
        "wrapped": RMSNorm(6),
        "other": torch.nn.Linear(6, 6),
    }[kind]
    seen = SimpleNamespace(calls=0)

    def count(*_):
        seen.calls += 1

    if kind == "hooked":
        norm.register_forward_hook(count)
    elif kind == "wrapped":
        monkeypatch.setattr(norm, "forward", lambda x, forward=norm.forward: (count(), forward(x))[1])
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    hidden, residual, walk = torch.randn(2, 5, 6), torch.randn(2, 5, 6), a_walk(5)
    shift, scale = torch.randn(2, 6), torch.randn(2, 6)
    watch = register_module_forward_hook(count) if kind == "watched" else nullcontext()
    with watch:
        x, normed, stream = read_stream(
            norm, hidden, residual, shift, scale, *walk.values(), dtype=F32, keep_normed=True
        )
    assert seen.calls == (kind in ("hooked", "watched", "wrapped"))
    want = norm(hidden + residual)
    assert torch.equal(stream, hidden + residual)
    assert_close("norm", normed, want, of_max=1e-6)
    assert_close("x", x, permute(modulate(want, shift, scale), *walk.values()), of_max=1e-6)
    x, normed, stream = read_stream(norm, None, residual, dtype=BF16)
    assert normed is None
    assert stream is residual
    assert x.dtype == BF16
