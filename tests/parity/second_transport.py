"""Second fixtures of SiT's transport, by its formulas; see make_second_fixtures.py.

Times run from 0, noise, to 1, data.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.parity.second_processes import Maker

FORMS: dict[str, Callable] = {
    "constant": lambda p, t, norm: norm + 0 * t,
    "SBDM": lambda p, t, norm: norm * p["gain"],
    "sigma": lambda p, t, norm: norm * p["sigma"],
    "linear": lambda p, t, norm: norm * (1 - t),
    "decreasing": lambda p, t, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "inccreasing-decreasing": lambda p, t, norm: norm * torch.sin(math.pi * t) ** 2,
}


def plan(path: str, t: Tensor) -> dict[str, Tensor]:
    """alpha, sigma, their derivatives, alpha' / alpha = "rate", and "gain" = rate sigma^2 - sigma sigma'."""
    if path == "Linear":
        alpha, sigma, d_alpha, d_sigma = t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    elif path == "GVP":
        angle = 0.5 * math.pi * t
        alpha, sigma = angle.sin(), angle.cos()
        d_alpha, d_sigma = 0.5 * math.pi * sigma, -0.5 * math.pi * alpha
    else:
        s = 1 - t
        alpha = torch.exp(-0.25 * s**2 * 19.9 - 0.05 * s)
        sigma = (1 - alpha**2).sqrt()
        d_alpha = alpha * (0.5 * s * 19.9 + 0.05)
        d_sigma = -alpha * d_alpha / sigma
    rate = d_alpha / alpha
    return {"alpha": alpha, "sigma": sigma, "d_alpha": d_alpha, "d_sigma": d_sigma, "d_alpha_over_alpha": rate,
            "rate": rate, "gain": rate * sigma**2 - sigma * d_sigma}  # fmt: skip


def interval(
    path: str, prediction: str, eps: float, form: str | None = None, last: float = 0.0
) -> list[float]:
    """The published rule; with a diffusion ``form`` that of the SDE."""
    low, high = 0.0, 1.0
    if path == "VP":
        high = 1 - last if last else 1 - eps
    elif prediction != "velocity" or form:
        low = eps if prediction != "velocity" or form == "SBDM" else 0.0
        high = 1 - last if last else 1 - eps
    return [low, high]


def intervals(maker: Maker) -> None:
    """Other given ends, forms and last steps; of the default ends those of every path."""
    rows = []
    for impl, path, prediction, train, sample in (
        ("sit", "Linear", "velocity", 0.02, 0.03), ("sit", "GVP", "noise", 0.02, 0.03),
        ("sit", "VP", "score", None, None), ("sit", "Linear", "score", None, None),
        ("sit", "VP", "velocity", 0.2, 0.25), ("zigma", "GVP", "noise", 0.02, 0.03),
        ("zigma", "VP", "score", None, None),
    ):  # fmt: skip
        row = {"impl": impl, "path": path, "prediction": prediction, "train_eps_given": train,
               "sample_eps_given": sample}  # fmt: skip
        default = 1e-5 if path == "VP" else 1e-3
        ends = [default if train is None else train, 1e-3 if sample is None else sample]
        ends = [0.0, 0.0] if path != "VP" and prediction == "velocity" else ends
        broken = impl == "zigma" and sample is None
        row |= {"train_eps": ends[0], "sample_eps": None if broken else ends[1]}
        low, high = interval(path, prediction, ends[1])
        found = {"ode": [low, high], "ode_reverse": [1 - low, 1 - high]}
        for form, last in itertools.product(("SBDM", "decreasing"), (0.0, 0.07)):
            found[f"sde/{form}/last_step_size={last}"] = interval(path, prediction, ends[1], form, last)
        row["train"] = interval(path, prediction, ends[0])
        rows.append(row | {k: "TypeError" if broken else v for k, v in found.items()})
    maker.write("intervals", {"fixture_kind": "transport.check_interval", "rows": rows})


def plans() -> dict[str, Tensor]:
    t = torch.tensor([0.0625, 0.3, 0.5625, 0.9])
    names = ("alpha", "sigma", "d_alpha", "d_sigma", "d_alpha_over_alpha")
    return {"plan/t": t} | {
        f"plan/{path}/{name}": plan(path, t.double())[name] for path in ("GVP", "VP") for name in names
    }


def conversions() -> dict[str, Tensor]:
    shape, t = (3, 2, 2, 2), torch.tensor([0.125, 0.5, 0.8125])
    x, x0, x1, out = (torch.randn(shape) for _ in range(4))
    wide = t.double().reshape(-1, 1, 1, 1)
    tensors = {"conv/t": t, "conv/x": x, "conv/x0": x0, "conv/x1": x1, "conv/model_out": out}
    x, x0, x1, out = (v.double() for v in (x, x0, x1, out))
    for path in ("Linear", "VP"):
        p = plan(path, wide)
        ratio = p["alpha"] / p["d_alpha"]
        score = (ratio * out - x) / (p["sigma"] ** 2 - ratio * p["d_sigma"] * p["sigma"])
        velocity = lambda score, p=p: p["rate"] * x + p["gain"] * score  # noqa: E731
        got = {
            "drift_mean": -p["rate"] * x, "drift_var": p["gain"], "score_from_velocity": score,
            "noise_from_velocity": (ratio * out - x) / (ratio * p["d_sigma"] - p["sigma"]),
            "velocity_from_score": velocity(out), "xt": p["alpha"] * x1 + p["sigma"] * x0,
            "ut": p["d_alpha"] * x1 + p["d_sigma"] * x0, "velocity/ode_drift": out, "velocity/score": score,
            "score/ode_drift": velocity(out), "score/score": out, "noise/score": -out / p["sigma"],
            "noise/ode_drift": velocity(-out / p["sigma"]),
        }  # fmt: skip
        got |= {f"diffusion/{form}/norm0.3": law(p, wide, 0.3) for form, law in FORMS.items()}
        tensors |= {f"conv/{path}/{k}": v for k, v in got.items()}
    return tensors


def losses(rows: list) -> dict[str, Tensor]:
    x1, x0, u, weight = (
        torch.randn(3, 5),
        torch.randn(3, 5),
        torch.tensor([0.0, 0.25, 0.875]),
        torch.randn(5, 5),
    )
    tensors = {"loss/x1": x1, "loss/x0": x0, "loss/u": u, "loss/model_W": weight}
    for path, prediction, law, eps in (
        ("GVP", "velocity", None, 0.05), ("Linear", "noise", "velocity", 0.05), ("VP", "score", "likelihood", 0.1),
        ("GVP", "score", None, 0.02),
    ):  # fmt: skip
        low, high = interval(path, prediction, eps)
        t = low + (high - low) * u.double()[:, None]
        p = plan(path, t)
        out = torch.tanh((p["alpha"] * x1 + p["sigma"] * x0) @ weight.double().T) + 0.3 * t
        error = {"velocity": out - p["d_alpha"] * x1 - p["d_sigma"] * x0, "noise": out - x0,
                 "score": out * p["sigma"] + x0}[prediction]  # fmt: skip
        scale = {
            None: 1.0,
            "velocity": (p["gain"] / p["sigma"]) ** 2,
            "likelihood": p["gain"] / p["sigma"] ** 2,
        }[law]
        key = f"loss/{path}/{prediction}/{law}"
        rows.append(
            {"path": path, "prediction": prediction, "loss_weight": law, "train_eps": eps, "key": key}
        )
        tensors |= {f"{key}/loss": (scale * error**2).mean(1), f"{key}/t": t[:, 0]}
    return tensors


MODELS = {
    "gmm": {"w": [0.25, 0.75], "mu": [[1.0, 0.5, -1.0], [-0.5, 0.0, 2.0]], "sd": [0.6, 0.3]},
    "lin": {"A": [[-0.4, 0.9, 0.0], [-1.0, 0.2, 0.3], [0.1, 0.0, 0.5]], "b": [0.5, -0.3, 0.2]},
    "lindiag": {"A": [[-0.4, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.6]], "b": [0.5, -0.3, 0.2]},
}


def velocity_and_score(model: str, path: str, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Of the exact prediction for a mixture, which is the same whichever quantity a network predicts; of A x + b t."""
    p = plan(path, torch.tensor(t, dtype=torch.float64))
    spec = {k: torch.tensor(v, dtype=torch.float64) for k, v in MODELS[model].items()}
    if "A" in spec:
        velocity = x @ spec["A"].T + spec["b"] * t
        return velocity, (velocity - p["rate"] * x) / p["gain"]
    rest = x[:, None] - p["alpha"] * spec["mu"]
    variance = (p["alpha"] ** 2 * spec["sd"] ** 2 + p["sigma"] ** 2)[:, None]
    log_part = (spec["w"] / variance[:, 0] ** (x.shape[1] / 2)).log() - (rest**2 / variance).sum(-1) / 2
    score = -(torch.softmax(log_part, 1)[..., None] * rest / variance).sum(1)
    return p["rate"] * x + p["gain"] * score, score


def integrated(velocity: Callable, x: Tensor, times: list[float], method: str) -> list[Tensor]:
    """The state (B, D) at each time."""
    states = [x]
    for t, s in itertools.pairwise(times):
        h, slope = s - t, velocity(x, t)
        if method == "midpoint":
            slope = velocity(x + 0.5 * h * slope, t + 0.5 * h)
        elif method == "heun2":
            slope = 0.5 * (slope + velocity(x + h * slope, s))
        x = x + h * slope
        states.append(x)
    return states


def spaced(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def row_of(key: str, prediction: str, path: str, eps: float, steps: int, **more) -> dict:
    kind, model = key.split("/")[:2]
    return {"key": key, "kind": kind, "model": model, "path": path, "prediction": prediction, "train_eps": eps,
            "sample_eps": eps, "num_steps": steps, "finite": True, **more}  # fmt: skip


def flows(z: Tensor, rows: list) -> dict[str, Tensor]:
    """Equations without noise: forwards, backwards in both published ways, and to a tolerance."""
    tensors, x = {}, z.double()
    for model, path, prediction, method, steps, eps in (
        ("gmm", "GVP", "noise", "heun2", 6, 0.02), ("gmm", "VP", "score", "euler", 5, 0.05),
        ("lin", "Linear", "velocity", "midpoint", 4, 0.0),
    ):  # fmt: skip
        key = f"ode/{model}/{path}/{prediction}/{method}/n{steps}"
        low, high = interval(path, prediction, eps)
        drift = lambda x, t, model=model, path=path: velocity_and_score(model, path, x, t)[0]  # noqa: E731
        states = integrated(drift, x, spaced(low, high, steps), method)
        shared = {"method": method, "atol": 1e-5, "rtol": 1e-2, "f32_vs_f64": 1e-6}
        rows.append(row_of(key, prediction, path, eps, steps, reverse=False, interval=[low, high], **shared))
        tensors[key] = torch.stack(states)
        if path == "VP":
            continue
        key, back = f"{key}/reverse", spaced(high, low, steps)
        rows.append(row_of(key, prediction, path, eps, steps, reverse=True, interval=[high, low], **shared))
        tensors[key] = torch.stack(integrated(lambda x, t, drift=drift: drift(x, 1 - t), x, back, method))
        tensors[f"{key}_sit"] = torch.stack(integrated(drift, x, back, method))
    key, times = "ode/lin/Linear/velocity/dopri5/n3", spaced(0.0, 1.0, 3)
    rows.append(row_of(key, "velocity", "Linear", 0.0, 3, reverse=False, interval=[0, 1], method="dopri5", atol=1e-7,
                       rtol=1e-4, f32_vs_f64=1e-4))  # fmt: skip
    tensors[key] = torch.stack([solution("lin", x, t) for t in times])
    return tensors


def solution(model: str, x: Tensor, t: float) -> Tensor:
    """dx/dt = A x + b t at a time, from x (B, D) at time 0: (x, t, 1) obeys a linear equation."""
    a, b = (torch.tensor(MODELS[model][k], dtype=torch.float64) for k in ("A", "b"))
    dim = len(b)
    whole = torch.zeros(dim + 2, dim + 2, dtype=torch.float64)
    whole[:dim, :dim], whole[:dim, dim], whole[dim, dim + 1] = a, b, 1.0
    start = torch.cat([x, torch.zeros(len(x), 1), torch.ones(len(x), 1)], 1)
    return (start @ torch.linalg.matrix_exp(t * whole).T)[:, :dim]


def noisy_flows(z: Tensor, noise: Tensor, rows: list) -> dict[str, Tensor]:
    """Both steps, three last steps and none, other forms, sizes and counts."""
    tensors, count = {}, len(noise) + 1
    for path, prediction, method, form, norm, last, size, eps in (
        ("GVP", "noise", "Euler", "decreasing", 0.5, "Mean", 0.1, 0.02),
        ("Linear", "score", "Heun", "SBDM", 0.3, "Tweedie", 0.07, 0.05),
        ("VP", "velocity", "Heun", "sigma", 0.7, "Euler", 0.15, 0.03),
        ("Linear", "noise", "Euler", "linear", 2.0, None, 0.0, 0.05),
    ):
        key = f"sde/gmm/{path}/{prediction}/{method}/{form}/{last}"
        low, high = interval(path, prediction, eps, form, size)
        diffusion = lambda t, path=path, form=form, norm=norm: FORMS[form](plan(path, t), t, norm)  # noqa: E731

        def drift(x: Tensor, t: float, path=path, diffusion=diffusion) -> Tensor:
            velocity, score = velocity_and_score("gmm", path, x, t)
            return velocity + diffusion(torch.tensor(t).double()) * score

        x, states = z.double(), []
        for k, (t, s) in enumerate(itertools.pairwise(spaced(low, high, count))):
            h = s - t
            x = x + (2 * h * diffusion(torch.tensor(t).double())).sqrt() * noise[k].double()
            if method == "Heun":
                slope = drift(x, t)
                x = x + 0.5 * h * (slope + drift(x + h * slope, s))
            else:
                # The drift is that before the noise.
                before = states[-1] if states else z.double()
                x = x + h * drift(before, t)
            states.append(x)
        velocity, score = velocity_and_score("gmm", path, x, high)
        p = plan(path, torch.tensor(high).double())
        ends = {"Mean": lambda: x + size * drift(x, high), "Euler": lambda: x + size * velocity, None: lambda: x,
                "Tweedie": lambda: (x + p["sigma"] ** 2 * score) / p["alpha"]}  # fmt: skip
        states.append(ends[last]())
        rows.append(row_of(key, prediction, path, eps, count, method=method, diffusion_form=form, diffusion_norm=norm,
                           last_step=last, last_step_size=size, interval=[low, high], f32_vs_f64=1e-6))  # fmt: skip
        tensors[key] = torch.stack(states)
    return tensors


def likelihoods(x: Tensor, rows: list) -> dict[str, Tensor]:
    """log p = log N(z) - the integral of the divergence: of Euler's steps with a probe, and of the exact solution."""
    steps, shared = 5, {"atol": 1e-7, "rtol": 1e-4, "interval": [0, 1]}
    prior = lambda z: -0.5 * (z**2).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)  # noqa: E731
    a = {name: torch.tensor(MODELS[name]["A"], dtype=torch.float64) for name in ("lin", "lindiag")}
    bits = torch.randint(2, (steps - 1, *x.shape))
    z, change = x.double(), 0.0
    for k, (t, s) in enumerate(itertools.pairwise(spaced(1.0, 0.0, steps))):
        probe = 2.0 * bits[k].double() - 1
        change = change + (s - t) * ((probe @ a["lin"].T) * probe).sum(1)
        z = z + (s - t) * velocity_and_score("lin", "Linear", z, t)[0]
    key = "llh/lin/Linear/velocity/euler"
    rows.append(
        row_of(key, "velocity", "Linear", 0.0, steps, method="euler", function_evals=steps - 1, **shared)
    )
    tensors = {f"{key}/x": x, f"{key}/randint01": bits, f"{key}/z": z, f"{key}/logp": prior(z) + change}
    # The solution at 1 is z M + c with c that of z = 0.
    still = solution("lindiag", torch.zeros(1, 3).double(), 1.0)
    z = (x.double() - still) / a["lindiag"].diagonal().exp()
    key = "llh/lindiag/Linear/velocity/dopri5"
    rows.append(row_of(key, "velocity", "Linear", 0.0, steps, method="dopri5", function_evals=20, **shared))
    return tensors | {f"{key}/x": x, f"{key}/z": z, f"{key}/logp": prior(z) - a["lindiag"].trace()}


def transport(maker: Maker) -> None:
    """States of three entries, other ends, counts, sizes, tolerances, mixtures and linear equations."""
    loss_rows, rows, z, noise = [], [], torch.randn(3, 3), torch.randn(5, 3, 3)
    tensors = {**plans(), **conversions(), **losses(loss_rows), "sampler/z": z, "sampler/noise": noise}
    tensors |= {**flows(z, rows), **noisy_flows(z, noise, rows), **likelihoods(torch.randn(3, 3), rows)}
    maker.write("transport", {
        "fixture_kind": "transport.transport", "loss": {"rows": loss_rows}, "sampler": {"rows": rows, "models": MODELS},
    }, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})  # fmt: skip


TRANSPORT = (intervals, transport)
