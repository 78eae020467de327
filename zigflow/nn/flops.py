"""Floating-point operations of a forward pass, counted on meta tensors: nothing is computed.

Convention: a multiply and the add that follows it are two operations (a "multiply-add" or MAC in the literature,
which often calls MACs "FLOPs": DiT, SiT and ZigMa do). Counted are matrix products, convolutions, attention, and
the two sequence operators of the state-space mixers; norms, activations, embeddings and gathers are not.
Training is taken as three forward passes, two of them for the gradients of inputs and weights; what activation
checkpointing computes again is not useful work and not counted (Chowdhery et al., "PaLM", 2022, appendix B).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dis_mamba  # noqa: F401 (registers both operators)
from dis_kernels.dispatch import use_backend

from .denoiser import as_denoiser
from .norm import RMSNorm

__all__ = ["TRAINING_FACTOR", "FlopCount", "count_flops", "one_sample", "scan_flops"]

TRAINING_FACTOR = 3


@dataclass(frozen=True)
class FlopCount:
    """Operations of one forward pass.

    Attributes:
        forward: of the whole model.
        modules: by dotted name of the module, its children included; "" is the model.
        operators: by operator.
        normalized: values that leave a layer or RMS norm, no part of the other counts.
    """

    forward: int
    modules: dict[str, int]
    operators: dict[str, int]
    normalized: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.forward // 2

    @property
    def published(self) -> int:
        """Multiply-adds and normalized values: what DiT's paper prints as "flops"."""
        return self.macs + self.normalized

    @property
    def training(self) -> int:
        """Forward and backward pass together."""
        return TRAINING_FACTOR * self.forward


def scan_flops(batch: int, tokens: int, channels: int, states: int, skip: bool, gate: bool) -> int:
    """Operations of one selective scan by its definition, whichever way a backend computes it.

    Per token, channel and state seven: dt A, its exponential, (dt u) B, a h, the sum of both, C h, the sum over
    the states; per token and channel one for dt u, two for the skip D u, one for the gate.
    """
    return batch * tokens * channels * (7 * states + 1 + 2 * skip + gate)


def _scan(u, delta, A, B, C, D, z, *_: Any, **__: Any) -> int:
    batch, tokens, channels = u
    return scan_flops(batch, tokens, channels, A[1], D is not None, z is not None)


def _conv(x, weight, bias, *_: Any, **__: Any) -> int:
    batch, tokens, channels = x
    return batch * tokens * channels * (2 * weight[1] + (bias is not None))


def _formulas() -> dict[Any, Any]:
    return {torch.ops.zigflow.chunked_scan: _scan, torch.ops.zigflow.shifted_conv: _conv}


def one_sample(model: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, t, y) of one sample on the meta device: x (1, *sample_shape), y a text (1, S, D), a label (1,) or None.

    Raises:
        ValueError: the model does not say what it reads.
    """
    reads = as_denoiser(model)
    x = torch.empty(1, *reads.sample_shape, device="meta")
    y = None
    if reads.has_text:
        y = torch.empty(1, reads.n_context_token, reads.d_context, device="meta")
    elif reads.num_classes > 0:
        y = torch.zeros(1, dtype=torch.int64, device="meta")
    return x, torch.zeros(1, device="meta"), y


def count_flops(model: nn.Module, *inputs: Any) -> FlopCount:
    """Count one forward pass in eval mode.

    Args:
        model: stays as it is.
        inputs: what the model is called with, on the meta device; by default :func:`one_sample`.
    """
    # A copy whose weights are meta tensors from the start: nothing is allocated, and shared weights stay shared.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in model.parameters()}
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    model = copy.deepcopy(model, memo).eval()
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    normalized: list[int] = []
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, RMSNorm)):
            module.register_forward_hook(lambda module, args, out: normalized.append(out.numel()))
    with torch.no_grad(), use_backend("torch"), counter:
        model(*(inputs or one_sample(model)))
    counts = counter.get_flop_counts()
    root = type(model).__name__
    modules = {
        "" if name in ("Global", root) else name.removeprefix(f"{root}."): sum(by_operator.values())
        for name, by_operator in counts.items()
    }
    # Lists of modules are not called, only what they hold.
    for name, module in reversed(list(model.named_modules())):
        below = sum(modules.get(f"{name}.{child}", 0) for child, _ in module.named_children())
        modules[name] = modules.get(name, below)
    operators = {str(operator): int(n) for operator, n in counts.get("Global", {}).items()}
    return FlopCount(int(counter.get_total_flops()), modules, operators, sum(normalized))
