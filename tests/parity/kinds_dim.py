"""Checks of the fixture kinds dim.*: model, scan orders, pad layouts, positions, initialization, sampling."""

import numpy as np
import torch

from scans import composed_walk, get_scan, mirrored_schedule
from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from tests.parity.kinds_diffusion_models import sibling
from tests.parity.kinds_dim_upsample import check_upsampled, check_upsampled_sample
from zigflow.models.dim import DiM, padded_layout
from zigflow.nn import interpolate_positions
from zigflow.official import load_official, official_arguments
from zigflow.processes import StableDiffusion, VariancePreserving
from zigflow.samplers import DpmSolver, Guided, SdeSampler

# Published name of a direction -> path of the scan "sweep4".
DIRECTIONS = {0: 0, -2: 1, 1: 2, -1: 3}


@parity_kind("dim.model")
def check_model(fixture: Fixture, case: str) -> None:
    meta, t = fixture.meta, fixture.tensors
    model = load_official("dim", meta["kwargs"], fixture.under("param."))
    assert sum(p.numel() for p in model.parameters()) == meta["param_count"]
    assert list(model.state_dict()) == list(fixture_names(meta, "param."))
    paths = get_scan("sweep4")(*padded_layout(*model.grid, 3, model.pad_layout, 3).body_shape)
    schedule = model.walk(model.grid)[0]
    for layer, (_, direction) in enumerate(meta["scan_pattern_chain"]):
        np.testing.assert_array_equal(
            schedule[layer].path.order[5:] - 5, paths[DIRECTIONS[direction]].order, err_msg=f"layer {layer}"
        )
    for block, weight in meta.get("skip_tune_weights_as_run", {}).items():
        own = model._skip_weights(t["in.t"])[int(block) - model.depth + model.joining]
        assert_close(f"skip weight {block}", own, torch.full_like(own, weight), of_max=1e-7)
    x = t["in.x"].requires_grad_()
    out = model(x, t["in.t"], t.get("in.y"))
    assert_close("out", out, t["out"])
    (out * t["grad_weight"]).sum().backward()
    assert_close("grad x", x.grad, t["grad.in.x"], of_max=GRADIENT_RTOL_OF_MAX)
    stored = fixture.under("grad.param.")
    assert stored
    for name, want in stored.items():
        assert_close(name, model.get_parameter(name).grad, want, of_max=GRADIENT_RTOL_OF_MAX)
    if "upsample" in meta:
        check_upsampled(model, meta["upsample"], t)


def fixture_names(meta: dict, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in meta["tensors"] if name.startswith(prefix)]


@parity_kind("dim.scan_orders")
def check_orders(fixture: Fixture, case: str) -> None:
    for item in fixture.meta["items"]:
        h, w, pads, depth = item["H"], item["W"], item["pad_len"], item["num_layers"]
        layout = padded_layout(h, w, pads, "lateral", 3)
        assert layout.body_shape == (h + pads, w + pads)
        front = layout.num_prefix
        assert (layout.positions - front).tolist() == item["x_positions_in_padded_seq"]
        learned = np.flatnonzero(layout.source[front:] >= h * w)
        assert learned.tolist() == item["pad_positions"]
        paths = get_scan("sweep4")(*layout.body_shape)
        for direction, order in item["order_by_pattern"].items():
            assert paths[DIRECTIONS[int(direction)]].order.tolist() == order
        schedule = mirrored_schedule(layout, paths, depth)
        walk = composed_walk(layout, schedule)
        tokens = np.arange(len(layout))
        for layer, (before, now) in enumerate(item["chain"]):
            want = np.array(item["order_by_pattern"][str(now)])
            np.testing.assert_array_equal(schedule[layer].path.order, np.r_[:front, want + front])
            if layer:
                previous = np.array(item["order_by_pattern"][str(before)])
                tokens = tokens[walk.moves[layer - 1].order]
                assert walk.moves[layer - 1].is_identity == np.array_equal(previous, want)
            np.testing.assert_array_equal(tokens, np.r_[:front, want + front])


@parity_kind("dim.pad_layouts")
def check_layouts(fixture: Fixture, case: str) -> None:
    for item in fixture.meta["items"]:
        h, w, pads = item["H"], item["W"], item["P"]
        for name in ("lateral", "rho_pad"):
            layout = padded_layout(h, w, pads, name, 3)
            body = layout.source[layout.num_prefix :]
            own = np.where(body < h * w, body + 1, -(body - h * w - layout.num_prefix + 1))
            assert own.reshape(layout.body_shape).tolist() == item[name]


@parity_kind("dim.pos_interp")
def check_positions(fixture: Fixture, case: str) -> None:
    table = fixture.tensors["in.pos"]
    for name, want in fixture.under("out.").items():
        side = round((want.shape[1] - 2) ** 0.5)
        own = interpolate_positions(table[:, 2:], (1, 4, 4), (1, side, side), mode="bilinear")
        assert_close(name, torch.cat([table[:, :2], own], dim=1), want)


@parity_kind("dim.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    torch.manual_seed(0)
    own = dict(DiM(**official_arguments("dim", fixture.meta["kwargs"])).named_parameters())
    stored = fixture.meta["stats"]
    assert list(own) == list(stored)
    for name, want in stored.items():
        check_statistics(name, own[name].detach(), want)


def stored_model(fixture: Fixture) -> torch.nn.Module:
    """The model whose weights the fixture uses."""
    source = sibling(fixture, fixture.meta["weights"].removesuffix(".safetensors"))
    return load_official("dim", source.meta["kwargs"], source.under("param."))


@parity_kind("dim.vpsde")
def check_vpsde(fixture: Fixture, case: str) -> None:
    t, model, process = fixture.tensors, stored_model(fixture), VariancePreserving()
    time = 1 - t["in.t"]
    assert_close("x_t", process.interpolate(t["in.x0"], t["in.noise"], time), t["x_t"])
    assert_close("loss", process.loss(model, t["in.x0"], t["in.noise"], time), t["loss"])
    for name, norm in (("ode", 0.0), ("sde", 1.0)):
        sampler = SdeSampler(
            "Euler",
            fixture.meta["steps"],
            diffusion_form="SBDM",
            diffusion_norm=norm,
            last_step="Mean",
            last_step_size=1e-3,
        )
        got = sampler.sample(process, model, t["in.x_init"], noise=lambda k, x: t["noises"][k])
        assert_close(name, got, t[f"out.{name}"])


@parity_kind("dim.sample")
def check_sample(fixture: Fixture, case: str) -> None:
    """With guidance; published scales s are w - 1."""
    t, model, process = fixture.tensors, stored_model(fixture), StableDiffusion()
    if "m" in fixture.meta:
        check_upsampled_sample(model, fixture)
        return
    guided = Guided(model, 1 + fixture.meta["cfg_scale"], process=process)
    for steps in fixture.meta["steps"]:
        got = DpmSolver("dpm_solver++", "fast", steps, 3, "time_uniform", last_step=False).sample(
            process, guided, t["in.z"], t["in.y"]
        )
        assert_close(f"{steps} steps", got, t[f"out.{steps}"])


@parity_kind("dim.dpm_solver")
def check_dpm_solver(fixture: Fixture, case: str) -> None:
    meta, t, process = fixture.meta, fixture.tensors, StableDiffusion()
    for n, want in meta["cum_alphas"].items():
        if n == "0":
            continue  # the data themselves; times begin at n = 1
        t_n = 1 - torch.tensor([int(n) / 1000.0], dtype=torch.float64)
        assert_close(f"alpha bar {n}", process.path.alpha(t_n) ** 2, torch.tensor([want]), of_max=1e-6)
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
        sampler = DpmSolver(method, "fast", int(steps), 3, "time_uniform", last_step=False)
        calls.clear()
        got = sampler.sample(process, toy, t["in.x"])
        assert_close(name, got, want)
        assert sampler.num_function_evaluations == len(calls) == meta["nfe"][name]
        # The stored times are rounded to seven digits.
        assert_close(f"{name}: times", torch.tensor(calls), torch.tensor(meta["calls"][steps]), of_max=1e-6)
