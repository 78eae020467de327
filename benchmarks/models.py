"""A whole ZigMa step: images per second, step time, peak memory and utilization, in training and inference.

Three arrangements of one model: `ours` gathers along the scan order at the block's edge, at width D; `published`
gathers and scatters inside the mixer, at widths 2E and E, as the published code does; `none` walks the raster, without
any order. Each eager and with compiled blocks, ours under each checkpoint policy too (compiled at `--size full` alone).
Beside them stand DiS, DiM, DiT and U-ViT at the same width, patches and number of parameters (`peers.py`). They
all take turns and medians count; a ratio is the median of the turns' ratios. Before anything is timed, outputs and
gradients of the arrangements are compared, and a difference stops the run.

    python benchmarks/models.py --output benchmarks/results/models_cpu.json
    python benchmarks/models.py --size full --output benchmarks/results/models_h200.json      # on a GPU
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import circumstances
from peers import PEERS, PublishedMixer, build_peer, parameters

import dis_mamba
from dis_causal_conv1d.backends import CONV
from dis_causal_conv1d.backends.call import ConvCall
from dis_mamba.backends import SCAN
from dis_mamba.backends.call import ScanCall
from model_zigma import ZigMa
from zigflow.engine.ema import EmaProfile, EmaProfiles
from zigflow.engine.optim import build_optimizer
from zigflow.engine.peak import peak_flops
from zigflow.nn.flops import TRAINING_FACTOR, count_flops

SCAN_TYPE = "zigzagN8"
ARRANGEMENTS = ("ours", "published", "none")
# Relative root mean square of a difference from the eager model: (output, gradients).
LIMITS = {"no": (1e-4, 1e-3), "bf16": (2e-2, 1e-1)}


class Setting(NamedTuple):
    """A model and its input; ``side`` of the latents, 8 pixels each."""

    name: str
    width: int
    depth: int
    patch: int
    side: int
    batch: int

    @property
    def tokens(self):
        return (self.side // self.patch) ** 2


def _full():
    # As many tokens in every batch.
    rows = [("ZigMa-B/1", 1, 256)] + [("ZigMa-B/2", 2, pixels) for pixels in (256, 512, 1024, 2048)]
    for name, patch, pixels in rows:
        side = pixels // 8
        yield Setting(f"{name} {pixels} px", 768, 24, patch, side, 16 * 1024 // (side // patch) ** 2)


SIZES = {
    "tiny": [Setting("width 32, depth 2, 16 tokens", 32, 2, 1, 4, 2)],
    "small": [
        Setting(f"width 256, depth 4, {side**2} tokens", 256, 4, 1, side, max(1, 2048 // side**2))
        for side in (16, 32, 64, 128)
    ],
    "full": list(_full()),
}


class Difference(RuntimeError):
    """Two arrangements that must agree do not, or the order makes no difference."""


class Case:
    """One arrangement in one mode under one checkpoint policy, with an optimizer and averages of its own."""

    def __init__(self, setting, arrangement, mode, policy, state, options):
        self.arrangement, self.mode, self.policy = arrangement, mode, policy
        self.setting, self.device, self.precision = setting, options.device, options.precision
        self.model = build(setting, arrangement, options.backend, options.device)
        if arrangement in ARRANGEMENTS:
            self.model.load_state_dict(state)
        self.model.set_checkpoint_policy(policy)
        if mode == "compiled":
            self.model.compile_blocks()
        self.optimizer = build_optimizer("adamw", self.model, lr=1e-5, weight_decay=0.0)
        self.averages = EmaProfiles(self.model, [EmaProfile("rate", rate=0.9999)])
        generator = torch.Generator().manual_seed(1)
        shape = (setting.batch, 4, setting.side, setting.side)
        self.x, self.target = (torch.randn(shape, generator=generator).to(options.device) for _ in range(2))
        self.t = torch.rand(setting.batch, generator=generator).to(options.device)
        self.seen = 0
        self.seconds = {"train": [], "inference": []}
        self.memory = {}

    def predict(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(self.x, self.t)

    def backward(self):
        """The prediction, and the gradients in place."""
        self.model.train()
        out = self.predict()
        F.mse_loss(out.float(), self.target).backward()
        return out.detach()

    def train(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update(self.seen, self.setting.batch)
        self.seen += self.setting.batch

    def inference(self):
        self.model.eval()
        with torch.no_grad():
            self.predict()

    def values(self):
        """Output and gradients, to be compared; the weights stay."""
        out = self.backward()
        weights = dict(self.model.named_parameters())
        names = ("x_embedder.proj.weight", "blocks.0.mixer.in_proj.weight", "blocks.0.mixer.A_log")
        found = {"output": out, **{f"gradient of {name}": weights[name].grad.clone() for name in names}}
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        with torch.no_grad():
            found["output in inference"] = self.predict()
        return found

    def state_bytes(self):
        """Of weights, moments and averages."""
        # The averages are as large as the float32 weights.
        tensors = 2 * [*self.model.parameters()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def build(setting, arrangement, backend, device):
    options = {
        "in_channels": 4, "embed_dim": setting.width, "depth": setting.depth, "img_dim": setting.side,
        "patch_size": setting.patch, "drop_path_rate": 0.0, "ssm_cfg": {"backend": backend}, "device": device,
    }  # fmt: skip
    if arrangement in PEERS:
        wanted = parameters(build(setting, "none", backend, torch.device("meta")))
        return build_peer(
            arrangement, wanted, width=setting.width, patch=setting.patch, side=setting.side, backend=backend,
            device=device,
        )  # fmt: skip
    if arrangement != "published":
        return ZigMa(scan_type=SCAN_TYPE if arrangement == "ours" else "v1", **options)
    ordered = ZigMa(scan_type=SCAN_TYPE, **{**options, "device": "cpu", "embed_dim": 16})
    orders = iter([(w.order, w.undo) for w in ordered._walks(ordered.grid, torch.device("cpu"))])

    def mixer(*args, **given):
        order, inverse = (index.clone().to(device) for index in next(orders))
        return PublishedMixer(*args, order=order, inverse=inverse, **given)

    return ZigMa(scan_type="v1", mixer=mixer, **options)


def weights_of(setting, options):
    """Weights for all cases: what training starts at zero is drawn, or no block would do anything."""
    torch.manual_seed(0)
    state = build(setting, "ours", "auto", torch.device("cpu")).state_dict()
    for value in state.values():
        if value.is_floating_point() and not value.any():
            value.normal_(std=0.1)
    return {name: value.to(options.device) for name, value in state.items()}


def check(cases, precision):
    """Raise Difference unless every case computes what its eager peer does, and the order matters."""
    first = {c.arrangement: c for c in reversed(cases)}
    ours, plain = (first[name].values() for name in ("ours", "none"))
    for case in cases:
        want = plain if case.arrangement == "none" else ours
        for name, value in case.values().items():
            limit = LIMITS[precision]["gradient" in name]
            error = relative(value, want[name])
            if not error <= limit:
                raise Difference(
                    f"{case.setting.name}: {case.arrangement}, {case.mode}, checkpoint policy {case.policy}: "
                    f"the {name} differs by {error:.2e} of its size, {limit:.0e} allowed: not timed"
                )
    if relative(ours["output"], plain["output"]) < 10 * LIMITS[precision][0]:
        raise Difference(f"{cases[0].setting.name}: the output does not depend on the scan order: not timed")


def relative(value, want):
    value, want = value.double(), want.double()
    return float((value - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30))


def peak_bytes(device, function):
    """The most memory that a call needs above what is there before it; on a CPU of the process, or None."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except (OSError, KeyError):
        return None


def _status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(
        {name: rest for name, _, rest in (line.partition(":") for line in lines)}[key].split()[0]
    )


def turn(case, kind, steps):
    wait = torch.cuda.synchronize if case.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        getattr(case, kind)()
    wait()
    return (time.perf_counter() - started) / steps


def measure(setting, options):
    state = weights_of(setting, options)
    wanted = [(a, m, "none") for m in options.modes for a in (*ARRANGEMENTS, *PEERS)]
    # Compilation takes a CPU most of the run: there, policies are compared eager.
    modes = options.modes if options.size == "full" else [m for m in options.modes if m == "eager"]
    wanted += [("ours", m, p) for m in modes for p in ("block", "selective")]
    cases = [Case(setting, *names, state, options) for names in wanted]
    check([case for case in cases if case.arrangement in ARRANGEMENTS], options.precision)
    for case in cases:
        for kind in ("train", "inference"):
            turn(case, kind, options.warmup)
            case.memory[kind] = peak_bytes(case.device, getattr(case, kind))
    for round_ in range(options.repeats):
        # Whoever comes first in a round does not always.
        for case in cases[round_ % len(cases) :] + cases[: round_ % len(cases)]:
            case.seconds["train"].append(turn(case, "train", options.steps))
            if case.policy == "none":
                case.seconds["inference"].append(turn(case, "inference", options.steps))
    operations = {
        name: setting.batch * count_flops(build(setting, name, "auto", torch.device("meta"))).forward
        for name in ("ours", *PEERS)
    }
    return {
        **setting._asdict(),
        "tokens": setting.tokens,
        "forward_gflop_per_image": {n: round(v / setting.batch / 1e9, 3) for n, v in operations.items()},
        "rows": [
            row(case, operations.get(case.arrangement, operations["ours"]), options.peak) for case in cases
        ],
        "with_order_over_none": ratios(cases, "ours", "none"),
        "published_over_ours": ratios(cases, "published", "ours"),
        **{f"{name}_over_ours": ratios(cases, name, "ours") for name in PEERS},
    }


def row(case, operations, peak):
    found = {
        "arrangement": case.arrangement,
        "parameters": parameters(case.model),
        "mode": case.mode,
        "checkpoint_policy": case.policy,
    }
    for kind, seconds in case.seconds.items():
        if seconds:
            median = statistics.median(seconds)
            work = operations * (TRAINING_FACTOR if kind == "train" else 1)
            memory = case.memory[kind]
            found[kind] = {
                "step_ms": round(1e3 * median, 3),
                "images_per_second": round(case.setting.batch / median, 2),
                "mfu": None if peak is None else round(work / median / peak, 4),
                "peak_mib_above_state": None if memory is None else round(memory / 2**20, 1),
            }
    found["state_mib"] = round(case.state_bytes() / 2**20, 1)
    return found


def ratios(cases, over, under):
    found = {}
    for mode in dict.fromkeys(case.mode for case in cases):
        pair = [
            next(c for c in cases if (c.arrangement, c.mode, c.policy) == (name, mode, "none"))
            for name in (over, under)
        ]
        for kind in ("train", "inference"):
            each = sorted(a / b for a, b in zip(*(case.seconds[kind] for case in pair), strict=True))
            median, least, most = (round(v, 4) for v in (statistics.median(each), each[0], each[-1]))
            found[f"{mode} {kind}"] = {"median": median, "range": [least, most]}
    return found


def backends(options):
    """The backends that take the model's calls here."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    u = torch.ones(1, 4, 8, dtype=dtype, device=options.device)
    E = torch.ones(8, device=options.device)
    scan = ScanCall(u, u, -E[:, None].expand(8, 8), u, u, E, u, E, True, False)
    conv = ConvCall(u, torch.ones(8, 4, device=options.device), E, True, False)
    return {
        "selective_scan": SCAN.select(scan, options.backend).name,
        "causal_conv1d": CONV.select(conv, options.backend).name,
    }


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ["auto", *dis_mamba.available_backends()]
    parser.add_argument("--size", choices=SIZES, help="full where there is a GPU, else small")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--precision", choices=LIMITS, help="bf16 on a GPU, else no")
    parser.add_argument("--backend", choices=known, default="auto")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), help="both on a GPU, else eager")
    parser.add_argument("--repeats", type=int, default=9, help="turns of every case")
    parser.add_argument("--steps", type=int, help="steps in a turn; 5 on a GPU, else 1")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own number by default")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = given.device.type == "cuda"
    given.size = given.size or ("full" if on_gpu else "small")
    given.precision = given.precision or ("bf16" if on_gpu else "no")
    # A CPU compiles for longer than all the rest takes.
    given.modes = given.modes or (["eager", "compiled"] if on_gpu else ["eager"])
    given.steps = given.steps or (5 if on_gpu else 1)
    return given


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    # One code object serves every case's blocks.
    torch._dynamo.config.recompile_limit = 64
    options.peak = peak_flops(options.device, options.precision)
    report = {
        **circumstances(options.device, options.note),
        "precision": options.precision,
        "backends": backends(options),
        "peak_tflop_per_second": None if options.peak is None else round(options.peak / 1e12, 3),
        "what": "medians of turns that the cases take one after another; train: forward, backward, AdamW and averages; "
        "ratios: median and range of the turns' ratios; target: with_order_over_none at most 1.03",
        "settings": [],
    }
    for setting in SIZES[options.size]:
        try:
            report["settings"].append(measure(setting, options))
        except torch.OutOfMemoryError as error:
            report["settings"].append({**setting._asdict(), "error": str(error).splitlines()[0]})
        except Difference as error:
            sys.exit(str(error))
        gc.collect()
        torch._dynamo.reset()
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
