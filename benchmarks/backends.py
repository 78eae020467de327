"""Whole steps of the state-space families on every kernel backend: ZigMa, DiS and DiM at equal width and parameters.

Outputs and gradients of every backend are compared with those of the definition (`reference`) first, and a difference
stops the run. A backend that cannot run here is named with its reason and left out. All take turns; medians count.
The backends are those of scan and convolution; the work on single tokens around a mixer runs alike in all.

    python benchmarks/backends.py --output benchmarks/results/backends_cpu.json
    python benchmarks/backends.py --width 768 --depth 24 --side 32 --batch 16 --precision bf16 \
        --backends triton cuda_package torch --output benchmarks/results/backends_h200.json      # on a GPU
"""

import argparse
import statistics
from argparse import Namespace
from pathlib import Path

import torch
from cases import LIMITS, Case, Difference, Setting, relative, turn, weights_of
from machine import Report, chosen_device, circumstances
from peers import parameters

import dis_mamba
from zigflow.engine.freed_memory import keep_freed_memory

FAMILIES = ("ours", "dis", "dim")


@torch.no_grad()
def wake(model):
    """Draw what training starts at zero, or no block would do anything."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if not weight.any():
            weight.normal_(std=0.1)


def gradients(case):
    """The output and every gradient; the weights stay."""
    out = case.backward()
    found = {
        "output": out,
        **{n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None},
    }
    case.optimizer.zero_grad(set_to_none=True)
    return found


def check(family, cases, precision):
    """All against the first.

    Raises:
        Difference: an output or a gradient is off by more than the precision's limit.
    """
    expected = gradients(next(iter(cases.values())))
    for name, case in cases.items():
        for key, value in gradients(case).items():
            limit = LIMITS[precision][key != "output"]
            found = relative(value, expected[key])
            if not found <= limit:
                raise Difference(f"{family} on {name}: {key} differs by {found:.2g}, allowed {limit:.2g}")


def measure(family, setting, options):
    """Step times of one family on every backend."""
    cases = {}
    for backend in options.backends:
        choice = Namespace(device=options.device, precision=options.precision, backend=backend)
        case = Case(setting, family, "eager", "none", options.state, choice)
        if cases:
            case.model.load_state_dict(next(iter(cases.values())).model.state_dict())
        else:
            wake(case.model)
        cases[backend] = case
    check(family, cases, options.precision)
    for case in cases.values():
        turn(case, "train", 1)
    for round_ in range(options.repeats):
        for case in list(cases.values())[round_ % len(cases) :] + list(cases.values())[: round_ % len(cases)]:
            for kind in ("train", "inference"):
                case.seconds[kind].append(turn(case, kind, options.steps))
    found, model = {}, next(iter(cases.values())).model
    for backend, case in cases.items():
        found[backend] = {}
        for kind, seconds in case.seconds.items():
            median = statistics.median(seconds)
            found[backend][kind] = {
                "step_ms": round(1e3 * median, 3),
                "images_per_second": round(setting.batch / median, 2),
            }
    return {"parameters": parameters(model), "backends": found}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = dis_mamba.available_backends()
    parser.add_argument("--backends", nargs="+", choices=list(known), help="by default all that can run here")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument(
        "--depth", type=int, default=4, help="of the ZigMa; the others get as many parameters"
    )
    parser.add_argument("--side", type=int, default=16, help="of the latents, in tokens")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--precision", choices=LIMITS, default="no")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every case")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own number by default")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.device = chosen_device(given.device)
    given.missing = {name: reason for name, reason in known.items() if reason is not None}
    wanted = given.backends or [name for name, reason in known.items() if reason is None]
    unfit = [name for name in wanted if name in given.missing]
    if unfit:
        parser.error(f"{unfit[0]} cannot run here: {given.missing[unfit[0]]}")
    # The definition first: the others are compared with it.
    given.backends = sorted(wanted, key=lambda name: name != "reference")
    return given


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(
        f"width {options.width}, {options.side**2} tokens", options.width, options.depth, 1, options.side,
        options.batch,
    )  # fmt: skip
    choice = Namespace(device=options.device, precision=options.precision, backend=options.backends[0])
    options.state = weights_of(setting, choice)
    start = {
        **circumstances(options.device, options.note),
        "precision": options.precision,
        # As in a training on a CPU.
        "freed_memory_stays": options.device.type == "cpu" and keep_freed_memory(),
        "missing": options.missing,
        "what": "medians of turns that the backends take in turn; train: forward, backward, AdamW and averages",
        **setting._asdict(),
        "tokens": setting.tokens,
        "families": {},
    }
    with Report(start, options.output) as report:
        for name in FAMILIES:
            report["families"][name.replace("ours", "zigma")] = measure(name, setting, options)
            report.save()


if __name__ == "__main__":
    main()
