"""DiM sampled larger than it was trained: the parts of the stored traces that upsampling adds, and its time tables."""

import torch

from tests.assertions import assert_close
from tests.parity.harness import Fixture, parity_kind
from zigflow.processes import StableDiffusion
from zigflow.samplers import DpmSolver, Guided, Upsampled
from zigflow.samplers.upsampling import match_as_published, match_exactly, pool

CFG_SCALE = 3.0  # published, w - 1


@torch.no_grad()
def check_upsampled(model: torch.nn.Module, meta: dict, t: dict) -> None:
    """The small branch and the guided noise at four times, from the times on."""
    process = StableDiffusion()
    assert_close("small", model(t["lo.in.x"], t["in.t"], t["in.y"]), t["lo.out"])
    guided = Guided(model, 1 + meta["cfg_scale"], process=process)
    m = meta["m"]
    for i in range(4):
        stored = {k.removeprefix(f"ug.{i}."): v for k, v in t.items() if k.startswith(f"ug.{i}.")}
        x, net_time = t["in.x"], 1000 * stored["t"]
        upsampled = Upsampled(guided, process, m, meta["ug_eta"], meta["ug_theta"], "as_published")
        tau, scale = match_as_published(process, 1 - stored["t"].double(), m)
        assert_close(f"{i}: tau", 1 - tau, stored["tau"], of_max=1e-6)
        assert_close(f"{i}: P", scale**-2, stored["P"], of_max=1e-6)
        assert_close(f"{i}: guided", guided(x, net_time, t["in.y"]), stored["cfg_pred"])
        small = pool(x, m) * scale[:, None, None, None].float()
        at_small = guided(small, 1000 * (1 - tau).float(), t["in.y"])
        assert_close(f"{i}: small", at_small, stored["eps_low"])
        out = upsampled(x, net_time, t["in.y"])
        assert_close(f"{i}: out", out, stored["out"])
        assert bool(stored["w"][0]) != torch.equal(out, guided(x, net_time, t["in.y"]))


def check_upsampled_sample(model: torch.nn.Module, fixture: Fixture) -> None:
    t, process = fixture.tensors, StableDiffusion()
    guided = Guided(model, 1 + CFG_SCALE, process=process)
    upsampled = Upsampled(guided, process, fixture.meta["m"], matching="as_published")
    sampler = DpmSolver("dpm_solver", "fast", fixture.meta["steps"], 3, "time_uniform", last_step=False)
    assert_close("out", sampler.sample(process, upsampled, t["in.z"], t["in.y"]), t["out"])


@parity_kind("dim.upsample_tau", lambda fixture: list(fixture.meta["tables"]))
def check_tau(fixture: Fixture, case: str) -> None:
    """Also how near the published steps come to the exact times."""
    process, m = StableDiffusion(), int(case)
    table = {k: torch.tensor(v) for k, v in fixture.meta["tables"][case].items()}
    # Every time by itself: the published tau is bounded by the first sample's time.
    t = 1 - table["t"].double()
    published = [match_as_published(process, t[i : i + 1], m) for i in range(len(t))]
    tau, scale = (torch.cat(parts) for parts in zip(*published, strict=True))
    assert_close("tau", 1 - tau, table["tau"], of_max=1e-6)
    assert_close("P", scale**-2, table["P"], of_max=1e-6)
    exact, exact_scale = match_exactly(process, t, m)
    assert_close("exact tau", exact, tau, floor=3e-3)
    assert_close("exact scale", exact_scale, scale, floor=5e-3)
    acts = Upsampled(lambda x, t, y: x, process, m)
    for s, w in zip(table["t"], table["w"], strict=True):
        x = torch.randn(1, 1, m, m)
        assert torch.equal(acts(x, 1000 * s[None]), x) == (w == 0)
