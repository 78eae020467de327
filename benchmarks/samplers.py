"""Every deterministic sampler against DDIM with as many calls, on real digits, with a network that makes no mistake.

The data are 200 of scikit-learn's digits, each blurred by Gaussian noise of 0.1, whose expected data are known at every
state: what is left is the error of the solver, the mean distance to a fine solution in grey levels. Compared are all of
(process, betas, prediction) x (method, variant, grid, order), and the fixed-step ODE methods. A setting that is more
than 1.5 times as far off as DDIM must be refused, or warn by name (``doubts`` of the sampler); else the exit is 1.
A flow has no chain of steps: DDIM is there the first order of DPM-Solver on a grid even in time, which is the same.

    python benchmarks/samplers.py --output benchmarks/results/samplers_ddim.json

The adaptive variant is left out: its calls follow from its tolerance.
"""

import argparse
import itertools
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import Report, circumstances
from sklearn.datasets import load_digits
from torch import Tensor

from zigflow.processes import Flow, Gaussian, StableDiffusion, VariancePreserving
from zigflow.processes.interpolants import INTERPOLANTS
from zigflow.processes.predictions import PREDICTIONS, bounded_predictions
from zigflow.processes.schedules import BETAS, SCHEDULES
from zigflow.samplers import ODE_SOLVERS, ChainSampler, DpmSolver, OdeSampler
from zigflow.samplers.dpm_grids import GRIDS, VARIANTS
from zigflow.samplers.dpm_solver import FORMS

BLUR = 0.1
ALLOWED = 1.5
CALLS = (20, 30, 50)
FINE = 600


class Setting(NamedTuple):
    """A sampler without its number of steps; an ODE method has no variant, grid and order."""

    method: str
    variant: str = ""
    grid: str = ""
    order: int = 0

    def sampler(self, calls: int) -> Any:
        """The sampler with ``calls`` calls of the network, the last step's among them, or as many as fit."""
        if self.variant:
            return DpmSolver(self.method, self.variant, calls - 1, self.order, self.grid)
        stages = len(getattr(ODE_SOLVERS.get(self.method), "b", ()))
        return OdeSampler(self.method, (calls - 1) // stages + 1)


def settings() -> list[Setting]:
    """All of DPM-Solver's, and every fixed-step ODE method of ours."""
    variants = [name for name in VARIANTS if name != "adaptive"]
    dpm = itertools.starmap(Setting, itertools.product(FORMS, variants, GRIDS, (1, 2, 3)))
    solvers = {
        name: ODE_SOLVERS.get(name) for name in ODE_SOLVERS.names() if not name.startswith("torchdiffeq/")
    }
    # Each once, whatever other names it has.
    return [
        *dpm,
        *(Setting(name) for name, solver in solvers.items() if hasattr(solver, "b") and solver.name == name),
    ]


def processes() -> dict[tuple[str, str, str], Any]:
    """(process, betas or schedule or path, prediction) -> the process, or why there is none."""
    found: dict[tuple[str, str, str], Any] = {}

    def add(name: str, shape: str, prediction: str, make: Any) -> None:
        try:
            found[name, shape, prediction] = make()
        except ValueError as error:
            found[name, shape, prediction] = str(error)

    for prediction in bounded_predictions():
        for betas in (name for name in BETAS.names() if name != "squaredcos_cap_v2"):  # cosine's other name
            add("gaussian", betas, prediction, lambda b=betas, p=prediction: Gaussian(b, prediction=p))
            add(
                "sd_discrete",
                betas,
                prediction,
                lambda b=betas, p=prediction: StableDiffusion(b, prediction=p),
            )
        for schedule in SCHEDULES:
            add(
                "vp",
                schedule,
                prediction,
                lambda s=schedule, p=prediction: VariancePreserving(s, prediction=p),
            )
    for path, prediction in itertools.product(INTERPOLANTS.names(), PREDICTIONS):
        add("flow", path, prediction, lambda a=path, p=prediction: Flow(a, p))
    return found


def digits(count: int = 200) -> Tensor:
    """(count, 64) in [-1, 1]."""
    return torch.tensor(load_digits().images[:count] / 8 - 1).reshape(-1, 64).double()


def exact_network(process: Any, spots: Tensor) -> Any:
    """What a perfect network predicts for data that are one of ``spots`` (N, D), each blurred by BLUR."""
    squares = spots.square().sum(1)

    def model(x: Tensor, net_time: Tensor, y: Any = None) -> Tensor:
        t = process.process_time(net_time.double(), model)
        alpha, sigma = (c.reshape(-1, 1) for c in (process.path.alpha(t), process.path.sigma(t)))
        flat = x.double().flatten(1)
        variance = (alpha * BLUR) ** 2 + sigma**2
        likeness = (2 * alpha * flat @ spots.T - alpha**2 * squares) / (2 * variance)
        mean = torch.softmax(likeness, 1) @ spots
        data = mean + alpha * BLUR**2 / variance * (flat - alpha * mean)
        return process.convert(data.reshape(x.shape), x, t, process.prediction, source="data")

    return model


class Comparison:
    """The samplers of one process from the same noise x0 (B, ...) in float64.

    Args:
        fine: calls of the solution that is taken as exact.
        like: a comparison of the same process with another prediction, whose exact solution and DDIM are the same.
    """

    def __init__(
        self, process: Any, x0: Tensor, spots: Tensor, fine: int = FINE, like: "Comparison | None" = None
    ):
        reason = DpmSolver(lambda_floor=None).unfit(process)
        if reason is not None:
            raise ValueError(reason)
        self.process, self.x0 = process, x0
        self.model = exact_network(process, spots)
        if like is not None:
            self.exact, self._first = like.exact, like._first
            return
        self.exact = self._run(DpmSolver("dpm_solver++", "singlestep", fine, 3, "logSNR", lambda_floor=None))
        self._first: dict[int, float] = {}

    def _run(self, sampler: Any) -> Tensor:
        return sampler.sample(self.process, self.model, self.x0)

    def error(self, sampler: Any) -> float:
        """Grey levels."""
        return 127.5 * float((self._run(sampler) - self.exact).abs().mean())

    def first(self, calls: int) -> float:
        """DDIM's error."""
        if calls not in self._first:
            first = DpmSolver("dpm_solver++", "multistep", calls - 1, 1, lambda_floor=None)
            flow = isinstance(self.process, Flow)
            self._first[calls] = self.error(first if flow else ChainSampler("ddim", calls))
        return self._first[calls]

    def row(self, setting: Setting, calls: int) -> dict[str, Any]:
        """What a setting gave: its error over DDIM's, and what its sampler says of it."""
        sampler = setting.sampler(calls)
        error = self.error(sampler)
        made = sampler.num_function_evaluations
        if made > calls:
            raise RuntimeError(f"{setting} made {made} calls, not {calls}")
        return {
            **setting._asdict(), "calls": made, "error": round(error, 4),
            "ratio": round(error / self.first(calls), 3), "warned": bool(sampler.doubts(self.process)),
        }  # fmt: skip


def summary(name: tuple[str, str, str], comparison: Comparison, rows: list[dict], calls: list[int]) -> dict:
    """One process, short enough to be kept: counts, the worst, and all that are over the limit."""
    over = [row for row in rows if row["ratio"] > ALLOWED]
    silent = [row for row in rows if not row["warned"]]
    return {
        "process": name[0], "schedule": name[1], "prediction": name[2],
        "ddim": {str(n): round(comparison.first(n), 3) for n in calls},
        "compared": len(rows), "warned": len(rows) - len(silent), "over": len(over),
        "over_unwarned": [row for row in over if not row["warned"]],
        "worst_unwarned": max(silent, key=lambda row: row["ratio"]),
        "worst_warned": max((row for row in rows if row["warned"]), key=lambda row: row["ratio"], default=None),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="the result's file; without it, it is printed only")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--process", nargs="+", help="these of the processes only, such as vp")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # what samplers say is stored
    torch.manual_seed(0)
    x0, spots = torch.randn(options.samples, 1, 8, 8, dtype=torch.float64), digits()
    chosen = {k: v for k, v in processes().items() if not options.process or k[0] in options.process}
    bad, known = 0, {}
    with Report(circumstances(), options.output) as report:
        report |= {"allowed": ALLOWED, "calls": options.calls, "samples": options.samples}
        report |= {"refused": {}, "processes": []}
        for name, process in chosen.items():
            try:
                if isinstance(process, str):
                    raise ValueError(process)
                comparison = Comparison(process, x0, spots, like=known.get(name[:2]))
                known[name[:2]] = comparison
            except ValueError as error:
                report["refused"][" ".join(name)] = str(error)
                continue
            rows = [comparison.row(s, n) for n in options.calls for s in settings()]
            found = summary(name, comparison, rows, options.calls)
            report["processes"].append(found)
            bad += len(found["over_unwarned"])
            report.save()
        report["over_unwarned"] = bad
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
