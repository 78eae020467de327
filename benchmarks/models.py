"""A whole ZigMa step: images per second, step time, peak memory and utilization, in training and inference.

Three arrangements of one model: `ours` gathers along the scan order at the block's edge, at width D; `published`
gathers and scatters inside the mixer, at widths 2E and E, as the published code does; `none` walks the raster, without
any order. Each eager and with compiled blocks, ours under each checkpoint policy too; a CPU compiles a part of them.
Beside them stand DiS, DiM, DiT and U-ViT at the same width, patches and number of parameters (`peers.py`). They
all take turns and medians count; a ratio is the median of the turns' ratios. Before anything is timed, outputs and
gradients of the arrangements are compared, and a difference stops the run. Results are stored setting by setting.

With `--profile`, nothing is compared and a table accounts for the time of a training step instead (`step_profile.py`).

    python benchmarks/models.py --output benchmarks/results/models_cpu.json
    python benchmarks/models.py --size full --output benchmarks/results/models_h200.json      # on a GPU
    python benchmarks/models.py --size full --only B/1 --profile ours --output benchmarks/results/step_h200.json
"""

import argparse
import gc
import statistics
from pathlib import Path

import torch
import torch._inductor.config
from cases import ARRANGEMENTS, LIMITS, SIZES, Case, build, check, turn, weights_of
from machine import Report, chosen_device, circumstances
from peak_memory import peak_bytes
from peers import PEERS, parameters
from step_profile import profiled, text_of

import dis_mamba
from zigflow.engine.freed_memory import keep_freed_memory
from zigflow.engine.peak import peak_flops
from zigflow.nn.flops import TRAINING_FACTOR, count_flops
from zigflow.tools.doctor import model_calls

# A CPU takes tens of seconds for each: these alone, without checkpoints, at no more tokens than this.
COMPILED_ON_CPU, COMPILED_TOKENS = ("ours", "none", "dit"), 1024
# Seconds of a step from which on a few turns must do.
SLOW, SLOW_TURNS = 5.0, 2


def combinations(setting, options):
    """(Arrangement, mode, checkpoint policy) of every case; on a CPU not all are worth their compilation."""
    every = [
        *((name, mode, "none") for mode in options.modes for name in (*ARRANGEMENTS, *PEERS)),
        *(("ours", mode, policy) for mode in options.modes for policy in ("block", "selective")),
    ]
    if options.device.type == "cuda":
        return every
    return [
        (name, mode, policy)
        for name, mode, policy in every
        if mode == "eager"
        or (name in COMPILED_ON_CPU and policy == "none" and setting.tokens <= COMPILED_TOKENS)
    ]


def measure(setting, options):
    state = weights_of(setting, options)
    cases = [Case(setting, *names, state, options) for names in combinations(setting, options)]
    check([case for case in cases if case.arrangement in ARRANGEMENTS], options.precision)
    for case in cases:
        case.turns = options.repeats
        for kind in case.seconds:
            # Compilation is in the first turn of the others.
            settled = case.mode == "eager" and case.device.type == "cpu"
            if turn(case, kind, 1) > SLOW and settled:
                case.turns = min(SLOW_TURNS, options.repeats)
            elif options.warmup > 1:
                turn(case, kind, options.warmup - 1)
            case.memory[kind] = peak_bytes(case.device, getattr(case, kind))
    for round_ in range(options.repeats):
        # Whoever comes first in a round does not always.
        for case in cases[round_ % len(cases) :] + cases[: round_ % len(cases)]:
            if round_ < case.turns:
                for kind, seconds in case.seconds.items():
                    seconds.append(turn(case, kind, options.steps))
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
        median = statistics.median(seconds)
        work = operations * (TRAINING_FACTOR if kind == "train" else 1)
        found[kind] = {
            "step_ms": round(1e3 * median, 3),
            "turns": len(seconds),
            "images_per_second": round(case.setting.batch / median, 2),
            "mfu": None if peak is None else round(work / median / peak, 4),
            "peak_mib_above_state": round(case.memory[kind] / 2**20, 1),
        }
    found["state_mib"] = round(case.state_bytes() / 2**20, 1)
    return found


def ratios(cases, over, under):
    found, plain = {}, {(c.arrangement, c.mode): c.seconds for c in cases if c.policy == "none"}
    for mode in dict.fromkeys(mode for _, mode in plain):
        if (over, mode) not in plain or (under, mode) not in plain:
            continue
        for kind in ("train", "inference"):
            # Who takes fewer turns takes them in the first rounds.
            pairs = zip(plain[over, mode][kind], plain[under, mode][kind], strict=False)
            each = sorted(a / b for a, b in pairs)
            median, least, most = (round(v, 4) for v in (statistics.median(each), each[0], each[-1]))
            found[f"{mode} {kind}"] = {"median": median, "range": [least, most]}
    return found


def profiles(setting, options):
    """Where the time of a training step goes, for every arrangement and mode that is asked for."""
    state, found = weights_of(setting, options), []
    for mode in options.modes:
        for name in options.profile:
            case = Case(setting, name, mode, options.policy, state, options)
            turn(case, "train", options.warmup)
            seconds = statistics.median(turn(case, "train", options.steps) for _ in range(options.repeats))
            table = profiled(case.train, case.model, case.device, options.steps, seconds)
            print(f"{setting.name}: {name}, {mode}, checkpoint policy {options.policy}\n{text_of(table)}\n")
            found.append({"arrangement": name, "mode": mode, "checkpoint_policy": options.policy, **table})
            torch._dynamo.reset()
    return {**setting._asdict(), "tokens": setting.tokens, "profiles": found}


OF_MIXERS = ("selective_scan", "causal_conv1d")


def backends(options):
    """The backends that take the model's calls here: ``--backend`` is a keyword of mixers, other operations choose."""
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    calls = model_calls(options.device, dtype)
    return {
        op: dispatcher.select(call, options.backend if op in OF_MIXERS else "auto").name
        for op, (dispatcher, call) in calls.items()
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
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="settings whose name contains one of these")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument(
        "--profile", nargs="*", choices=(*ARRANGEMENTS, *PEERS), metavar="NAME",
        help="account for training steps of these models instead, by default of ours",
    )  # fmt: skip
    parser.add_argument(
        "--policy",
        choices=("none", "block", "selective"),
        default="none",
        help="checkpoint policy of --profile",
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns of every case")
    parser.add_argument("--steps", type=int, help="steps in a turn; 5 on a GPU, else 1")
    parser.add_argument("--warmup", type=int, help="steps beside the one for memory; 2 on a GPU, else 1")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own number by default")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.device = chosen_device(given.device)
    on_gpu = given.device.type == "cuda"
    given.size = given.size or ("full" if on_gpu else "small")
    given.precision = given.precision or ("bf16" if on_gpu else "no")
    given.settings = [s for s in SIZES[given.size] if any(text in s.name for text in given.only or [""])]
    if not given.settings:
        parser.error(f"--only {' '.join(given.only)}: no setting of {[s.name for s in SIZES[given.size]]}")
    # Without a name of its own, and nothing where the option is absent.
    given.profile = ["ours"] if given.profile == [] else given.profile
    given.steps = given.steps or (5 if on_gpu else 1)
    given.warmup = given.warmup or (2 if on_gpu else 1)
    return given


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    # One code object serves every case's blocks.
    torch._dynamo.config.recompile_limit = 64
    # Kernels that are compiled for a CPU are not named in a profile otherwise.
    torch._inductor.config.cpp.enable_kernel_profile = bool(options.profile) and options.device.type == "cpu"
    options.peak = peak_flops(options.device, options.precision)
    start = {
        **circumstances(options.device, options.note),
        "precision": options.precision,
        "backends": backends(options),
        # As in a training on a CPU; but the records of a profile would lie between blocks that are used again.
        "freed_memory_stays": options.device.type == "cpu" and not options.profile and keep_freed_memory(),
        "peak_tflop_per_second": None if options.peak is None else round(options.peak / 1e12, 3),
        "what": "medians of turns that the cases take one after another; train: forward, backward, AdamW and averages; "
        "ratios: median and range of the turns' ratios; target: with_order_over_none at most 1.03; cases of more than "
        f"{SLOW:g} s a step take {SLOW_TURNS} turns; "
        f"compiled on a CPU: {', '.join(COMPILED_ON_CPU)} up to {COMPILED_TOKENS} tokens",
        "settings": [],
    }
    with Report(start, options.output) as report:
        for setting in options.settings:
            try:
                found = (profiles if options.profile else measure)(setting, options)
            except torch.OutOfMemoryError as error:
                found = {**setting._asdict(), "error": str(error).splitlines()[0]}
            report["settings"].append(found)
            report.save()
            gc.collect()
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
