"""Second fixtures of DiM's processes and samplers, by the definitions; see make_second_fixtures.py.

Times s run from 1, noise, to 0, data, as published; a noise function takes (x, s).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity import definitions as define
from tests.parity.second_networks import DIM_BASE, model_fixture
from tests.parity.second_processes import Maker, sd_bars

KWARGS = {**DIM_BASE, "num_layers": 3, "in_channels": 1, "out_channels": 1}
LABELS = KWARGS["num_embeds_ada_norm"]


def bar_of(s: float) -> float:
    """alpha^2 of the table at a step, s = n / 1000."""
    n = round(1000 * s)
    assert abs(1000 * s - n) < 1e-6, f"{s} is between two steps"
    return sd_bars()[n - 1].item() if n else 1.0


def solved(
    noise: Callable, x: Tensor, steps: int, end: float, order: int, data: bool
) -> tuple[Tensor, list[float]]:
    """DPM-Solver of order 1 or 2 over so many equal times, two of them a step; the state and the times of its calls."""
    grid = [1 - (1 - end) * i / steps for i in range(steps + 1)]
    calls, x = [], x.double()

    def predicted(x: Tensor, s: float) -> Tensor:
        calls.append(s)
        eps = noise(x, s)
        return (x - math.sqrt(1 - bar_of(s)) * eps) / math.sqrt(bar_of(s)) if data else eps

    def moved(x: Tensor, s: float, r: float, value: Tensor, change: Tensor | float = 0.0) -> Tensor:
        """From s to r, the prediction being ``value``, plus half of ``change`` for its slope."""
        a, b = bar_of(s), bar_of(r)
        h = half_log_snr(b) - half_log_snr(a)
        if data:
            keep, gain = math.sqrt((1 - b) / (1 - a)), -math.sqrt(b) * math.expm1(-h)
        else:
            keep, gain = math.sqrt(b / a), -math.sqrt(1 - b) * math.expm1(h)
        return keep * x + gain * (value + 0.5 * change)

    place = 0
    while place < steps:
        s, value = grid[place], predicted(x, grid[place])
        if order == 1 or place + 1 == steps:
            x, place = moved(x, s, grid[place + 1], value), place + 1
            continue
        middle, r = grid[place + 1], grid[place + 2]
        inner = predicted(moved(x, s, middle, value), middle)
        log_snr = [half_log_snr(bar_of(time)) for time in (s, middle, r)]
        share = (log_snr[1] - log_snr[0]) / (log_snr[2] - log_snr[0])
        x, place = moved(x, s, r, value, (inner - value) / share), place + 2
    return x, calls


def half_log_snr(bar: float) -> float:
    return 0.5 * math.log(bar / (1 - bar))


def toy_solver(maker: Maker) -> None:
    """The solver of order 2, even and odd counts of calls, another end, other entries of the tables."""
    x, end = torch.randn(2, 7), 0.1
    calls, nfe, out = {}, {}, {}

    def noise(x: Tensor, s: float) -> Tensor:
        return 0.9 * torch.tanh(x * (0.5 + s)) + 0.1 * math.sin(7 * s)

    for name, data in (("pp", True), ("noise", False)):
        for steps in (4, 9):
            state, times = solved(noise, x, steps, end, 2, data)
            calls[str(steps)], nfe[f"{name}.{steps}"], out[f"out.{name}.{steps}"] = (
                times,
                len(times),
                state.float(),
            )
    bars, places = sd_bars(), (3, 40, 998)
    betas = 1 - bars / torch.cat([torch.ones(1).double(), bars[:-1]])
    maker.write("dim_toy", {
        "fixture_kind": "dim.dpm_solver", "order": 2, "eps": end, "calls": calls, "nfe": nfe,
        "note": "dpm_solver_pp.DPM_Solver", "betas": {str(n): betas[n].item() for n in places},
        "cum_alphas": {"0": 1.0} | {str(n): bars[n - 1].item() for n in places},
        "cum_betas": {"0": 0.0} | {str(n): 1 - bars[n - 1].item() for n in places},
        "snr": {"0": "inf"} | {str(n): (bars[n - 1] / (1 - bars[n - 1])).item() for n in places},
    }, {"in.x": x, **out})  # fmt: skip


def network(maker: Maker, name: str, extra: dict | None = None) -> tuple[dict, Callable]:
    """A stored DiM of that name; its stored tensors, and its noise (x, net time, labels or None) in float64."""
    kwargs = {**KWARGS, "num_patches": [9, 1]}
    chain = define.dim_chain(3, 1, 3)
    model_fixture(maker, name, "dim", kwargs, torch.tensor([1, 4]), times=[17.5, 900.0], size=(1, 6, 6),
                  extra={"scan_pattern_chain": chain, **(extra or {})})  # fmt: skip
    stored = load_file(maker.folder / f"{name}.safetensors")
    p = {k.removeprefix("param."): v.double() for k, v in stored.items() if k.startswith("param.")}

    def noise(x: Tensor, t: Tensor | float, y: Tensor | None) -> Tensor:
        t = t if isinstance(t, Tensor) else torch.full((len(x),), t)
        y = torch.full((len(x),), LABELS) if y is None else y
        return define.dim_network(p, kwargs, x.double(), t, y)

    return stored, noise


def sampled_dim(maker: Maker) -> None:
    """With labels: order 2, other counts and another scale; without: one count of order 1."""
    _, noise = network(maker, "dim_small")
    z, y, scale = torch.randn(2, 1, 6, 6), torch.tensor([3, 0]), 0.7

    def guided(x: Tensor, s: float) -> Tensor:
        cond = noise(x, 1000 * s, y)
        return cond + scale * (cond - noise(x, 1000 * s, None))

    out = {f"out.{steps}": solved(guided, z, steps, 0.1, 2, True)[0].float() for steps in (2, 5)}
    maker.write("dim_guided", {
        "fixture_kind": "dim.sample", "weights": "dim_small.safetensors", "steps": [2, 5], "order": 2,
        "note": f"dpm_solver_pp, eps .1; guidance scale = {scale}",
    }, {"in.z": z, "in.y": y, **out})  # fmt: skip
    plain = solved(lambda x, s: noise(x, 1000 * s, None), z, 3, 0.04, 1, True)[0]
    maker.write("dim_unguided", {
        "fixture_kind": "dim.sample", "weights": "dim_small.safetensors", "steps": 3, "order": 1, "eps": 0.04,
        "note": "DPM-Solver++",
    }, {"in.z": z, "out.3": plain.float()})  # fmt: skip


def vp_sde(maker: Maker) -> None:
    """Other betas, steps and last step; labels."""
    _, noise = network(maker, "dim_vp")
    low, high, steps, eps, y = 0.2, 15.0, 3, 0.01, torch.tensor([2, 0])
    x1, x0, start = (torch.randn(2, 1, 6, 6) for _ in range(3))
    t, noises = torch.tensor([0.125, 0.75]), torch.randn(steps, 2, 1, 6, 6)

    def scales(t: float) -> tuple[float, float]:
        log_bar = -(low * t + (high - low) * t**2 / 2)
        return math.exp(log_bar / 2), math.sqrt(-math.expm1(log_bar))

    alpha, sigma = (
        torch.tensor(v).double().reshape(-1, 1, 1, 1) for v in zip(*map(scales, t.tolist()), strict=True)
    )
    x_t = alpha * x1 + sigma * x0
    loss = ((noise(x_t, 999 * t.double(), y) - x0) ** 2).mean((1, 2, 3))
    grid, out = [0.0, *(eps + (1 - eps) * i / (steps - 1) for i in range(steps))], {}
    for name, share in (("ode", 0.5), ("sde", 1.0)):
        x = start.double()
        for k, (a, b) in enumerate(zip(grid[:0:-1], grid[-2::-1], strict=True)):
            beta = low + (high - low) * a
            drift = -0.5 * beta * x + share * beta * noise(x, 999 * a, y) / scales(a)[1]
            x = x + drift * (b - a)
            if name == "sde" and b > 0:
                x = x + math.sqrt(beta * (a - b)) * noises[k].double()
        out[f"out.{name}"] = x.float()
    maker.write("dim_vp_sde", {
        "fixture_kind": "dim.vpsde", "weights": "dim_vp.safetensors", "steps": steps, "beta_min": low,
        "note": "VP-SDE, betas from 0.2 to 15; net time 999 * t; grid = [0] + linspace(.01, 1, steps)",
    }, {
        "in.x0": x1, "in.noise": x0, "in.t": t, "in.y": y, "x_t": x_t.float(), "loss": loss.float(), "in.x_init": start,
        "noises": noises, **out,
    })  # fmt: skip


def published_match(t: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(tau, P) as published, in float32: of the steps (999 - i) / 1000, the last at 1e-5, the first i whose ratio is
    nearest to m^2 times that at t gives 1 - i / 999, no more than the first time."""
    bar = np.concatenate([[1.0], sd_bars().numpy()])
    with np.errstate(divide="ignore"):
        ratio = (bar / (1 - bar)).astype(np.float32)
    step = lambda s: int(np.float32(s) * np.float32(1000))  # noqa: E731
    preset = [step(np.float32(i) / np.float32(1000)) if i else step(1e-5) for i in reversed(range(1000))]
    taus, mixed = [], []
    for s in t.tolist():
        distances = [abs(ratio[step(s)] * m**2 - ratio[n]) for n in preset]
        taus.append(1 - int(np.argmin(distances)) / 999)
        mixed.append(bar[step(s)] + (1 - bar[step(s)]) / m**2)
    return torch.tensor(taus).clamp(max=t[0].item()), torch.tensor(mixed)


def blocks(x: Tensor, m: int) -> Tensor:
    b, c, height, width = x.shape
    return x.reshape(b, c, height // m, m, width // m, m).mean((3, 5))


def times_of_upsampling(maker: Maker) -> None:
    """Four times as large, acting for less of the time."""
    t = torch.tensor([0.004, 0.25, 0.5, 0.623, 0.75, 0.9, 0.95, 1.0])
    matched = [published_match(t[i : i + 1], 4) for i in range(len(t))]
    tau, mixed = (torch.cat(parts).tolist() for parts in zip(*matched, strict=True))
    w = [0.5 if s >= 0.75 else 0 for s in t.tolist()]
    table = {"t": t.tolist(), "tau": tau, "P": mixed, "w": w}
    maker.write("dim_taus", {"fixture_kind": "dim.upsample_tau", "tables": {"4": table}})


def upsampled_dim(maker: Maker) -> None:
    """Three times as large, with every number of the guidance changed: the parts at stored times, and a sample."""
    m, theta, eta, end, scale = 3, 0.75, 0.5, 0.9, 1.5
    settings = {
        "m": m,
        "ug_theta": theta,
        "ug_eta": eta,
        "ug_T": end,
        "cfg_scale": scale,
        "null_label": LABELS,
    }
    stored, noise = network(maker, "dim_large", {"upsample": settings})

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        cond = noise(x, t, y)
        return cond + scale * (cond - noise(x, t, None))

    def upsampled(x: Tensor, s: Tensor, y: Tensor) -> dict[str, Tensor]:
        tau, mixed = published_match(s, m)
        at_large, over = guided(x, 1000 * s.double(), y), lambda v: v.double().reshape(-1, 1, 1, 1)
        at_small = guided(blocks(x.double(), m) / over(mixed).sqrt(), 1000 * tau.double(), y)
        w = theta * (s >= (1 - eta) * end)
        change = (at_small / m - blocks(at_large, m)).repeat_interleave(m, 2).repeat_interleave(m, 3)
        return {"t": s, "tau": tau, "P": mixed, "cfg_pred": at_large, "eps_low": at_small, "w": w,
                "out": at_large + over(w) * change}  # fmt: skip

    small = torch.randn(2, 1, 2, 2)
    stored |= {"lo.in.x": small, "lo.out": noise(small, stored["in.t"], stored["in.y"]).float()}
    for i, times in enumerate(([0.95, 0.35], [0.5, 0.46])):
        parts = upsampled(stored["in.x"], torch.tensor(times), stored["in.y"])
        stored |= {f"ug.{i}.{k}": v.float() for k, v in parts.items()}
    meta = maker.read("dim_large")
    # In the order of the state dict, which the file does not keep.
    stored = {k: stored[k] for k in meta["tensors"]} | stored
    maker.write("dim_large", meta, stored, listed=True)
    z, y = torch.randn(2, 1, 6, 6), torch.tensor([1, 3])
    out = solved(lambda x, s: upsampled(x, torch.full((2,), s), y)["out"], z, 3, 0.1, 1, False)[0]
    maker.write("dim_large_sample", {
        "fixture_kind": "dim.sample", "weights": "dim_large.safetensors", "steps": 3, "m": m, "order": 1, "eps": 0.1,
        "note": "dpm_solver_upsample_g",
    }, {"in.z": z, "in.y": y, "out": out.float()})  # fmt: skip


DIM = (toy_solver, sampled_dim, vp_sde, times_of_upsampling, upsampled_dim)
