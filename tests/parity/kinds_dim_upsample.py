"""DiM sampled larger than it was trained: the parts of the stored traces that upsampling adds, and its time tables."""

import torch

from tests.assertions import assert_close
from tests.parity.harness import NUMBER, Fixture, parity_kind
from tests.parity.settings import dpm_solver
from zigflow.processes import StableDiffusion
from zigflow.samplers import Guided, Upsampled
from zigflow.samplers.upsampling import match_as_published, match_exactly, pool, repeat


def upsampled_model(guided, process, fixture: Fixture, settings) -> Upsampled:
    """With the given settings, else the JSON's, else those of the prose; w acts for t >= (1 - eta) T."""

    def read(name: str) -> float:
        if name in settings:
            return settings[name]
        return fixture.setting(name, rf"\b{name.removeprefix('ug_')}[ =:]+({NUMBER})")

    end, eta = read("ug_T"), read("ug_eta")
    return Upsampled(
        guided, process, settings["m"], 1 - (1 - eta) * end, read("ug_theta"), matching="as_published"
    )


@torch.no_grad()
def check_upsampled(model: torch.nn.Module, fixture: Fixture) -> None:
    """The small branch and the guided noise at the stored times, from the times on."""
    meta, t = fixture.meta["upsample"], fixture.tensors
    process = StableDiffusion(num_steps=meta.get("N", 1000))
    y = t.get("in.y", None)
    if y is not None and "null_label" in meta:
        assert model.null_condition(y).tolist() == [meta["null_label"]] * len(y)
    assert_close("small", model(t["lo.in.x"], t["in.t"], y), t["lo.out"])
    guided = Guided(model, 1 + meta["cfg_scale"], process=process)
    m = meta["m"]
    places = fixture.numbered("ug.")
    assert places
    for i in places:
        stored = fixture.under(f"ug.{i}.")
        x, net_time = t["in.x"], 1000 * stored["t"]
        upsampled = upsampled_model(guided, process, fixture, meta)
        tau, scale = match_as_published(process, 1 - stored["t"].double(), m)
        assert_close(f"{i}: tau", 1 - tau, stored["tau"], of_max=1e-6)
        assert_close(f"{i}: P", scale**-2, stored["P"], of_max=1e-6)
        assert_close(f"{i}: guided", guided(x, net_time, y), stored["cfg_pred"])
        small = pool(x, m) * scale[:, None, None, None].float()
        at_small = guided(small, 1000 * (1 - tau).float(), y)
        assert_close(f"{i}: small", at_small, stored["eps_low"])
        out = upsampled(x, net_time, y)
        assert_close(f"{i}: out", out, stored["out"])
        plain = guided(x, net_time, y)
        for row, weight in enumerate(stored["w"].tolist()):
            assert bool(weight) != torch.equal(out[row], plain[row])


def check_upsampled_sample(guided, process, fixture: Fixture, source: Fixture, condition) -> None:
    t, meta = fixture.tensors, fixture.meta
    settings = source.meta.get("upsample", None)
    own = {
        **(settings.plain() if settings is not None else {}),
        **{k: meta[k] for k in meta if k[:3] == "ug_"},
    }
    upsampled = upsampled_model(guided, process, fixture, {**own, "m": meta["m"]})
    sampler = dpm_solver("dpm_solver", meta["steps"], fixture)
    assert_close("out", sampler.sample(process, upsampled, t["in.z"], condition), t["out"])


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
    # The table tells from which of its times on w acts, and how much.
    acting = table["t"][table["w"] > 0]
    acts = Upsampled(
        lambda x, t, y: x, process, m, eta=1 - acting.min().item(), theta=table["w"].max().item()
    )
    for s, w in zip(table["t"], table["w"], strict=True):
        x = torch.randn(1, 1, m, m)
        moved = acts(x, 1000 * s[None]) - x
        tau, scale = match_exactly(process, 1 - s[None].double(), m)
        low = scale.float() * pool(x, m)
        assert_close("moved", moved, repeat(w * (low / m - pool(x, m)), m), floor=1e-6)
