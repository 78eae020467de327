"""Stages of gpu.py on single kernels: each against float64, beside its peers, and twice for the same bits.

Legend: B batch, L tokens, E channels of a scan, D width of a token (E / 2), N states, W taps.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernels_gpu import (
    Clock,
    contenders,
    hardware_rates,
    in_turns,
    measure_convolutions,
    measure_scans,
    over_triton,
    sound,
)
from scan_cases import LIMITS, arguments
from torch import Tensor

from dis_causal_conv1d import causal_conv1d
from dis_kernels.tokenwise import add_norm_modulate, gated_add, tokenwise_backends
from dis_mamba import available_backends, selective_scan

TAPS = 4
HEAD = 64
# Of the largest value, by the dtype of the sequences: output and gradients of what runs on single tokens. The sums of
# weight and modulation run over every token of a batch.
TOKEN_LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2), torch.float16: (4e-3, 4e-3)}
# Bytes of float64 states that a piece of the definition holds, some seven times in its tape.
_PIECE = 2**31


def kernel_here() -> str:
    """The backend that is checked: Triton, on a GPU or interpreted; on a CPU whatever runs there stands for it."""
    on_gpu = torch.cuda.is_available() or available_backends()["triton"] is None
    return "triton" if on_gpu else "auto"


def check_scan(shape, dtype: str, reverse: bool, device: str) -> dict:
    """Output and all gradients of the scan at a shape (B, L, E, N) against the definition in float64."""
    kind = getattr(torch, dtype)
    inputs = arguments(shape, kind, device)
    weight = _weight(shape[:3], device)
    out = selective_scan(**inputs, delta_softplus=True, reverse=reverse, backend=kernel_here())
    grads = torch.autograd.grad(out, list(inputs.values()), weight.to(kind))
    got = {"output": out.detach(), **_gradients(inputs, grads)}
    return _verdict("selective_scan", dtype, got, exact_scan(inputs, weight, reverse), LIMITS[kind])


def exact_scan(inputs: dict[str, Tensor], weight: Tensor, reverse: bool) -> dict[str, Tensor]:
    """Output and gradients by the definition in float64, piece by piece, since its tape holds a state of every token.

    Channels and rows of the batch are scans of their own; only gradients of what they share are summed.
    """
    (batch, length, channels), states = inputs["u"].shape, inputs["A"].shape[1]
    of_row = 8 * length * channels * states
    rows = min(batch, max(1, _PIECE // of_row))
    width = channels if of_row <= _PIECE else max(1, channels * _PIECE // of_row)
    found = {"output": torch.empty_like(weight, dtype=torch.float64)}
    found |= {f"gradient of {k}": torch.zeros_like(v, dtype=torch.float64) for k, v in inputs.items()}
    for row in range(0, batch, rows):
        for first in range(0, channels, width):
            here = _places(slice(row, row + rows), slice(first, first + width))
            piece = {k: v.detach()[here[k]].double().requires_grad_() for k, v in inputs.items()}
            out = selective_scan(**piece, delta_softplus=True, reverse=reverse, backend="reference")
            found["output"][here["u"]] = out.detach()
            for name, grad in zip(
                piece, torch.autograd.grad(out, list(piece.values()), weight[here["u"]].double()), strict=True
            ):
                found[f"gradient of {name}"][here[name]] += grad
    return found


def _places(rows: slice, channels: slice) -> dict[str, tuple[slice, ...]]:
    every = slice(None)
    whole = dict.fromkeys(("u", "delta", "z"), (rows, every, channels))
    return {**whole, "B": (rows,), "C": (rows,), **dict.fromkeys(("A", "D", "delta_bias"), (channels,))}


def check_conv(shape, dtype: str, reverse: bool, device: str) -> dict:
    """Output and gradients of the convolution with SiLU at (B, L, E) against the definition in float64."""
    kind = getattr(torch, dtype)
    inputs = _conv_arguments(shape[:3], kind, device)
    weight = _weight(shape[:3], device)

    def run(backend, values, wide):
        out = causal_conv1d(**values, activation="silu", reverse=reverse, backend=backend)
        grads = torch.autograd.grad(out, list(values.values()), weight.to(wide))
        return {"output": out.detach(), **_gradients(values, grads)}

    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    got, want = run(kernel_here(), inputs, kind), run("reference", exact, torch.float64)
    limits = (LIMITS[kind][0], LIMITS[kind][0])
    return _verdict("causal_conv1d", dtype, got, want, limits)


def check_tokens(shape, dtype: str, stream: str, centered: bool, device: str) -> dict:
    """Add, norm, modulate, step along an order, and gate, step back, add, at (B, L, D), against torch in float64."""
    kind = getattr(torch, dtype)
    given = _token_arguments(shape, kind, getattr(torch, stream), device)
    got = _tokens(given, kernel_here(), kind, centered)
    exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    want = _tokens(exact, "torch", torch.float64, centered)
    return _verdict("tokenwise", dtype, got, want, TOKEN_LIMITS[kind])


def _tokens(values: dict[str, Tensor], backend: str, dtype: torch.dtype, centered: bool) -> dict[str, Tensor]:
    """Outputs and gradients of both operations, each from leaves of its own."""
    shape, device = values["residual"].shape, values["residual"].device
    order, inverse = _an_order(shape[1], device)
    read: dict[str, Any] = {name: values[name] for name in ("hidden", "residual", "weight", "shift", "scale")}
    write = {name: values[name] for name in ("base", "y", "gate")}
    x, normed, stream = add_norm_modulate(
        **read,
        order=order,
        inverse=inverse,
        centered=centered,
        keep_normed=True,
        dtype=dtype,
        backend=backend,
    )
    if normed is None:
        raise RuntimeError("add_norm_modulate returned no norm although keep_normed=True")
    added = gated_add(**write, order=inverse, inverse=order, backend=backend)
    found = {"read": x, "normed": normed, "stream": stream, "sum": added}
    grads = torch.autograd.grad(
        [x, normed, stream, added],
        [*read.values(), *write.values()],
        [_weight(shape, device, seed).to(out.dtype) for seed, out in enumerate((x, normed, stream, added))],
    )
    return {k: v.detach() for k, v in found.items()} | _gradients({**read, **write}, grads)


def _weight(shape, device: str | torch.device, seed: int = 7) -> Tensor:
    """What comes back from an output: exact in every dtype, so that all contenders get the same."""
    drawn = torch.randint(-8, 9, tuple(shape), generator=torch.Generator().manual_seed(seed))
    return (drawn / 8).to(device)


def _gradients(inputs: dict[str, Tensor], grads) -> dict[str, Tensor]:
    return {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def _verdict(op: str, dtype: str, got: dict[str, Tensor], want: dict[str, Tensor], limits) -> dict:
    """Errors of the largest value and relative to the root mean square; ``wrong`` names what is beyond its limit."""
    errors, wrong = {}, []
    for name, value in got.items():
        limit = limits[name.startswith("gradient")]
        difference = value.double() - want[name]
        of_max = (difference.abs().max() / want[name].abs().max().clamp_min(1e-30)).item()
        of_rms = (difference.square().mean() / want[name].square().mean().clamp_min(1e-60)).sqrt().item()
        errors[name] = {"of_max": plain(of_max), "of_rms": plain(of_rms), "allowed": limit}
        if not of_max <= limit:
            wrong.append(f"{name} is off by {of_max:.1e} of its largest value, {limit:.0e} allowed")
    worst = max(
        each["of_max"] / each["allowed"] if each["of_max"] is not None else 1e9 for each in errors.values()
    )
    return {"operator": op, "dtype": dtype, "worst_over_allowed": worst, "errors": errors, "wrong": wrong}


def plain(value: float) -> float | None:
    """Three digits, as JSON has them; None for what is no number."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _conv_arguments(shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {"x": shape, "weight": (shape[2], TAPS), "bias": (shape[2],)}
    values = {k: torch.randn(*size, generator=generator).to(device) for k, size in drawn.items()}
    values["x"] = values["x"].to(dtype)
    return {name: value.requires_grad_() for name, value in values.items()}


def _token_arguments(shape, dtype: torch.dtype, stream: torch.dtype, device: str) -> dict[str, Tensor]:
    B, L, D = shape
    generator = torch.Generator().manual_seed(0)
    kinds = {
        "hidden": ((B, L, D), dtype), "residual": ((B, L, D), stream), "weight": ((D,), torch.float32),
        "shift": ((B, D), dtype), "scale": ((B, D), dtype), "base": ((B, L, D), stream), "y": ((B, L, D), dtype),
        "gate": ((B, D), dtype),
    }  # fmt: skip
    return {
        name: torch.randn(*size, generator=generator).to(device, kind).requires_grad_()
        for name, (size, kind) in kinds.items()
    }


def _an_order(length: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length)).to(device)
    return order, order.argsort()


def time_scan(shape, dtype: str, turns: int, refused: dict[str, str], device: str) -> dict:
    """The scan beside its peers; who is wrong, here or in the first stage (``refused``), is reported and not timed."""
    kind = getattr(torch, dtype)
    found, missing = contenders(device)
    right, errors, wrong = sound([c for c in found if c.name not in refused], shape, kind)
    row = measure_scans(right, shape, kind, device, turns, hardware_rates(device))
    return {
        **row,
        "largest_error_over_allowed": errors,
        "missing": missing,
        "not_timed": {**refused, **wrong},
        "peer_over_triton": over_triton("scan", row["milliseconds"]),
    }


def time_conv(shape, dtype: str, turns: int, refused: dict[str, str], device: str) -> dict:
    """The convolution beside its peers."""
    row = measure_convolutions(shape, getattr(torch, dtype), device, turns, leave_out=tuple(refused))
    not_timed = {**refused, **row.pop("wrong")}
    ratios = over_triton("causal_conv1d", row["milliseconds"])
    return {**row, "not_timed": not_timed, "peer_over_triton": ratios}


def time_tokens(shape, dtype: str, turns: int, refused: dict[str, str], compiler: str, device: str) -> dict:
    """Read and write around a mixer: one kernel each, operator after operator, and fused by torch.compile."""
    kind = getattr(torch, dtype)
    values = _token_arguments(shape, kind, torch.float32, device)
    order, inverse = _an_order(shape[1], device)
    names = [
        name for name, reason in _tokenwise_backends(device).items() if reason is None and name not in refused
    ]
    ways: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        name: partial(_read_and_write, backend=name) for name in names
    }
    ways["torch, compiled"] = torch.compile(
        partial(_read_and_write, backend="torch"), fullgraph=True, backend=compiler
    )
    forwards, backwards = {}, {}
    for name, way in ways.items():
        outs = way(values, order, inverse)
        weights = [torch.ones_like(out) for out in outs]
        leaves = list(values.values())

        def forward(way=way):
            with torch.no_grad():
                way(values, order, inverse)

        forwards[name] = forward
        backwards[name] = partial(torch.autograd.grad, outs, leaves, weights, retain_graph=True)
    clock = Clock(device)
    milliseconds = {
        "forward": in_turns(clock, forwards, turns),
        "backward": in_turns(clock, backwards, turns),
    }
    # What must be read and written at least, in bytes: float32 streams and sequences of the dtype.
    elements, wide, narrow = math.prod(shape), 4, kind.itemsize
    moved = {"forward": elements * (4 * wide + 3 * narrow), "backward": elements * (4 * wide + 5 * narrow)}
    rates = hardware_rates(device)
    floor = None if rates is None else {k: v / rates["bytes"] for k, v in moved.items()}
    return {"milliseconds": milliseconds, "floor_milliseconds": floor, "not_timed": refused}


def _tokenwise_backends(device: str) -> dict[str, str | None]:
    """Why a backend does not take a call on this device, or None."""
    x = torch.ones(1, 2, 4, device=device)
    found = tokenwise_backends()
    for name in found:
        try:
            gated_add(x, x, x[:, 0], backend=name)
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


def _read_and_write(values, order, inverse, backend):
    read = {name: values[name] for name in ("hidden", "residual", "weight", "shift", "scale")}
    x, _, stream = add_norm_modulate(**read, order=order, inverse=inverse, backend=backend)
    return x, stream, gated_add(values["base"], values["y"], values["gate"], inverse, order, backend=backend)


def time_attention(shape, dtype: str, turns: int, refused: dict[str, str], device: str) -> dict:
    """What stands where a scan of E channels stands in a transformer: torch's attention, D = E / 2, heads of 64."""
    B, L, E, _ = shape
    heads = max(1, E // 2 // HEAD)
    generator = torch.Generator().manual_seed(0)
    query, key, value = given = [
        torch.randn(B, heads, L, min(HEAD, E // 2), generator=generator)
        .to(device, getattr(torch, dtype))
        .requires_grad_()
        for _ in range(3)
    ]

    def forward():
        with torch.no_grad():
            F.scaled_dot_product_attention(query, key, value)

    out = F.scaled_dot_product_attention(query, key, value)
    backward = partial(torch.autograd.grad, out, given, torch.ones_like(out), retain_graph=True)
    clock = Clock(device)
    times = {
        kind: in_turns(clock, {"attention": f}, turns)
        for kind, f in (("forward", forward), ("backward", backward))
    }
    return {"milliseconds": times, "heads": heads, "not_timed": {}}


def bits_of_kernels(shape, dtype: str, device: str) -> dict:
    """Digests of outputs and gradients of every operation, to be compared with those of another run."""
    kind = getattr(torch, dtype)
    B, L, E, _ = shape
    backend, weight = kernel_here(), _weight(shape[:3], device).to(kind)
    found = {}
    for reverse in (False, True):
        way = "reversed" if reverse else "forward"
        given = arguments(shape, kind, device)
        out = selective_scan(**given, delta_softplus=True, reverse=reverse, backend=backend)
        found[f"selective_scan, {way}"] = digest(
            [out, *torch.autograd.grad(out, list(given.values()), weight)]
        )
        taken = _conv_arguments((B, L, E), kind, device)
        out = causal_conv1d(**taken, activation="silu", reverse=reverse, backend=backend)
        found[f"causal_conv1d, {way}"] = digest(
            [out, *torch.autograd.grad(out, list(taken.values()), weight)]
        )
    values = _token_arguments((B, L, max(1, E // 2)), kind, torch.float32, device)
    found["tokenwise"] = digest(_tokens(values, backend, kind, False).values())
    return found


def digest(tensors) -> str:
    """A hash of the bits."""
    made = hashlib.sha256()
    for tensor in _on_cpu(tensors):
        made.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:16]


def _on_cpu(tensors) -> Iterator[Tensor]:
    for tensor in tensors:
        yield tensor.detach().reshape(-1).cpu()
