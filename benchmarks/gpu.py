"""One command for a GPU: what has to be measured on one, most important first, in stages that can be cut and resumed.

    python benchmarks/gpu.py                                   # all stages, at most eight minutes each
    python benchmarks/gpu.py --list                            # the stages, and what is done of them
    python benchmarks/gpu.py --stage kernels                   # one of them; the same command goes on where it was cut
    python benchmarks/gpu.py --budget 600                      # stop after ten minutes
    python benchmarks/gpu.py --table                           # what is known, as Markdown
    python benchmarks/gpu.py --dry-run                         # the whole plan on a CPU at tiny sizes

Kernels are compared with their definitions in float64 first: what is wrong there is reported and not timed later.
Every result is stored as it comes (``--output``) with its hardware, versions and commit; what is stored is not measured
again, but for failures of code that has changed since, and checks of kernels that have. Measurements run in a
process apart, which is replaced when something in it fails or takes too long; the rest goes on.

``build_peers.py`` builds the CUDA packages that stage ``peers`` times too where they can be imported. The exit status
is 1 when something is wrong or has failed, else 75 when something is left to do.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import torch
from gpu_plan import STAGE_SECONDS, STAGES, Measurement, plan
from gpu_results import FAILURES, Results, read
from gpu_table import table
from gpu_worker import Worker
from machine import ROOT, chosen_device, circumstances

DEFAULT = ROOT / "benchmarks" / "results" / "gpu.json"
UNFINISHED = 75


def measure(measurement: Measurement, results: Results, worker: Worker, checks, seconds: float) -> dict:
    """What a measurement says; one that times kernels that are not known to be right is not made.

    One of a single operation leaves its kernel out instead, and its peers are timed.
    """
    reasons = {need: results.refusal(need, checks) for need in measurement.needs}
    refused = {need: reason for need, reason in reasons.items() if reason is not None}
    arguments = dict(measurement.arguments)
    if measurement.function.startswith("time_"):
        arguments["refused"] = {"triton": "; ".join(refused.values())} if refused else {}
    elif refused:
        return {"status": "not timed", "error": "; ".join(refused.values())}
    if not measurement.twice:
        return worker.ask(measurement.function, arguments, seconds)
    said = []
    for fresh in (False, True):
        if fresh:
            worker.stop()
        said.append(worker.ask(measurement.function, arguments, seconds / 2))
        if said[-1]["status"] != "done":
            return said[-1]
    first, second = (each["result"] for each in said)
    differ = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
    result: dict = {"equal": not differ, "differ": differ, "first": first, "second": second}
    if differ and measurement.must_agree:
        result["wrong"] = [f"two runs differ: {', '.join(differ)}"]
    status = "wrong" if "wrong" in result else "done"
    return {"status": status, "result": result, "seconds": round(sum(each["seconds"] for each in said), 2)}


def run(chosen: list[Measurement], checks, results: Results, worker: Worker, options) -> list[Measurement]:
    """Measure what is not settled, within the budgets; what is left."""
    began, left, started = time.monotonic(), [], {}
    again = set(chosen if options.again else ())
    for place, measurement in enumerate(chosen, 1):
        if results.settled(measurement) and measurement not in again:
            continue
        now = time.monotonic()
        stage_end = started.setdefault(measurement.stage, now) + options.stage_seconds
        end = min(stage_end, began + options.budget)
        if now >= end:
            left.append(measurement)
            continue
        said = measure(measurement, results, worker, checks, min(measurement.seconds, end - now))
        if said["status"] == "timed out" and end - now < measurement.seconds:
            # The budget cut it, not its own limit.
            left.append(measurement)
            continue
        results.record(measurement, said)
        why = said.get("error") or "; ".join(said.get("result", {}).get("wrong", []))
        took = f" in {said['seconds']:.1f} s" if "seconds" in said else ""
        head = f"[{place}/{len(chosen)}] {measurement.stage}: {measurement.name}: {said['status']}{took}"
        print(f"{head}{': ' if why else ''}{why}", flush=True)
    return left


def listing(measurements: list[Measurement], results: Results) -> str:
    lines = []
    for stage, text in STAGES.items():
        own = [m for m in measurements if m.stage == stage]
        done = sum(results.settled(m) and (results.entry(m) or {})["status"] == "done" for m in own)
        bad = sum((results.entry(m) or {}).get("status") in FAILURES for m in own)
        old = sum(results.stale(m) for m in own)
        more = [
            f", {count} {what}"
            for count, what in ((bad, "wrong or failed"), (old, "of other kernels"))
            if count
        ]
        lines.append(f"{stage:12} {done:4} of {len(own):3} done{''.join(more)}\n             {text}")
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stage", nargs="+", choices=STAGES, metavar="NAME", help=f"of {', '.join(STAGES)}")
    what.add_argument("--all", action="store_true", help="all stages, which is the default")
    what.add_argument(
        "--list", action="store_true", help="say what there is and what is done; measures nothing"
    )
    what.add_argument(
        "--table", action="store_true", help="print the stored results as Markdown; measures nothing"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="measurements whose name contains one of these"
    )
    parser.add_argument("--again", action="store_true", help="measure what is stored, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="the whole plan on a CPU at tiny sizes; no numbers"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="of the whole command"
    )
    parser.add_argument(
        "--stage-seconds",
        type=float,
        default=STAGE_SECONDS,
        metavar="SECONDS",
        help="of each stage: %(default)s",
    )
    parser.add_argument("--device", help="cuda, or one of several: cuda:1")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--output", type=Path, help="result file; benchmarks/results/gpu.json, none for a dry run"
    )
    given = parser.parse_args()
    for name in ("budget", "stage_seconds"):
        if not getattr(given, name) > 0:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(given, name):g}: give a positive number of seconds"
            )
    if given.output is None and not given.dry_run:
        given.output = DEFAULT
    return given


def device_of(options) -> torch.device:
    """A GPU, or the CPU of a dry run.

    Raises:
        SystemExit: there is no GPU.
    """
    if options.dry_run:
        return chosen_device(options.device or "cpu")
    device = chosen_device(options.device)
    if device.type != "cuda":
        raise SystemExit(
            f"{device} is no GPU, which this command measures: --dry-run walks its plan on a CPU"
        )
    return device


def main() -> int:
    options = arguments()
    if options.table:
        if options.output is None or not options.output.exists():
            raise SystemExit(
                f"there is no {options.output}: nothing has been measured; --output names another file"
            )
        print(table(read(options.output, options.dry_run)))
        return 0
    every = plan(options.dry_run)
    if options.list:
        hardware = {} if options.output is None else read(options.output, options.dry_run)
        known = [each["hardware"] for each in hardware.get("runs", [])]
        print(
            listing(every, Results(options.output, {"hardware": known[0] if known else ""}, options.dry_run))
        )
        return 0
    device = device_of(options)
    # Takes seconds to import, which a list or a table need not.
    from kernels import packages

    start = {**circumstances(device, options.note), "packages": packages()}
    results = Results(options.output, start, options.dry_run)
    chosen = [m for m in every if m.stage in (options.stage or STAGES)]
    chosen = [m for m in chosen if any(text in m.name for text in options.only or [""])]
    if not chosen:
        raise SystemExit(
            f"--only {' '.join(options.only)}: no measurement's name contains it; --list shows the stages"
        )
    # Whoever ends this process ends the worker.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    checks = [m for m in every if m.stage == "kernels"]
    with Worker(str(device)) as worker:
        left = run(chosen, checks, results, worker, options)
    bad = [m for m in chosen if (results.entry(m) or {}).get("status") in FAILURES]
    open_ = [m for m in chosen if (results.entry(m) or {}).get("status") == "not timed"]
    print(
        f"{len(chosen)} measurements: {len(bad)} wrong or failed, {len(open_)} not made for it, {len(left)} left"
    )
    if left:
        print("the same command goes on with what is left")
    if options.dry_run and options.output is None:
        print(table(results.data))
    if bad:
        return 1
    return UNFINISHED if left or open_ else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with what is left")
