"""Checks of the fixture kinds dim.*: model, scan orders, pad layouts, positions, initialization, sampling."""

import math

import numpy as np
import torch

from scans import composed_walk, get_scan, mirrored_schedule
from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import NUMBER, Fixture, parity_kind
from tests.parity.initialization import check_statistics
from tests.parity.kinds_diffusion_models import sibling
from tests.parity.kinds_dim_upsample import check_upsampled, check_upsampled_sample
from tests.parity.settings import dpm_solver
from zigflow.models.dim import PAD_LAYOUTS, DiM, padded_layout
from zigflow.nn import interpolate_positions
from zigflow.official import load_official, official_arguments
from zigflow.processes import BETAS, StableDiffusion, VariancePreserving
from zigflow.samplers import Guided, SdeSampler

# Published name of a direction -> path of the scan "sweep4".
DIRECTIONS = {0: 0, -2: 1, 1: 2, -1: 3}


@parity_kind("dim.model", cases=lambda f: ["float32", *(["float64"] if "out_f64" in f.tensors else [])])
def check_model(fixture: Fixture, case: str) -> None:
    meta, t = fixture.meta, fixture.tensors
    model = load_official("dim", meta["kwargs"].plain(), fixture.under("param.")).to(getattr(torch, case))
    x = t["in.x"].to(getattr(torch, case), copy=True).requires_grad_()
    times = t["in.t"].to(x.dtype) if t["in.t"].is_floating_point() else t["in.t"]
    out = model(x, times, t.get("in.y", None))
    if case == "float64":
        assert_close("out_f64", out, t["out_f64"], of_max=1e-9)
        return
    if "param_count" in meta:
        assert sum(p.numel() for p in model.parameters()) == meta["param_count"]
    if "tensors" in meta:
        assert list(model.state_dict()) == fixture.listed("param.")
    if "scan_pattern_chain" in meta:
        check_chain(model, meta["scan_pattern_chain"], meta["kwargs"])
    for block, weight in meta.get("skip_tune_weights_as_run", {}).items():
        own = model.skip_weights(t["in.t"], model.joining)[int(block) - model.depth + model.joining]
        assert_close(f"skip weight {block}", own, torch.full_like(own, weight), of_max=1e-7)
    assert_close("out", out, t["out"], floor=fixture.tolerance())
    (out * t["grad_weight"]).sum().backward()
    of_max = max(GRADIENT_RTOL_OF_MAX, fixture.gradient_tolerance())
    assert_close("grad x", x.grad, t["grad.in.x"], of_max=of_max)
    stored = fixture.under("grad.param.")
    assert stored
    for name, want in stored.items():
        assert_close(name, model.get_parameter(name).grad, want, of_max=of_max)
    if "upsample" in meta:
        check_upsampled(model, fixture)


def check_chain(model: DiM, chain: list, kwargs) -> None:
    """Every block's path is that of the published chain of (before, now)."""
    layout = padded_layout(*model.grid, model.num_pads, model.pad_layout, model.num_split)
    paths = get_scan("sweep4")(*layout.body_shape)
    schedule, front = model.walk(model.grid)[0], layout.num_prefix
    assert len(schedule) == len(chain)
    for layer, (before, now) in enumerate(chain):
        # The published blocks leave the order alone where scan_pattern_len says so, whatever their chain holds.
        direction = now if kwargs.get("scan_pattern_len", 3) > 0 else 0
        order = schedule[layer].path.order
        assert order[:front].tolist() == list(range(front))
        np.testing.assert_array_equal(
            order[front:] - front, paths[DIRECTIONS[direction]].order, err_msg=f"layer {layer}"
        )
        assert before == (chain[layer - 1][1] if layer else 0)


@parity_kind("dim.scan_orders")
def check_orders(fixture: Fixture, case: str) -> None:
    for item in fixture.meta["items"]:
        h, w, pads, depth = item["H"], item["W"], item["pad_len"], item["num_layers"]
        layout = padded_layout(h, w, pads, "lateral", item.get("num_split", pads))
        assert layout.body_shape == (h + pads, w + pads)
        front = layout.num_prefix
        assert (layout.positions - front).tolist() == item["x_positions_in_padded_seq"]
        learned = np.flatnonzero(layout.source[front:] >= h * w)
        assert learned.tolist() == item["pad_positions"]
        paths = get_scan("sweep4")(*layout.body_shape)
        orders = item["order_by_pattern"].plain()
        for direction, order in orders.items():
            assert paths[DIRECTIONS[int(direction)]].order.tolist() == order
        arguments = official_arguments(
            "dim",
            {
                "scan_pattern_len": item["scan_pattern_len"],
                "encoder_start_blk_id": item["encoder_start_blk_id"],
            },
        )
        paths = paths[: arguments["num_paths"]]
        schedule = mirrored_schedule(layout, paths, depth, arguments["plain_blocks"])
        walk = composed_walk(layout, schedule)
        tokens = np.arange(len(layout))
        for layer, (before, now) in enumerate(item["chain"]):
            want = np.array(orders[str(now)])
            assert before == (item["chain"][layer - 1][1] if layer else 0), f"layer {layer}"
            np.testing.assert_array_equal(schedule[layer].path.order, np.r_[:front, want + front])
            if layer:
                previous = np.array(orders[str(before)])
                tokens = tokens[walk.moves[layer - 1].order]
                assert walk.moves[layer - 1].is_identity == np.array_equal(previous, want)
            np.testing.assert_array_equal(tokens, np.r_[:front, want + front])


@parity_kind("dim.pad_layouts")
def check_layouts(fixture: Fixture, case: str) -> None:
    for item in fixture.meta["items"]:
        h, w, pads = item["H"], item["W"], item["P"]
        names = [name for name in item if name not in ("H", "W", "P")]
        assert names and set(names) <= set(PAD_LAYOUTS)
        for name in names:
            layout = padded_layout(h, w, pads, name, pads)
            body = layout.source[layout.num_prefix :]
            own = np.where(body < h * w, body + 1, -(body - h * w - layout.num_prefix + 1))
            assert own.reshape(layout.body_shape).tolist() == item[name]


@parity_kind("dim.pos_interp")
def check_positions(fixture: Fixture, case: str) -> None:
    table = fixture.tensors["in.pos"]
    extras = int(fixture.setting("extras", r"extra \((\d+)\) tokens", r"(\d+) extra tokens"))
    side = math.isqrt(table.shape[1] - extras)
    assert side**2 == table.shape[1] - extras
    for name, want in fixture.under("out.").items():
        grid = (side, side) if name == "same" else tuple(map(int, name.split("x")))
        own = interpolate_positions(table, (1, side, side), (1, *grid), mode=DiM.position_mode, extras=extras)
        assert_close(name, own, want)


@parity_kind("dim.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    torch.manual_seed(0)
    own = dict(DiM(**official_arguments("dim", fixture.meta["kwargs"].plain())).named_parameters())
    stored = fixture.meta["stats"]
    assert list(own) == list(stored)
    for name, want in stored.items():
        check_statistics(name, own[name].detach(), want)


def source_of(fixture: Fixture) -> Fixture:
    """The fixture whose weights this one uses."""
    return sibling(fixture, fixture.meta["weights"].removesuffix(".safetensors"))


def stored_model(fixture: Fixture) -> torch.nn.Module:
    source = source_of(fixture)
    return load_official("dim", source.meta["kwargs"].plain(), source.under("param."))


@parity_kind("dim.vpsde")
def check_vpsde(fixture: Fixture, case: str) -> None:
    t, model = fixture.tensors, stored_model(fixture)
    process = VariancePreserving(
        beta_min=fixture.setting("beta_min", rf"betas? (?:from )?({NUMBER})(?:\.\.| to )"),
        beta_max=fixture.setting("beta_max", rf"betas? (?:from )?{NUMBER}(?:\.\.| to )({NUMBER})"),
    )
    assert process.net_scale == fixture.setting("net_scale", rf"net time ({NUMBER}) ?\* ?t")
    eps = fixture.setting("eps", rf"linspace\(({NUMBER}),")
    condition = t.get("in.y", None)
    time = 1 - t["in.t"]
    assert_close("x_t", process.interpolate(t["in.x0"], t["in.noise"], time), t["x_t"])
    assert_close("loss", process.loss(model, t["in.x0"], t["in.noise"], time, condition), t["loss"])
    for name in fixture.names("out."):
        sampler = SdeSampler(
            "Euler",
            fixture.meta["steps"],
            diffusion_form="SBDM",
            diffusion_norm={"ode": 0.0, "sde": 1.0}[name],
            last_step="Mean",
            last_step_size=eps,
        )
        got = sampler.sample(process, model, t["in.x_init"], condition, noise=lambda k, x: t["noises"][k])
        assert_close(name, got, t[f"out.{name}"])
    assert not fixture.names("out.") or t["noises"].shape[0] >= fixture.meta["steps"] - 1


def guided_model(fixture: Fixture, model, process, condition, *more):
    """With the published scale s = w - 1 of the JSON, of ``more`` mappings, or the prose; unguided without labels."""
    if condition is None:
        return model
    told = [settings["cfg_scale"] for settings in (fixture.meta, *more) if "cfg_scale" in settings]
    scale = (
        told[0]
        if told
        else fixture.setting("cfg_scale", rf"(?:cfg|guidance) scale(?: ?[:=]| of)? ?({NUMBER})")
    )
    return Guided(model, 1 + scale, process=process)


@parity_kind("dim.sample")
def check_sample(fixture: Fixture, case: str) -> None:
    t, meta, model, process = fixture.tensors, fixture.meta, stored_model(fixture), StableDiffusion()
    condition = t.get("in.y", None)
    if "m" in meta:
        source = source_of(fixture)
        guided = guided_model(
            fixture, model, process, condition, source.meta, source.meta.get("upsample", {})
        )
        check_upsampled_sample(guided, process, fixture, source, condition)
        return
    guided = guided_model(fixture, model, process, condition)
    counts = meta["steps"] if isinstance(meta["steps"], list) else [meta["steps"]]
    assert sorted(counts) == fixture.numbered("out.")
    for steps in counts:
        got = dpm_solver("dpm_solver++", steps, fixture).sample(process, guided, t["in.z"], condition)
        assert_close(f"{steps} steps", got, t[f"out.{steps}"])


@parity_kind("dim.dpm_solver")
def check_dpm_solver(fixture: Fixture, case: str) -> None:
    meta, t, process = fixture.meta, fixture.tensors, StableDiffusion()
    table = BETAS.get("scaled_linear")(process.steps)
    for n, want in meta["betas"].items():
        assert_close(f"beta {n}", table[int(n)], torch.tensor(want, dtype=torch.float64), of_max=1e-9)
    assert set(meta["cum_alphas"]) == set(meta["cum_betas"]) == set(meta["snr"])
    for n, want in meta["cum_alphas"].items():
        if n == "0":
            # The data themselves; times begin at n = 1.
            assert (want, meta["cum_betas"][n], float(meta["snr"][n])) == (1.0, 0.0, math.inf)
            continue
        t_n = 1 - torch.tensor([int(n) / 1000.0], dtype=torch.float64)
        assert_close(f"alpha bar {n}", process.path.alpha(t_n) ** 2, torch.tensor([want]), of_max=1e-6)
        assert_close(
            f"beta bar {n}", process.path.sigma(t_n) ** 2, torch.tensor([meta["cum_betas"][n]]), of_max=1e-6
        )
        assert_close(f"SNR {n}", process.path.log_snr(t_n).exp(), torch.tensor([meta["snr"][n]]), of_max=1e-6)
    calls = []

    def toy(x: torch.Tensor, net_time: torch.Tensor, y=None) -> torch.Tensor:
        s = net_time.to(x) / 1000
        calls.append(s[0].item())
        s = s[:, None]
        return 0.9 * torch.tanh(x * (0.5 + s)) + 0.1 * torch.sin(7 * s)

    for name, want in fixture.under("out.").items():
        form, _, steps = name.partition(".")
        method = {"pp": "dpm_solver++", "noise": "dpm_solver"}[form]
        sampler = dpm_solver(method, int(steps), fixture)
        calls.clear()
        got = sampler.sample(process, toy, t["in.x"])
        assert_close(name, got, want)
        assert sampler.num_function_evaluations == len(calls) == meta["nfe"][name]
        # The stored times are rounded to seven digits.
        assert_close(f"{name}: times", torch.tensor(calls), torch.tensor(meta["calls"][steps]), of_max=1e-6)
