"""Backbones and processes on the embedded digits: how good the samples are, and how soon.

`table` trains every row once, samples it with its own sampler and judges 500 samples as the demo does. `race` trains
each backbone of the flow rows from several seeds, judged every 100 steps: the steps to the demo's bars, which do not
depend on what else the machine does, times the seconds of a step. Those seconds come from short runs that the rows make
in turn, after all training, so that they share whatever happens to the machine.

    python benchmarks/digits.py --output benchmarks/results/digits_cpu.json

Runs are kept in --work and continued or skipped when they are there: a stopped benchmark goes on with the same command.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from machine import ROOT, circumstances

from zigflow.build import build_model
from zigflow.plugins import compose_config, validated

METRICS = ("agreement", "coverage", "frechet_ratio", "nearest_train_distance_ratio")
JUDGED_EVERY = 100
BATCH = 64
DDIM = ("sample_mode=diffusion", "diffusion.sampling_method=ddim", "diffusion.num_steps=50")
DPM = (
    "sample_mode=diffusion",
    "diffusion.sampling_method=dpm_solver",
    "diffusion.num_steps=50",
    "diffusion.last_step=false",
)
HEUN = ("ode.sampling_method=heun", "ode.num_steps=17")
GUIDANCE = "cfg_scale=1.15"


# Little noise makes eight by eight pixels unrecognizable: with the published schedules, made for larger images, and
# the noise as target, most steps teach a model of this size nothing.
COSINE = ("process.betas=cosine", "process.prediction=v")
COSINE_VP = ("process.schedule=cosine", "process.prediction=v")


class Row(NamedTuple):
    """A backbone under a process, with the sampler that its publication uses."""

    backbone: str
    model: str
    process: str
    rate: str
    sampler: tuple[str, ...]
    details: tuple[str, ...] = ()

    @property
    def name(self):
        return f"{self.backbone}_{self.process}"

    @property
    def training(self):
        return [
            f"model={self.model}",
            f"process={self.process}",
            *self.details,
            f"optim.lr={self.rate}",
            f"data.batch_size={BATCH}",
        ]


ROWS = [
    Row("zigma", "digits_zigzag8", "flow", "8e-3", HEUN),
    Row("dit", "digits_dit", "flow", "4e-3", HEUN),
    Row("uvit", "digits_uvit", "flow", "4e-3", HEUN),
    Row("dis", "digits_dis", "flow", "5e-3", HEUN),
    Row("dim", "digits_dim", "flow", "8e-3", HEUN),
    Row("zigma", "digits_zigzag8", "gaussian", "8e-3", DDIM, COSINE),
    Row("dit", "digits_dit", "gaussian", "4e-3", DDIM, COSINE),
    Row("dis", "digits_dis", "gaussian", "5e-3", DDIM, COSINE),
    Row("uvit", "digits_uvit", "vp", "4e-3", DPM, COSINE_VP),
    Row("dim", "digits_dim", "vp", "8e-3", DPM, COSINE_VP),
]


def command(script, *arguments, folder):
    """Run one of the two entries; its output is shown only when it fails."""
    words = [sys.executable, str(ROOT / script), *arguments, "loop.progress=false"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment())
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-3000:]}")


def environment():
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "ACCELERATE_USE_CPU": "true",
    }


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def parameters(row):
    settings = validated(compose_config([*row.training, "run_dir=none"]))
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(settings).parameters())


def table(row, options):
    """Train and sample one row; its numbers."""
    run, samples = options.work / row.name, options.work / f"{row.name}_samples"
    command("train_acc.py", *row.training, *options.steps, f"run_dir={run}", folder=options.work)
    if not (samples / "results.json").is_file():
        given = [f"ckpt={run}", f"sample_dir={samples}", GUIDANCE, f"num_fid_samples={options.samples}"]
        command("sample_acc.py", *given, *row.sampler, "global_seed=0", folder=options.work)
    if options.output:
        grids = options.output.parent / f"{options.output.stem}_grids"
        grids.mkdir(parents=True, exist_ok=True)
        shutil.copy(samples / "grid.png", grids / f"{row.name}.png")
    result = json.loads((samples / "results.json").read_text())
    return {
        "backbone": row.backbone,
        "process": row.process,
        "process_details": list(row.details),
        "parameters": parameters(row),
        "learning_rate": float(row.rate),
        "sampler": result["protocol"]["sampler"],
        "function_evaluations": result["protocol"]["function_evaluations"],
        "guidance": result["protocol"]["guidance"]["scale"],
        **{name: round(result["metrics"][name], 4) for name in METRICS},
        "passed": result["metrics"]["passed"],
    }


def race(row, seed, options):
    """The first judged step at which every bar of the demo is met, and the best numbers of the run."""
    run = options.work / f"race_{row.name}_{seed}"
    judged = [
        f"data.sample_fid_every={options.judged_every}",
        f"data.sample_fid_n={options.samples}",
        GUIDANCE,
        *row.sampler,
    ]
    given = [*row.training, *options.steps, f"global_seed={seed}", *judged, f"run_dir={run}"]
    command("train_acc.py", *given, folder=options.work)
    evaluations = [(line["step"], line["eval"]) for line in lines(run) if "eval" in line]
    met = [step for step, metrics in evaluations if metrics["passed"]]
    agreed = [step for step, metrics in evaluations if metrics["agreement"] >= 0.95]
    return {
        "seed": seed,
        "steps_to_all_bars": met[0] if met else None,
        "steps_to_agreement_0.95": agreed[0] if agreed else None,
        "judgements_passed": f"{len(met)} of {len(evaluations)}",
        "best_frechet_ratio": round(min(m["frechet_ratio"] for _, m in evaluations), 4),
        "last": {name: round(evaluations[-1][1][name], 4) for name in METRICS},
    }


def speed(rows, options):
    """Images per second in training, each row in turn: the median of its runs' medians, and all of them."""
    found = {row.name: [] for row in rows}
    for turn in range(options.turns):
        for row in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
            run = options.work / "speed"
            shutil.rmtree(run, ignore_errors=True)
            short = ["data.train_steps=150", "ckpt_every=150", "log_every=10"]
            command("train_acc.py", *row.training, *short, f"run_dir={run}", folder=options.work)
            rates = [line["images_per_second"] for line in lines(run) if line.get("step", 0) > 30]
            found[row.name].append(statistics.median(rates))
    return {name: (statistics.median(each), each) for name, each in found.items()}


def picture_of(report):
    """The two tables as markdown."""
    out = [
        "| backbone | process | agreement | coverage | Frechet / floor | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["table"]:
        out.append(
            f"| {row['backbone']} | {row['process']} | {row['agreement']:.3f} | {row['coverage']:.3f} | "
            f"{row['frechet_ratio']:.2f} | {row['images_per_second']:.0f} |"
        )
    out += ["", "| backbone | seed | seconds to 95 % agreement | seconds to all bars |", "|---|---|---|---|"]
    for name, entry in report["race"].items():
        for run in entry["runs"]:
            seconds = [run[key] for key in ("seconds_to_agreement_0.95", "seconds_to_all_bars")]
            shown = ["not reached" if s is None else f"{s:.0f}" for s in seconds]
            out.append(f"| {name} | {run['seed']} | {shown[0]} | {shown[1]} |")
    return "\n".join(out)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=[r.name for r in ROWS], help="by default all")
    parser.add_argument(
        "--racers", nargs="*", choices=sorted({r.backbone for r in ROWS}), help="by default all"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of the race; none: no race")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--turns", type=int, default=3, help="short runs of each row for its speed")
    parser.add_argument("--judged-every", type=int, default=JUDGED_EVERY, help="steps, in the race")
    parser.add_argument("--train-steps", type=int, help="the data set's own number by default")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own number by default")
    parser.add_argument("--work", type=Path, default=Path("outputs/digits_benchmark"))
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.work = given.work.resolve()
    for folder in (given.work, *([given.output.parent] if given.output else [])):
        folder.mkdir(parents=True, exist_ok=True)
    given.steps = [] if given.train_steps is None else [f"data.train_steps={given.train_steps}"]
    return given


def main():
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [row for row in ROWS if options.rows is None or row.name in options.rows]
    made = [table(row, options) for row in rows]
    races = {
        row.backbone: [race(row, seed, options) for seed in options.seeds]
        for row in rows
        if row.process == "flow" and (options.racers is None or row.backbone in options.racers)
    }
    rates = speed(rows, options)
    for row, entry in zip(rows, made, strict=True):
        entry["images_per_second"], entry["images_per_second_by_turn"] = rates[row.name]
    for backbone, runs in races.items():
        rate = rates[f"{backbone}_flow"][0]
        for run in runs:
            for bar in ("agreement_0.95", "all_bars"):
                steps = run[f"steps_to_{bar}"]
                run[f"seconds_to_{bar}"] = None if steps is None else round(steps * BATCH / rate, 1)
    report = {
        **circumstances(note=options.note),
        "what": "table: one training of each row, its own sampler, one guidance scale; race: steps to the demo's bars "
        "times the seconds of a step, images per second from runs taken in turn",
        "table": made,
        "race": {name: {"runs": runs} for name, runs in races.items()},
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(picture_of(report))


if __name__ == "__main__":
    main()
