"""The selective scan and the mixer against their peers, in one process: correctness first, then interleaved timings.

A contender whose output or gradients are wrong stops the run (on a GPU it is left out and ends the run with an error):
nothing wrong is timed. Every round times
every contender once; the least of all rounds counts, since other programs can only add to it. Peers that are not
installed are named and left out (mambapy 1.2: pip install mambapy).

    python benchmarks/kernels.py --threads 2 --output benchmarks/results/kernels_cpu.json
    python benchmarks/kernels.py --device cuda --output benchmarks/results/kernels_h200.json    # kernels_gpu.py
"""

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kernels_gpu
import torch
import torch.nn.functional as F
from machine import Report, chosen_device, circumstances
from scan_cases import arguments, check, published_loop
from torch import Tensor

import dis_mamba
from dis_kernels.native import NativeError, NativeLibrary, compiler, compiler_version, parallel_address
from dis_mamba import MambaMixer, selective_scan
from zigflow.engine.freed_memory import keep_freed_memory

SHAPES = {"cpu": [(8, 64, 256, 16), (4, 256, 1536, 16), (1, 1024, 1536, 16)]}


@dataclass(frozen=True)
class Contender:
    """A way to compute the scan: ``run(**arguments)`` with softplus on the step. ``gradients``: time those too."""

    name: str
    device: str
    run: Callable[..., Tensor]
    gradients: bool = True


def contenders(device: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that run on ``device``, and why the others do not."""
    found, missing = [], {}
    for name, reason in dis_mamba.available_backends().items():
        if reason is not None:
            missing[name] = reason
            continue

        def ours(backend=name, **arguments):
            return selective_scan(**arguments, delta_softplus=True, backend=backend)

        # The reference is timed forward only: its tape holds a state for every token.
        found.append(Contender(name, device, ours, gradients=name != "reference"))
    found.append(Contender("published loop", device, published_loop, gradients=False))
    if device == "cpu":
        try:
            from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            missing["mambapy"] = str(error)
        else:
            found.append(Contender("mambapy", device, lambda **arguments: mambapy_scan(pscan, **arguments)))
    return found, missing


def mambapy_scan(pscan, u, delta, A, B, C, D, z, delta_bias):
    """The scan as mambapy's block computes it around its ``pscan``."""
    dt = F.softplus(delta + delta_bias)
    decay = torch.exp(dt.unsqueeze(-1) * A)
    drive = dt.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    states = pscan(decay, drive)
    return ((states @ C.unsqueeze(-1)).squeeze(3) + D * u) * F.silu(z)


def interleaved(functions: Mapping[str, Callable[[], object]], seconds: float, least_rounds: int = 5):
    """Least milliseconds of every function over rounds in which each runs once."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    start, rounds = time.perf_counter(), 0
    while rounds < least_rounds or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
        rounds += 1
    return best


def saved_share(run, values) -> float:
    """Bytes that a forward pass keeps for backward beside its arguments, over those of one activation."""
    mine = {value.untyped_storage().data_ptr() for value in values.values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(**values)
    return sum(kept.values()) / (out.numel() * out.element_size())


def roof(threads: int) -> dict[str, float]:
    """States per nanosecond of the scan's arithmetic in registers, on ``threads`` threads."""
    function = NativeLibrary(Path(__file__).parent / "roof.cpp").load().zigflow_roof
    function.argtypes, function.restype = [ctypes.c_int64] * 4, ctypes.c_int64
    found = {}
    for name, backward in (("forward", 0), ("backward", 1)):
        best = 0.0
        for _ in range(300):
            began = time.perf_counter_ns()
            states = function(parallel_address(), threads, 10000, backward) * threads
            best = max(best, states / (time.perf_counter_ns() - began))
        found[name] = best
    return found


def time_scans(found: list[Contender], shape, seconds: float) -> dict:
    values = {c.name: arguments(shape, device=c.device) for c in found}
    weight = torch.randn(shape[:3])

    def forward(contender):
        with torch.no_grad():
            contender.run(**values[contender.name])

    def both(contender):
        leaves = values[contender.name]
        torch.autograd.grad(contender.run(**leaves), list(leaves.values()), weight)

    fast = [c for c in found if c.name == "cpu"]
    slow = [c for c in found if c.name != "cpu"]
    result = {}
    for kind, function, some in (
        ("forward", forward, (fast, slow)),
        ("forward and backward", both, (fast, [c for c in slow if c.gradients])),
    ):
        names = {c.name: partial(function, c) for group in some for c in group}
        best = interleaved(names, seconds)
        # What lasts a millisecond is disturbed more than what lasts a second, and is given more rounds.
        more = interleaved({c.name: partial(function, c) for c in fast}, seconds / 2, 50)
        result[kind] = {name: min(ms, more.get(name, ms)) for name, ms in best.items()}
    result["saved / activation"] = {c.name: saved_share(c.run, values[c.name]) for c in found if c.gradients}
    half = arguments(shape, torch.bfloat16)
    ours = [c for c in found if c.name in ("cpu", "torch")]
    result["saved / activation, bfloat16"] = {c.name: saved_share(c.run, half) for c in ours}
    return result


def time_mixers(backends: list[str], shape, seconds: float) -> dict:
    """Whole mixers, and their own matrix products alone, forward and backward."""
    batch, length, channels, states = shape
    width = channels // 2
    x = torch.randn(batch, length, width, requires_grad=True)
    weight = torch.randn(batch, length, width)
    functions = {}
    rank = MambaMixer(width, d_state=states, device="meta").dt_rank
    for backend in backends:
        mixer = MambaMixer(width, d_state=states, backend=backend)
        leaves = [x, *mixer.parameters()]
        functions[backend] = lambda mixer=mixer, leaves=leaves: torch.autograd.grad(mixer(x), leaves, weight)
    products = [
        (torch.randn(batch * length, i, requires_grad=True), torch.randn(o, i, requires_grad=True))
        for i, o in (
            (width, 2 * channels),
            (channels, rank + 2 * states),
            (rank, channels),
            (channels, width),
        )
    ]
    outputs = [torch.randn(batch * length, w.shape[0]) for _, w in products]

    def matrix_products():
        for (a, w), g in zip(products, outputs, strict=True):
            torch.autograd.grad(F.linear(a, w), (a, w), g)

    return interleaved({"matrix products": matrix_products, **functions}, seconds, 20)


def ratios(scan: dict, mixer: dict, shape, roofs: dict[str, float]) -> dict:
    """What the targets speak of."""
    forward, both = scan["forward"], scan["forward and backward"]
    states = shape[0] * shape[1] * shape[2] * shape[3]
    found = {
        "forward over reference": forward["reference"] / forward["cpu"],
        "forward over the published loop": forward["published loop"] / forward["cpu"],
    }
    if "mambapy" in both:
        found["forward and backward over mambapy"] = both["mambapy"] / both["cpu"]
        found["torch: forward and backward over mambapy"] = both["mambapy"] / both["torch"]
    found["mixer over its matrix products"] = mixer["cpu"] / mixer["matrix products"]
    found["share of the roof, forward"] = states / (1e6 * forward["cpu"]) / roofs["forward"]
    found["share of the roof, backward"] = states / (1e6 * (both["cpu"] - forward["cpu"])) / roofs["backward"]
    return found


def packages() -> dict:
    """Versions of what the comparison depends on."""
    try:
        found = {"compiler": compiler_version(tuple(compiler())).splitlines()[0]}
    except NativeError as error:
        found = {"compiler": f"none: {error}"}
    for name in ("triton", "mambapy", "mamba-ssm", "causal-conv1d"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each comparison at each shape")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument(
        "--keep-freed-memory", action="store_true",
        help="for all contenders: glibc keeps what is freed, as in a training on a CPU",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = chosen_device(options.device).type
    start = {**circumstances(device, options.note), "packages": packages()}
    if device == "cuda":
        with Report(start, options.output) as report:
            kernels_gpu.measure(device, report=report, check_only=options.check_only)
        return
    found, missing = contenders("cpu")
    if "cpu" in missing:
        raise SystemExit(f"the cpu backend cannot run here: {missing['cpu']}")
    for shape in SHAPES["cpu"]:
        checks = {c.name: check(c, shape) for c in found}
        print(f"{shape}: correct; largest error / allowed { ({k: round(v, 4) for k, v in checks.items()}) }")
    if options.check_only:
        return
    start["freed_memory_stays"] = options.keep_freed_memory and keep_freed_memory()
    with Report({**start, "missing": missing, "shapes": {}}, options.output) as report:
        for shape in SHAPES["cpu"]:
            roofs = roof(options.threads)
            scan = time_scans(found, shape, options.seconds)
            mixer = time_mixers(["cpu", "torch"], shape, options.seconds)
            row = {
                "scan, ms": scan,
                "mixer forward and backward, ms": mixer,
                "roof, states/ns": roofs,
                "ratios": ratios(scan, mixer, shape, roofs),
            }
            report["shapes"][str(shape)] = row
            report.save()
            print(json.dumps({str(shape): row["ratios"]}, indent=1))


if __name__ == "__main__":
    main()
