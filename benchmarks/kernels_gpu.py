"""The scan and the convolution on a GPU against their peers: correctness first, then medians of turns.

Beside this project's backends stand mamba-ssm's and causal-conv1d's compiled functions alone, fed channel-major tensors
that were transposed for them before the clock starts (the ``cuda_package`` backend transposes the scan's sequences
inside, and hands causal-conv1d a view where its kernels take one), and the published arrangement of a scan order: both
halves of the input gathered along it, the scan, its result scattered back. ``build_peers.py`` builds both packages.

The floor is the longest of three times: what must be read and written at the bandwidth of a measured copy, the
exponentials at 16 per clock and multiprocessor, the other arithmetic at 128. It is a paper number: part of the
exponentials can be computed as polynomials.

Legend: B batch, L tokens, E channels, N states.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from machine import Report
from scan_cases import LIMITS, Wrong, arguments, check, published_loop
from shapes import SHAPES
from torch import Tensor

import dis_causal_conv1d
import dis_mamba
from dis_causal_conv1d import causal_conv1d
from dis_mamba import selective_scan

# Beside the N exponentials of a state's decay: the step's softplus (two) and the gate's sigmoid.
EXPONENTIALS_PER_CHANNEL = 3
# Multiplications and additions of a state and its share of the output; in backward the states are made again first.
ARITHMETIC = {"forward": 6, "backward": 17}
STATES_EVERY = 64
PACKAGE_CONV = "causal-conv1d alone"
PEERS = {
    "scan": ("mamba-ssm alone", "cuda_package", "torch", "gather, scan, scatter"),
    "causal_conv1d": (PACKAGE_CONV, "cuda_package", "torch"),
}


@dataclass(frozen=True)
class Contender:
    """``finish(compute(**prepare(**arguments)))`` is the scan; only ``compute`` is timed."""

    name: str
    device: str
    compute: Callable[..., Tensor]
    prepare: Callable[..., dict[str, Tensor]] = dict
    finish: Callable[[Tensor], Tensor] = lambda out: out
    gradients: bool = True

    def run(self, **arguments) -> Tensor:
        return self.finish(self.compute(**self.prepare(**arguments)))


def contenders(device: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that run on ``device``, and why the others do not."""
    found, missing = [], {}
    for name in dis_mamba.available_backends():
        reason = refusal(name, device)
        if reason is not None:
            missing[name] = reason
        elif name != "reference":
            scan = partial(selective_scan, delta_softplus=True, backend=name)
            found.append(Contender(name, device, scan))
    found.append(Contender("published loop", device, published_loop, gradients=False))
    if "cuda_package" in missing:
        missing["mamba-ssm alone"] = missing["cuda_package"]
    else:
        found.append(Contender("mamba-ssm alone", device, package_scan, channel_major))
    fastest = next((c.name for c in found if c.name in ("cuda_package", "triton")), "torch")
    ordered = partial(gather_scan_scatter, backend=fastest)
    found.append(Contender("gather, scan, scatter", device, ordered, scattered, gathered))
    return found, missing


def refusal(backend: str, device: str) -> str | None:
    """Why a backend of the scan does not run on ``device``."""
    try:
        selective_scan(**arguments((1, 4, 8, 4), device=device), delta_softplus=True, backend=backend)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def channel_major(**given) -> dict[str, Tensor]:
    """What mamba-ssm's kernel takes: (B, E, L), and (B, 1, N, L) for B and C."""
    given = {k: v.transpose(1, 2).contiguous() if v.ndim == 3 else v for k, v in given.items()}
    return {k: v.unsqueeze(1) if k in "BC" else v for k, v in given.items()}


def package_scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """mamba-ssm's compiled module and nothing around it; the result is a view (B, L, E)."""
    return _PackageScan.apply(u, delta, A, B, C, D, z, delta_bias).transpose(1, 2)


class _PackageScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        import selective_scan_cuda  # pyright: ignore[reportMissingImports]

        y, states, gated = selective_scan_cuda.fwd(*tensors, True)
        ctx.save_for_backward(*tensors, states, y)
        return gated

    @staticmethod
    def backward(ctx, *grads):
        import selective_scan_cuda  # pyright: ignore[reportMissingImports]

        *tensors, states, y = ctx.saved_tensors
        found = selective_scan_cuda.bwd(*tensors, grads[0].contiguous(), states, y, None, True, False)
        du, ddelta, dA, dB, dC, dD, dbias, dz = found[:8]
        return du, ddelta, dA, dB.to(tensors[3].dtype), dC.to(tensors[4].dtype), dD, dz, dbias


@cache
def an_order(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An order and its inverse; made once, as a model keeps them."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length))
    return order.to(device), torch.argsort(order).to(device)


def scattered(u, z, **rest) -> dict[str, Tensor]:
    """u and z as one tensor, as the input projection leaves them, each token where its place in the order is."""
    _, inverse = an_order(u.shape[1], u.device)
    return {"xz": torch.cat([u, z], dim=-1)[:, inverse], **rest}


def gather_scan_scatter(xz, backend, **rest) -> Tensor:
    """The published arrangement: an index gathers both halves, another one scatters the result."""
    order, inverse = an_order(xz.shape[1], xz.device)
    u, z = xz[:, order].chunk(2, dim=-1)
    y = selective_scan(u=u, z=z, **rest, delta_softplus=True, backend=backend)
    return y[:, inverse]


def gathered(out: Tensor) -> Tensor:
    return out[:, an_order(out.shape[1], out.device)[0]]


class Clock:
    """Milliseconds of a call, caches cold: on a GPU by events, after a write as large as its second-level cache."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            size = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.flush = torch.empty(2 * size, dtype=torch.uint8, device=self.device)

    def __call__(self, function: Callable[[], object]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - began)
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def memory(self, function: Callable[[], object]) -> float | None:
        """MiB that a call needs above what is there before it; None where the device does not count."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def in_turns(clock: Clock, functions: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median milliseconds; all functions take turns."""
    for _ in range(3):
        for function in functions.values():
            function()
    each = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            each[name].append(clock(function))
    return {name: statistics.median(values) for name, values in each.items()}


def hardware_rates(device: str) -> dict[str, float] | None:
    """Bytes, exponentials and multiply-adds per millisecond; None where there is no GPU."""
    if torch.device(device).type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    clock_khz = getattr(found, "clock_rate", None) or 1_755_000
    source = torch.empty(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    milliseconds = in_turns(Clock(device), {"copy": lambda: target.copy_(source)}, 20)["copy"]
    per_clock = found.multi_processor_count * clock_khz
    return {
        "bytes": 2 * source.numel() * 4 / milliseconds,
        "exponentials": 16.0 * per_clock,
        "arithmetic": 128.0 * per_clock,
        "clock_khz": clock_khz,
    }


def floors(shape, dtype: torch.dtype, rates: dict[str, float]) -> dict[str, float]:
    """The least milliseconds of forward and backward at ``rates``."""
    B, L, E, N = shape
    sequence, narrow, states = B * L * E, B * L * N, B * L * E * N
    kept = 4 * B * (-(-L // STATES_EVERY) - 1) * E * N
    # forward reads u, delta, z, writes the output; backward reads those and a gradient, writes three.
    moved = {
        "forward": dtype.itemsize * (4 * sequence + 2 * narrow) + kept,
        "backward": dtype.itemsize * (7 * sequence + 4 * narrow) + kept,
    }
    exponentials = states + EXPONENTIALS_PER_CHANNEL * sequence
    return {
        kind: max(
            moved[kind] / rates["bytes"],
            exponentials / rates["exponentials"],
            ARITHMETIC[kind] * states / rates["arithmetic"],
        )
        for kind in moved
    }


def measure_scans(found: list[Contender], shape, dtype, device, turns, rates) -> dict:
    """Milliseconds, shares of the floor and MiB of every contender, forward and backward."""
    clock, cases = Clock(device), {}
    for contender in found:
        raw = {k: v.detach() for k, v in arguments(shape, dtype, device).items()}
        leaves = {k: v.detach().requires_grad_() for k, v in contender.prepare(**raw).items()}
        cases[contender.name] = (contender, leaves)

    def forward(contender, leaves):
        with torch.no_grad():
            contender.compute(**leaves)

    def whole(contender, leaves, weight):
        torch.autograd.grad(contender.compute(**leaves), list(leaves.values()), weight)

    forwards = {name: partial(forward, *case) for name, case in cases.items()}
    backwards, wholes = {}, {}
    for name, (contender, leaves) in cases.items():
        if not contender.gradients:
            continue
        out = contender.compute(**leaves)
        weight = torch.randn(shape[:3], device=device).to(out.dtype)
        backwards[name] = partial(torch.autograd.grad, out, list(leaves.values()), weight, retain_graph=True)
        wholes[name] = partial(whole, contender, leaves, weight)
    slow = {name: f for name, f in forwards.items() if name == "published loop"}
    fast = {name: f for name, f in forwards.items() if name not in slow}
    times = {
        "forward": {**in_turns(clock, fast, turns), **in_turns(clock, slow, 3)},
        "backward": in_turns(clock, backwards, turns),
    }
    floor = None if rates is None else floors(shape, dtype, rates)
    return {
        "milliseconds": times,
        "floor_milliseconds": floor,
        "share_of_floor": None
        if floor is None
        else {kind: {n: floor[kind] / ms for n, ms in each.items()} for kind, each in times.items()},
        "mib_forward_and_backward": {name: clock.memory(f) for name, f in wholes.items()},
    }


def convolutions() -> dict[str, Callable[..., Tensor]]:
    """Ways to convolve ``(x, weight, bias)`` with SiLU; ``x`` (B, L, E), for the package alone a view of (B, E, L)."""
    found = {
        name: partial(causal_conv1d, activation="silu", backend=name)
        for name in dis_causal_conv1d.available_backends()
    }
    return {**found, PACKAGE_CONV: lambda *tensors: _PackageConv.apply(*tensors).transpose(1, 2)}


class _PackageConv(torch.autograd.Function):
    """causal-conv1d's compiled functions and nothing around them; the result is (B, E, L)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        from causal_conv1d import cpp_functions  # pyright: ignore[reportMissingImports]

        ctx.save_for_backward(x, weight, bias)
        return cpp_functions.causal_conv1d_fwd_function(
            x.transpose(1, 2), weight, bias, None, None, None, True
        )

    @staticmethod
    def backward(ctx, *grads):
        from causal_conv1d import cpp_functions  # pyright: ignore[reportMissingImports]

        x, weight, bias = ctx.saved_tensors
        dx, dweight, dbias, *_ = cpp_functions.causal_conv1d_bwd_function(
            x.transpose(1, 2), weight, bias, grads[0].contiguous(), None, None, None, None, False, True
        )
        return dx.transpose(1, 2), dweight, dbias


def measure_convolutions(shape, dtype, device, turns, leave_out=()) -> dict:
    """Milliseconds of the convolution with SiLU, W = 4, forward and backward, for every way that is right here.

    ``missing`` says why a way does not run here, ``wrong`` by how much one that ran was off: it is not timed.
    """
    B, L, E, _ = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, L, E, generator=generator).to(device, dtype)
    weight, bias = (torch.randn(*s, generator=generator).to(device) for s in ((E, 4), (E,)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    defined = causal_conv1d(*exact, activation="silu", backend="reference")
    wanted = [defined.detach(), *torch.autograd.grad(defined, exact, torch.ones_like(defined))]
    limit = LIMITS[dtype][0]
    forwards, backwards, missing, wrong = {}, {}, {}, {}
    channel_first = [
        leaves[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        *leaves[1:],
    ]
    for name, convolve in convolutions().items():
        if name in leave_out:
            continue
        inputs = channel_first if name == PACKAGE_CONV else leaves
        try:
            out = convolve(*inputs)
        except (ImportError, RuntimeError, ValueError) as error:
            missing[name] = str(error)
            continue
        grad = torch.ones_like(out)
        found = [out, *torch.autograd.grad(out, inputs, grad, retain_graph=True)]
        for what, got, want in zip(("output", "x", "weight", "bias"), found, wanted, strict=True):
            error = ((got.detach().double() - want).abs().max() / want.abs().max()).item()
            if not error <= limit:
                wrong[name] = f"causal_conv1d, {name} at {shape}: {what} off by {error:.1e}, not timed"
                break
        if name in wrong:
            continue

        def forward(convolve=convolve, inputs=inputs):
            with torch.no_grad():
                convolve(*inputs)

        forwards[name] = forward
        backwards[name] = partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
    clock = Clock(device)
    return {
        "milliseconds": {
            "forward": in_turns(clock, forwards, turns),
            "backward": in_turns(clock, backwards, turns),
        },
        "missing": missing,
        "wrong": wrong,
    }


def sound(found: list[Contender], shape, dtype) -> tuple[list[Contender], dict[str, float], dict[str, str]]:
    """The contenders that are right at a shape, their errors as parts of what is allowed, and what is wrong."""
    errors, wrong = {}, {}
    for contender in found:
        try:
            errors[contender.name] = round(check(contender, shape, dtype), 4)
        except Wrong as error:
            wrong[contender.name] = str(error)
    return [contender for contender in found if contender.name in errors], errors, wrong


def over_triton(op: str, milliseconds: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times as long as the Triton kernel every peer takes."""
    return {
        f"{op}: {peer}, {kind}": each[peer] / each["triton"]
        for kind, each in milliseconds.items()
        for peer in PEERS[op]
        if peer in each and "triton" in each
    }


def measure(
    device: str,
    shapes=None,
    dtype=torch.bfloat16,
    turns: int = 30,
    report: Report | None = None,
    check_only: bool = False,
) -> dict:
    """Everything of this file, added to ``report`` and stored shape by shape.

    With ``check_only`` the scans are compared with their definition and nothing is timed.

    Raises:
        Wrong: a contender is wrong somewhere; it was not timed there, all others were.
    """
    found, missing = contenders(device)
    report = Report({}, None) if report is None else report
    rates = None if check_only else hardware_rates(device)
    report.update({"missing": missing, "rates_per_millisecond": rates, "shapes": {}})
    messages = []
    for shape in shapes or SHAPES:
        right, errors, wrong = sound(found, shape, dtype)
        row: dict = {"largest_error_over_allowed": errors, "wrong": wrong}
        if not check_only:
            row["scan"] = measure_scans(right, shape, dtype, device, turns, rates)
            row["causal_conv1d"] = measure_convolutions(shape, dtype, device, turns)
            for op in PEERS:
                ratios = over_triton(op, row[op]["milliseconds"])
                if ratios:
                    row.setdefault("peer_over_triton", {}).update(ratios)
            wrong = {**wrong, **row["causal_conv1d"].get("wrong", {})}
        messages += wrong.values()
        report["shapes"][str(shape)] = row
        report.save()
    if messages:
        raise Wrong("; ".join(messages))
    return report
