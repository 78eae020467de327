"""Checks of the fixture kinds dis.model, dis.mixer, dis.diffusion and dis.init_stats."""

import torch

from dis_mamba import BiMambaMixer
from tests.assertions import GRADIENT_RTOL_OF_MAX, assert_close
from tests.parity.harness import Fixture, parity_kind
from tests.parity.initialization import check_statistics
from tests.parity.kinds_diffusion import gaussian_process
from zigflow.models.dis import DiS
from zigflow.official import load_official, official_arguments
from zigflow.samplers import ChainSampler, Guided


def check_gradients(fixture: Fixture, model: torch.nn.Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """The stored gradients of sum(out * grad_weight)."""
    (out * fixture.tensors["grad_weight"].to(out)).sum().backward()
    of_max = max(GRADIENT_RTOL_OF_MAX, fixture.gradient_tolerance())
    assert_close("grad x", x.grad, fixture.tensors["grad.in.x"], of_max=of_max)
    stored = fixture.under("grad.param.")
    assert stored
    for name, want in stored.items():
        assert_close(name, model.get_parameter(name).grad, want, of_max=of_max)


def given(fixture: Fixture, name: str):
    return fixture.tensors.get(name, None)


@parity_kind("dis.model", cases=lambda fixture: ["float32", "float64"])
def check_model(fixture: Fixture, case: str) -> None:
    meta, t = fixture.meta, fixture.tensors
    state = fixture.under("param.")
    model = load_official("dis", meta["kwargs"].plain(), state).to(getattr(torch, case))
    assert list(model.state_dict()) == fixture.listed("param.")
    if "num_blocks" in meta:
        assert len(model.shard_units()) == meta["num_blocks"]
    if "param_count" in meta:
        assert sum(p.numel() for p in model.parameters()) == meta["param_count"]
    x = t["in.x"].to(getattr(torch, case), copy=True).requires_grad_()
    out = model(x, t["in.t"], given(fixture, "in.y"))
    assert out.dtype == getattr(torch, case)
    if "out_f64" in t and case == "float64":
        assert_close("out_f64", out, t["out_f64"], of_max=1e-9)
    assert_close("out", out, t["out"], floor=fixture.tolerance())
    check_gradients(fixture, model, x, out)
    if "cfg" in meta:
        check_guided(fixture, model, x.dtype)


@torch.no_grad()
def check_guided(fixture: Fixture, model: DiS, dtype: torch.dtype) -> None:
    """The published call on a doubled batch, and the sampler's guidance on its first half."""
    t, scale = fixture.tensors, fixture.meta["cfg"]["scale"]
    values = t["cfg.in.x"].to(dtype), t["cfg.in.t"], t["cfg.in.y"]
    assert_close("cfg", model.forward_with_cfg(*values, scale), t["cfg.out"], floor=fixture.tolerance())
    if model.class_dropout_prob <= 0:
        return
    rows = len(values[0]) // 2
    half = [value[:rows] for value in values]
    assert torch.equal(model.null_condition(half[2]), values[2][rows:])
    guided = Guided(model, scale, channels=model.guided_channels)(*half)
    assert_close("guided", guided, t["cfg.out"][:rows], floor=fixture.tolerance())


# Of the published mixer's keywords, what changes no number.
_WITHOUT_EFFECT = ("layer_idx", "use_fast_path", "device", "dtype")


@parity_kind("dis.mixer", cases=lambda fixture: ["float32", "float64"])
def check_mixer(fixture: Fixture, case: str) -> None:
    kwargs = {k: v for k, v in fixture.meta["kwargs"].items() if k not in _WITHOUT_EFFECT}
    assert kwargs.pop("bimamba_type") == "v2"
    mixer = BiMambaMixer(**kwargs)
    mixer.load_state_dict(fixture.under("param."))
    mixer.to(getattr(torch, case))
    x = fixture.tensors["in.x"].to(getattr(torch, case), copy=True).requires_grad_()
    out = mixer(x)
    assert_close("out", out, fixture.tensors["out"], floor=fixture.tolerance())
    check_gradients(fixture, mixer, x, out)


@parity_kind("dis.diffusion")
def check_diffusion(fixture: Fixture, case: str) -> None:
    """The published training loss, and short sampling: (guided) DDPM and DDIM over respaced steps."""
    meta, t = fixture.meta, fixture.tensors
    model = load_official("dis", meta["kwargs"].plain(), fixture.under("param."))
    learned = model.out_channels > model.in_channels
    process = gaussian_process(fixture, learn_sigma=learned)
    chain, steps = process.chain(), process.num_steps
    assert_close(
        "betas", chain.betas[[0, -1]], torch.tensor(meta["beta_check"], dtype=torch.float64), of_max=1e-9
    )
    for step, want in meta["alphas_cumprod_check"].items():
        assert_close(
            f"alphas_bar {step}", chain.alphas_bar[int(step)], torch.tensor(want).double(), of_max=1e-6
        )
    assert_close("x_t", chain.noised(t["in.x0"], t["in.noise"], t["in.t"]), t["x_t"])
    with torch.no_grad():
        terms = process.loss_terms(
            model, t["in.x0"], t["in.noise"], chain.times[t["in.t"]], given(fixture, "in.y")
        )
    for name, want in fixture.under("loss.").items():
        assert_close(name, terms[name], want)
    spaced = process.chain(meta["respacing"])
    assert ((1 - spaced.times) * steps - 1).round().long().tolist() == meta["timestep_map"]
    start, condition, noises = t["sample.z"], given(fixture, "sample.y"), t["sample.noises"]
    rows, sampled = len(start), model
    if "cfg_scale" in meta and condition is not None:
        # The published call runs both halves of a doubled batch, of which the first is the result.
        rows //= 2
        sampled = Guided(model, meta["cfg_scale"], channels=model.guided_channels, process=process)
    for method in fixture.names("out."):
        eta = meta.get("eta", 0.0) if method == "ddim" else 0.0
        got = ChainSampler(method, meta["respacing"], eta, meta.get("clip_denoised", False)).sample(
            process, sampled, start[:rows], None if condition is None else condition[:rows],
            noise=lambda made, x: noises[made][:rows],
        )  # fmt: skip
        assert_close(method, got, t[f"out.{method}"][:rows])


@parity_kind("dis.init_stats")
def check_init(fixture: Fixture, case: str) -> None:
    stored, kwargs = fixture.meta["stats"], fixture.meta["kwargs"].plain()
    torch.manual_seed(0)
    model = DiS(**official_arguments("dis", kwargs, official_backward_dt_init=True))
    own = dict(model.named_parameters())
    assert list(own) == list(stored)
    for name, want in stored.items():
        check_statistics(name, own[name].detach(), want)
    # By default the backward branch starts as the forward one.
    right = DiS(**official_arguments("dis", kwargs))
    for name, parameter in right.named_parameters():
        check_statistics(name, parameter.detach(), stored[name.replace("dt_proj_b.", "dt_proj.")])
