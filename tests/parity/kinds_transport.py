"""SiT's and ZigMa's transport: paths, conversions, losses, trajectories, likelihoods.

Every row of the stored file is one test case, and every case says which stored tensors it reads; the case
"every key" asserts that none of them is left over.
"""

import math
import re

import pytest
import torch

from tests.assertions import assert_close
from tests.parity.harness import parity_kind
from tests.parity.transport_models import build
from zigflow.processes import Flow
from zigflow.processes.interpolants import INTERPOLANTS
from zigflow.samplers import ODE_SOLVERS, OdeSampler, SamplingError, SdeSampler
from zigflow.samplers.solver import SolverSettings

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
TIGHT = SolverSettings(atol=1e-10, rtol=1e-7)


def rows_by_key(fixture):
    return {row["key"]: row for row in fixture.meta["sampler"]["rows"]}


def cases(fixture):
    meta = fixture.meta
    return [
        *(f"plan/{path}" for path in paths(fixture, "plan/")),
        *(f"conv/{path}" for path in paths(fixture, "conv/")),
        *(row["key"] for row in meta["loss"]["rows"]),
        *(row["key"] for row in meta["sampler"]["rows"]),
        "every key",
    ]


def paths(fixture, prefix):
    """Names of interpolants: "plan/Linear/alpha" -> Linear."""
    return list(dict.fromkeys(k.split("/")[0] for k in fixture.names(prefix) if "/" in k))


def keys_of(fixture, case):
    """The stored tensors that belong to a case."""
    stored = fixture.tensors
    if case.startswith("plan/"):
        return {"plan/t", *(k for k in stored if k.startswith(case + "/"))}
    if case.startswith("conv/"):
        shared = {f"conv/{name}" for name in ("t", "x", "x0", "x1", "model_out")}
        return shared | {k for k in stored if k.startswith(case + "/")}
    if case.startswith("loss/"):
        return {"loss/x1", "loss/x0", "loss/u", "loss/model_W", f"{case}/loss", f"{case}/t"}
    if case.startswith("llh/"):
        return {k for k in stored if k.startswith(case + "/")}
    start = {"sampler/z"} if case.startswith("ode/") else {"sampler/z", "sampler/noise"}
    own = {case, case + "_sit"} if case.endswith("/reverse") else {case}
    if case.split("/")[-2] == "heun":
        own = {case.replace("/heun/", "/heun2/")}
    return start | {k for k in own if k in stored}


@parity_kind("transport.transport", cases=cases)
def check_transport(fixture, case):
    if case == "every key":
        visited = set().union(*(keys_of(fixture, c) for c in cases(fixture) if c != "every key"))
        assert visited == set(fixture.tensors)
        return
    reads = fixture.tensors
    kind = case.split("/")[0]
    {"plan": check_plan, "conv": check_conversions, "loss": check_loss, "ode": check_ode}.get(
        kind, check_sde if kind == "sde" else check_likelihood
    )(fixture, case, reads)
    assert reads.read == keys_of(fixture, case)


def check_plan(fixture, case, reads):
    name = case.removeprefix("plan/")
    path = INTERPOLANTS.get(name)()
    t = reads["plan/t"]
    for quantity in fixture.names(case + "/"):
        want = reads[f"{case}/{quantity}"]
        floor = 0.0
        if name == "VP" and quantity == "d_sigma":
            # The stored value has 1 - alpha^2 computed in float32: beside t = 1 that is 4 x this far off.
            log_alpha = path._log_alpha(t)
            rough = -path.alpha(t) * path.d_alpha(t) / (1 - torch.exp(2 * log_alpha)).sqrt()
            inner = t < 1
            floor = 4 * (rough.double() - path.d_sigma(t.double()))[inner].abs().max().item()
        for dtype in (torch.float32, torch.float64):
            got = getattr(path, quantity)(t.to(dtype))
            finite = torch.isfinite(want)
            assert torch.equal(got[~finite].float(), want[~finite]), f"{case}/{quantity}: infinities"
            assert_close(f"{case}/{quantity}", got[finite], want[finite], floor=floor)


def check_conversions(fixture, case, reads):
    name = case.removeprefix("conv/")
    t, x, x0, x1, output = (reads[f"conv/{k}"] for k in ("t", "x", "x0", "x1", "model_out"))
    flow = Flow(name)
    mean, gain = flow.drift_terms(x, t)
    xt, ut = flow.interpolate(x1, x0, t)
    got = {
        "drift_mean": -mean,
        "drift_var": gain,
        "score_from_velocity": flow.score(output, x, t),
        "noise_from_velocity": flow.noise(output, x, t),
        "velocity_from_score": flow.convert(output, x, t, "velocity", source="score"),
        "xt": xt,
        "ut": ut,
    }
    for key in fixture.names(f"{case}/diffusion/"):
        form, norm = re.fullmatch(r"(.+)/norm([\d.]+)", key).groups()
        got[f"diffusion/{key}"] = flow.diffusion(x, t, form, float(norm))
    for prediction in ("velocity", "score", "noise"):
        process = Flow(name, prediction)
        got[f"{prediction}/ode_drift"] = process.velocity(output, x, t)
        got[f"{prediction}/score"] = process.score(output, x, t)
    for key in fixture.names(case + "/"):
        assert_close(f"{case}/{key}", got[key], reads[f"{case}/{key}"])


def check_loss(fixture, case, reads):
    row = next(r for r in fixture.meta["loss"]["rows"] if r["key"] == case)
    process = Flow(row["path"], row["prediction"], row["loss_weight"], train_eps=row["train_eps"])
    weight = reads["loss/model_W"]

    def model(x, t, y=None):
        return torch.tanh(x @ weight.to(x.dtype).T) + 0.3 * t.reshape(-1, *(1,) * (x.ndim - 1))

    t = process.sample_time(reads["loss/u"])
    assert_close(f"{case}/t", t, reads[f"{case}/t"])
    x1, x0, want = reads["loss/x1"], reads["loss/x0"], reads[f"{case}/loss"]
    assert_close(case, process.loss(model, x1, x0, t), want)
    assert_close(case, process.loss(model, x1.double(), x0.double(), t.double()), want)


def tolerance(row):
    error = row.get("f32_vs_f64")
    return 4 * error if isinstance(error, float) else 0.0


def check_finite(row, *stored):
    """Where the JSON says so, the stored values are finite, or none of them is."""
    for value in stored if "finite" in row else ():
        assert torch.isfinite(value).all() == row["finite"], row["key"]


def settings_of(row):
    return {"atol": row["atol"], "rtol": row["rtol"]}


def drift_of(process, model):
    return lambda x, t: process.velocity(model(x, t), x, t)


def check_ode(fixture, case, reads):
    row = rows_by_key(fixture)[case]
    if row["method"] == "dopri5":
        check_dopri5(fixture, row, reads)
    elif row["reverse"]:
        check_reverse(fixture, row, reads)
    else:
        check_fixed(fixture, row, reads)


def solvers_of(method):
    """Our own solver of an official method and torchdiffeq's."""
    return [method] if method == "heun" else [method, f"torchdiffeq/{method}"]


def check_fixed(fixture, row, reads):
    process, model = build(fixture, row)
    assert_close(
        "interval", torch.tensor(process.interval("ode")), torch.tensor(row["interval"]), of_max=1e-9
    )
    # "heun" was an error in the published code, whose torchdiffeq knows the method as heun2.
    key = row["key"].replace("/heun/", "/heun2/")
    want = reads[key]
    floor = tolerance(rows_by_key(fixture)[key])
    z = reads["sampler/z"]
    check_finite(row, want)
    for method in solvers_of(row["method"]):
        sampler = OdeSampler(method, row["num_steps"], last_step=False, **settings_of(row))
        single = sampler.sample(process, model, z, return_trajectory=True)
        double = sampler.sample(process, model, z.double(), return_trajectory=True)
        assert double.dtype == torch.float64
        assert_close(f"{row['key']} {method}", single, want, floor=floor)
        assert_close(f"{row['key']} {method} float64", double, want, floor=floor)


def check_reverse(fixture, row, reads):
    """`reverse` is ZigMa's double reversal, reproduced by its drift; `reverse_sit` is what we call encode."""
    process, model = build(fixture, row)
    z, key = reads["sampler/z"], row["key"]
    published, right = reads[key], reads[key + "_sit"]
    high, low = row["interval"]
    check_finite(row, published)
    drift = drift_of(process, model)
    times = torch.linspace(high, low, row["num_steps"]).tolist()
    doubly = ODE_SOLVERS.get(row["method"]).solve(
        lambda x, t: drift(x, 1 - t), z, times, SolverSettings(**settings_of(row)), keep=True
    )
    assert_close(key, doubly.trajectory, published, floor=tolerance(row))

    sampler = OdeSampler(row["method"], row["num_steps"], interval=(low, high), **settings_of(row))
    if torch.isfinite(right).all():
        got = sampler.encode(process, model, z, return_trajectory=True)
        floor = max(tolerance(row), 4 * float32_error(sampler, process, model, z))
        assert_close(key + "_sit", got, right, floor=floor)
    else:
        # The published interval starts where sigma = 0; ours does not.
        assert row["path"] == "VP"
        for interval in (None, (0.0, 0.999)):
            check_encode_by_itself(
                OdeSampler(row["method"], row["num_steps"], interval=interval), process, model, z
            )


def float32_error(sampler, process, model, z):
    single = sampler.encode(process, model, z, return_trajectory=True)
    double = sampler.encode(process, model, z.double(), return_trajectory=True)
    return (single - double).abs().max().item()


def check_encode_by_itself(sampler, process, model, z):
    single = sampler.encode(process, model, z)
    double = sampler.encode(process, model, z.double())
    assert_close("float32 against float64", single, double)


def check_dopri5(fixture, row, reads):
    """`torchdiffeq/dopri5` equals torchdiffeq in float64; `dopri5` equals the solution within its tolerance."""
    process, model = build(fixture, row)
    z, key = reads["sampler/z"], row["key"]
    tolerance(row)
    if key in reads:
        check_finite(row, reads[key])
    check_own_dopri5(row, process, model, z, None)
    if row["path"] == "VP":
        check_own_dopri5(row, process, model, z, (0.0, 0.999))
    drift = drift_of(process, model)
    interval = tuple(sorted(row["interval"]))
    times = torch.linspace(*row["interval"], row["num_steps"], dtype=torch.float64)
    if row["reverse"] and key in reads:

        def doubly(x, t):
            return drift(x, 1 - t)

        got = torchdiffeq_run(row, doubly, z.double(), times)
        truth = (
            ODE_SOLVERS.get("dopri5").solve(doubly, z.double(), times.tolist(), TIGHT, keep=True).trajectory
        )
        compare_stored(row, reads[key], got, truth)
        key += "_sit"

    want = torchdiffeq_run(row, drift, z.double(), times)
    sampler = OdeSampler(
        "torchdiffeq/dopri5", row["num_steps"], interval=interval, last_step=False, **settings_of(row)
    )
    run = sampler.encode if row["reverse"] else sampler.sample
    if want is None:
        with pytest.raises(SamplingError):
            run(process, model, z.double())
    else:
        got = run(process, model, z.double(), return_trajectory=True)
        assert_close(f"{key} against torchdiffeq", got, want, of_max=1e-9)
    if key in reads:
        truth = solution(row, process, model, z, interval)
        # The stored float32 error is that of the published double reversal. Of the right one the first step may be
        # arbitrary: under GVP the drift at t = 1 is 0 but for float32's cos(pi / 2).
        compare_stored(row, reads[key], None if row["reverse"] else want, truth)


def compare_stored(row, stored, float64, truth):
    name = row["key"]
    if float64 is not None:
        assert_close(f"{name}: stored in float32", float64, stored, floor=tolerance(row))
    else:
        # torchdiffeq overflows in float64 where its float32 run, which is stored, came through; or it says nothing of
        # float32's error.
        assert_close(f"{name}: stored against the solution", stored, truth, of_max=1e-2)


def solution(row, process, model, z, interval):
    sampler = OdeSampler(
        "dopri5", row["num_steps"], TIGHT.atol, TIGHT.rtol, interval=interval, last_step=False
    )
    run = sampler.encode if row["reverse"] else sampler.sample
    return run(process, model, z.double(), return_trajectory=True)


def check_own_dopri5(row, process, model, z, interval):
    truth = solution(row, process, model, z, interval)
    for atol, rtol in ((row["atol"], row["rtol"]), (row["atol"] / 100, row["rtol"] / 100)):
        sampler = OdeSampler("dopri5", row["num_steps"], atol, rtol, interval=interval, last_step=False)
        run = sampler.encode if row["reverse"] else sampler.sample
        for start in (z, z.double()):
            got = run(process, model, start, return_trajectory=True)
            assert_close(f"{row['key']} own {start.dtype} at {rtol:g}", got, truth, of_max=30 * rtol)


def torchdiffeq_run(row, drift, z, times):
    """torchdiffeq called directly; None where it fails, which it does on VP by stepping beyond the interval."""
    from torchdiffeq import odeint

    def function(t, x):
        return drift(x, t.expand(len(x)))

    try:
        states = odeint(function, z, times, method="dopri5", atol=row["atol"], rtol=row["rtol"])
    except AssertionError:
        states = None
    if states is None or not torch.isfinite(states).all():
        assert row["path"] == "VP"
        return None
    return states


def check_sde(fixture, case, reads):
    row = rows_by_key(fixture)[case]
    process, model = build(fixture, row)
    noise = reads["sampler/noise"]
    want, z = reads[case], reads["sampler/z"]
    check_finite(row, want)
    kwargs = {
        "diffusion_form": row["diffusion_form"],
        "diffusion_norm": row["diffusion_norm"],
        "last_step": row["last_step"],
        "last_step_size": row["last_step_size"],
    }
    sampler = SdeSampler(row["method"], row["num_steps"], **kwargs)
    if process.sample_eps == row["sample_eps"]:
        ends = torch.tensor([sampler.times(process)[0], sampler.times(process)[-1]])
        assert_close("interval", ends, torch.tensor(row["interval"]), of_max=1e-6)
    sampler = SdeSampler(row["method"], row["num_steps"], interval=tuple(row["interval"]), **kwargs)

    def run(x):
        return sampler.sample(process, model, x, noise=lambda step, x: noise[step], return_trajectory=True)

    single, double = run(z), run(z.double())
    floor = tolerance(row)
    if "error" in row:
        # Stored with a repair, without its own float32 error: ours stands in for it.
        floor = 4 * (single - double).abs().max().item()
    assert_close(case, single, want, floor=floor)
    assert_close(f"{case} float64", double, want, floor=floor)


def check_likelihood(fixture, case, reads):
    row = rows_by_key(fixture)[case]
    process, model = build(fixture, row)
    x, logp, z = (reads[f"{case}/{k}"] for k in ("x", "logp", "z"))
    if row["method"] == "dopri5":
        check_likelihood_dopri5(row, process, model, x, logp, z)
        return
    assert list(process.interval("ode")) == pytest.approx(row["interval"], abs=1e-12)
    bits = reads[f"{case}/randint01"]

    def probe(evaluation):
        return (2 * bits[evaluation] - 1).unsqueeze(0)

    def run(x, interval=None):
        sampler = OdeSampler(row["method"], row["num_steps"], interval=interval, **settings_of(row))
        result = sampler.log_likelihood(process, model, x, probe=probe)
        assert sampler.num_function_evaluations == row["function_evals"]
        return result

    for interval in (None, (0.0, 0.999)) if not row["finite"] else (None,):
        single, double = run(x, interval), run(x.double(), interval)
        floor = 4 * (single.log_density - double.log_density).abs().max().item()
        assert_close(f"{case} float32 against float64", single.x0, double.x0)
        assert_close(f"{case} float32 against float64", single.log_density, double.log_density, of_max=1e-3)
    if row["finite"]:
        assert_close(f"{case}/logp", single.log_density, logp, floor=floor)
        assert_close(f"{case}/z", single.x0, z)
        assert_close(f"{case}/logp float64", double.log_density, logp, floor=floor)
    else:
        assert not torch.isfinite(logp).any()
        assert not torch.isfinite(z).any()


def check_likelihood_dopri5(row, process, model, x, logp, z):
    """A linear drift, dx/dt = A x + b t, has a closed form, and so has its density."""
    assert row["interval"] == [0, 1] and row["finite"]
    # Rounding decides how many steps are accepted, so that the stored count says only that there were some.
    assert row["function_evals"] > 0
    x0, density, diagonal = linear_flow(model, x.double())
    for method in ("dopri5", "torchdiffeq/dopri5"):
        # One Rademacher probe is exact where A is diagonal.
        for trace in ("exact", "hutchinson") if diagonal else ("exact",):
            got = OdeSampler(method, row["num_steps"], row["atol"], row["rtol"]).log_likelihood(
                process, model, x, trace=trace
            )
            assert_close(f"{method} {trace} logp", got.log_density, density, of_max=1e-3)
            assert_close(f"{method} {trace} z", got.x0, x0, of_max=1e-3)
    if diagonal:
        assert_close("stored logp", logp, density, of_max=1e-3)
    assert_close("stored z", z, x0, of_max=1e-3)
    tight = OdeSampler("dopri5", atol=1e-12, rtol=1e-11).log_likelihood(
        process, model, x.double(), trace="exact"
    )
    assert_close("closed form", tight.log_density, density, of_max=1e-9)


def linear_flow(model, x1):
    """Noise and log density of x1 (B, D) under dx/dt = A x + b t, and whether A is diagonal.

    (x, t, 1) obeys a linear equation without a forcing, of which the matrix exponential is the flow.
    """
    a, b = (torch.tensor(model.spec[k], dtype=torch.float64) for k in ("A", "b"))
    dim = len(b)
    whole = torch.zeros(dim + 2, dim + 2, dtype=torch.float64)
    whole[:dim, :dim], whole[:dim, dim], whole[dim, dim + 1] = a, b, 1.0
    flow = torch.linalg.matrix_exp(whole)
    x0 = torch.linalg.solve(flow[:dim, :dim], (x1 - flow[:dim, dim + 1]).T).T
    density = -0.5 * (x0**2).sum(1) - dim * HALF_LOG_TAU - a.trace()
    return x0, density, torch.equal(a, torch.diag(a.diagonal()))
