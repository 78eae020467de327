"""A selection of benchmarks/samplers.py in which every pair of choices occurs: none loses to DDIM without a word."""

import importlib
import itertools
import json
import logging
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.assertions import assert_close
from zigflow.processes import Flow, Gaussian, StableDiffusion, VariancePreserving
from zigflow.samplers import ChainSampler, DpmSolver, OdeSampler

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script
    found = importlib.import_module("samplers")
    sys.path.remove(str(ROOT / "benchmarks"))
    return found


def pairwise(factors):
    """Rows with one choice of each factor, so that every two choices of two factors are together in one."""
    names, rng = list(factors), random.Random(0)
    missing = {
        (a, x, b, y): None
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    rows = []
    while missing:
        a, x, b, y = next(iter(missing))
        best = []
        for _ in range(20):
            row = {**{name: rng.choice(factors[name]) for name in names}, a: x, b: y}
            pairs = [(c, row[c], d, row[d]) for c, d in itertools.combinations(names, 2)]
            best = max(
                best, [row, [p for p in pairs if p in missing]], key=lambda found: len(found and found[1])
            )
        rows.append(best[0])
        for pair in best[1]:
            del missing[pair]
    return rows


# Schedules and paths of each shape, by the betas that they follow; all are in the benchmark.
SHAPES = {
    "linear": partial(Gaussian, "linear"),
    "cosine": partial(Gaussian, "cosine"),
    "scaled linear": partial(StableDiffusion, "scaled_linear"),
    "warm-up": partial(Gaussian, "warmup10"),
    "constant": partial(StableDiffusion, "const"),
    "vp": partial(VariancePreserving, "linear"),
    "vp cosine": partial(VariancePreserving, "cosine"),
    "straight": partial(Flow, "Linear"),
    "gvp": partial(Flow, "GVP"),
}


def test_every_pair_of_choices_is_at_most_half_worse_than_ddim_or_warned_of(bench):
    whole = bench.settings()
    variants = sorted({(s.method, s.variant) for s in whole})
    rows = pairwise(
        {"shape": list(SHAPES), "variant": variants, "prediction": ["noise", "data", "v"], "calls": [20, 27],
         "grid": ["logSNR", "time_uniform", "time_quadratic"], "order": [1, 2, 3]}
    )  # fmt: skip
    torch.manual_seed(0)
    x0, spots = torch.randn(12, 1, 8, 8, dtype=torch.float64), bench.digits(100)
    against, wrong = {}, []
    for row in rows:
        shape, prediction = row["shape"], row["prediction"]
        name = (shape, prediction)
        if name not in against:
            flow = SHAPES[shape].func is Flow
            process = SHAPES[shape](prediction="score" if flow and prediction == "v" else prediction)
            like = next((other for (same, _), other in against.items() if same == shape), None)
            against[name] = bench.Comparison(process, x0, spots, fine=120, like=like)
        ode = not row["variant"][1]
        setting = bench.Setting(*row["variant"], *(() if ode else (row["grid"], row["order"])))
        found = against[name].row(setting, row["calls"])
        if found["ratio"] > bench.ALLOWED and not found["warned"]:
            wrong.append((name, found))
    assert {row["shape"] for row in rows} == set(SHAPES) and not wrong, wrong


def test_the_stored_result_is_of_everything_and_without_a_fault(bench):
    stored = json.loads((ROOT / "benchmarks" / "results" / "samplers_ddim.json").read_text())
    names = {" ".join(name) for name in bench.processes()}
    found = {" ".join((p["process"], p["schedule"], p["prediction"])) for p in stored["processes"]}
    assert found | set(stored["refused"]) == names and stored["complete"]
    assert stored["over_unwarned"] == 0 and stored["allowed"] == bench.ALLOWED
    for process in stored["processes"]:
        assert process["compared"] == len(bench.settings()) * len(stored["calls"])


@pytest.mark.parametrize(
    "sampler, process, words",
    [
        (DpmSolver("dpm_solver", "fast", 20), Gaussian("cosine"), ["variant=fast", "order=3", "grid=logSNR"]),
        (DpmSolver("dpm_solver", "singlestep", 20, 2), VariancePreserving(), ["singlestep", "grid=logSNR"]),
        (DpmSolver("dpm_solver++", "fast_equal_spans", 50), Gaussian(), ["fast_equal_spans", "grid=logSNR"]),
        (DpmSolver(order=1, grid="logSNR"), Gaussian("cosine"), ["order=1", "grid=time_uniform"]),
        (DpmSolver(order=1, grid="time_quadratic"), Flow(prediction="data"), ["order=1", "grid=time_uniform"]),
        (DpmSolver(variant="multistep", lower_order_final=False), VariancePreserving(), ["lower_order_final=true"]),
        (OdeSampler("heun", 10), StableDiffusion(), ["heun", "32 steps"]),
        (OdeSampler("torchdiffeq/heun2", 10), StableDiffusion(), ["torchdiffeq/heun2", "32 steps"]),
        (OdeSampler("torchdiffeq/explicit_adams", 50), Gaussian(), ["torchdiffeq/explicit_adams", "unstable"]),
        (OdeSampler("euler", 50), Gaussian("const"), ["euler", "beside the data"]),
    ],
)  # fmt: skip
def test_what_loses_to_ddim_is_warned_of_once_and_by_name(sampler, process, words, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sampler.sample(process, lambda x, t, y: 0.1 * x, torch.zeros(1, 2))
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in words) and "DDIM" in record.getMessage()


@pytest.mark.parametrize(
    "sampler",
    [
        DpmSolver(), DpmSolver(grid="logSNR"), DpmSolver(variant="multistep"), DpmSolver(variant="adaptive"),
        DpmSolver("dpm_solver", "fast_equal_spans", 50, 3, "logSNR"), OdeSampler("heun", 40), OdeSampler(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("process", [Gaussian(), Gaussian("cosine"), StableDiffusion(), VariancePreserving()])
def test_defaults_and_published_samplers_are_not_warned_of(sampler, process):
    assert sampler.doubts(process) == []


def test_first_order_on_the_chains_own_times_is_ddim():
    """What a flow is compared with."""
    process, x0 = VariancePreserving(), torch.randn(3, 4, dtype=torch.float64)

    def model(x, t, y=None):
        return 0.1 * torch.tanh(x + t[:, None] / 1000)

    ddim = ChainSampler("ddim", 20).sample(process, model, x0)
    first = DpmSolver("dpm_solver++", "multistep", 19, 1).sample(process, model, x0)
    assert_close("first order", first, ddim, of_max=1e-9)
