"""Checks of the fixture kinds dis.model, dis.mixer, dis.diffusion and dis.init_stats."""

import torch

from dis_mamba import BiMambaMixer
from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from zigflow.models.dis import DiS
from zigflow.official import load_official, official_arguments
from zigflow.processes import Gaussian
from zigflow.samplers import ChainSampler, Guided


def check_gradients(fixture: Fixture, model: torch.nn.Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """The stored gradients of sum(out * grad_weight)."""
    (out * fixture.tensors["grad_weight"].to(out)).sum().backward()
    assert_close("grad x", x.grad, fixture.tensors["grad.in.x"], of_max=GRADIENT_RTOL_OF_MAX)
    stored = fixture.under("grad.param.")
    assert stored
    for name, want in stored.items():
        assert_close(name, model.get_parameter(name).grad, want, of_max=GRADIENT_RTOL_OF_MAX)


@parity_kind("dis.model", cases=lambda fixture: ["float32", "float64"])
def check_model(fixture: Fixture, case: str) -> None:
    meta, t = fixture.meta, fixture.tensors
    state = fixture.under("param.")
    model = load_official("dis", meta["kwargs"], state).to(getattr(torch, case))
    assert list(model.state_dict()) == [
        name.removeprefix("param.") for name in meta["tensors"] if name[:6] == "param."
    ]
    assert len(model.shard_units()) == meta["num_blocks"]
    assert sum(p.numel() for p in model.parameters()) == meta["param_count"]
    x = t["in.x"].to(getattr(torch, case), copy=True).requires_grad_()
    out = model(x, t["in.t"], t.get("in.y"))
    assert out.dtype == getattr(torch, case)
    assert_close("out", out, t["out"])
    check_gradients(fixture, model, x, out)
    if "cfg" not in meta:
        return
    given = t["cfg.in.x"].to(x), t["cfg.in.t"], t["cfg.in.y"]
    with torch.no_grad():
        assert_close("cfg", model.forward_with_cfg(*given, meta["cfg"]["scale"]), t["cfg.out"])
        rows = len(given[0]) // 2
        half = [value[:rows] for value in given]
        assert torch.equal(model.null_condition(half[2]), given[2][rows:])
        guided = Guided(model, meta["cfg"]["scale"], channels=model.guided_channels)(*half)
        assert_close("guided", guided, t["cfg.out"][:rows])


@parity_kind("dis.mixer", cases=lambda fixture: ["float32", "float64"])
def check_mixer(fixture: Fixture, case: str) -> None:
    kwargs = dict(fixture.meta["kwargs"])
    assert kwargs.pop("bimamba_type") == "v2"
    mixer = BiMambaMixer(**kwargs)
    mixer.load_state_dict(fixture.under("param."))
    mixer.to(getattr(torch, case))
    x = fixture.tensors["in.x"].to(getattr(torch, case), copy=True).requires_grad_()
    out = mixer(x)
    assert_close("out", out, fixture.tensors["out"])
    check_gradients(fixture, mixer, x, out)


@parity_kind("dis.diffusion")
def check_diffusion(fixture: Fixture, case: str) -> None:
    """The published training loss, and ten-line sampling: guided DDPM and DDIM over respaced steps."""
    meta, t = fixture.meta, fixture.tensors
    model = load_official("dis", meta["kwargs"], fixture.under("param."))
    process = Gaussian("linear")
    chain = process.chain()
    assert_close(
        "betas", chain.betas[[0, -1]], torch.tensor(meta["beta_check"], dtype=torch.float64), of_max=1e-9
    )
    for step, want in meta["alphas_cumprod_check"].items():
        assert_close(
            f"alphas_bar {step}", chain.alphas_bar[int(step)], torch.tensor(want).double(), of_max=1e-6
        )
    assert_close("x_t", chain.noised(t["in.x0"], t["in.noise"], t["in.t"]), t["x_t"])
    with torch.no_grad():
        terms = process.loss_terms(model, t["in.x0"], t["in.noise"], chain.times[t["in.t"]], t["in.y"])
    for name, want in fixture.under("loss.").items():
        assert_close(name, terms[name], want)
    spaced = process.chain(meta["respacing"])
    assert ((1 - spaced.times) * 1000 - 1).round().long().tolist() == meta["timestep_map"]
    # The published call runs both halves of a doubled batch, of which the first is the result.
    rows = len(t["sample.z"]) // 2
    guided = Guided(model, meta["cfg_scale"], channels=model.guided_channels, process=process)
    for method in ("ddpm", "ddim"):
        got = ChainSampler(method, meta["respacing"]).sample(
            process, guided, t["sample.z"][:rows], t["sample.y"][:rows],
            noise=lambda made, x: t["sample.noises"][made][:rows],
        )  # fmt: skip
        assert_close(method, got, t[f"out.{method}"][:rows])


@parity_kind("dis.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    stored = fixture.meta["stats"]
    torch.manual_seed(0)
    model = DiS(**official_arguments("dis", fixture.meta["kwargs"], official_backward_dt_init=True))
    own = dict(model.named_parameters())
    assert list(own) == list(stored)
    for name, want in stored.items():
        check_statistics(name, own[name].detach(), want)
    # By default the backward branch starts as the forward one.
    right = DiS(**official_arguments("dis", fixture.meta["kwargs"]))
    for name, parameter in right.named_parameters():
        check_statistics(name, parameter.detach(), stored[name.replace("dt_proj_b.", "dt_proj.")])
