"""DiT and U-ViT sampled and trained from end to end: model, guidance, process and sampler together."""

import torch

from tests.assertions import GRADIENT_RTOL_OF_MAX, OUTPUT_RTOL_OF_MAX, assert_close
from tests.parity.harness import NUMBER, Fixture, parity_kind
from tests.parity.kinds_diffusion import gaussian_process
from tests.parity.settings import dpm_solver, is_continuous
from zigflow.official import load_official
from zigflow.processes import StableDiffusion, VariancePreserving
from zigflow.processes.process import predict
from zigflow.samplers import ChainSampler, Guided


def sibling(fixture: Fixture, name: str) -> Fixture:
    return Fixture(fixture.path.with_name(f"{name}.json"))


def load(fixture: Fixture) -> torch.nn.Module:
    """The model whose stored state the fixture uses."""
    source = sibling(fixture, fixture.meta["state_from"])
    family = source.kind.partition(".")[0]
    return load_official(family, source.meta["kwargs"].plain(), source.under("state."))


@parity_kind("dit.end_to_end")
def check_dit(fixture: Fixture, case: str) -> None:
    meta, stored, model = fixture.meta, fixture.tensors, load(fixture)
    rows, sampled, process = len(stored["z"]), model, gaussian_process(fixture, learned(model))
    condition = given(fixture, "y")
    if "cfg_scale" in meta:
        # The published loop carries a second half of rows that never reaches the result.
        rows //= 2
        sampled = Guided(model, meta["cfg_scale"], channels=model.guided_channels, process=process)
    # Drawn as published whether the steps need it or not.
    assert stored["noise"].shape == stored["samples"].shape
    sampler = ChainSampler(meta["kind"], meta["respacing"], meta["eta"], fixture.flag("clip_denoised"))
    got = sampler.sample(
        process,
        sampled,
        stored["z"][:rows],
        None if condition is None else condition[:rows],
        noise=lambda k, x: stored["noise"][k][:rows],
        return_trajectory=True,
    )
    assert_close("samples", got, stored["samples"][:, :rows])


def learned(model: torch.nn.Module) -> bool:
    """Whether the network predicts a variance."""
    return model.out_channels > model.in_channels


def given(fixture: Fixture, *names: str):
    """The first of the stored tensors that is there, or None."""
    return next((fixture.tensors[name] for name in names if name in fixture.tensors), None)


@parity_kind("uvit.end_to_end")
def check_uvit(fixture: Fixture, case: str) -> None:
    meta, stored, model = fixture.meta, fixture.tensors, load(fixture)
    continuous = is_continuous(fixture)
    process = VariancePreserving() if continuous else StableDiffusion()
    condition, sampled = given(fixture, "y", "context"), model
    if "scale" in meta and condition is not None:
        # U-ViT publishes s = w - 1.
        nothing = WithNothing(model, given(fixture, "empty_context"))
        sampled = Guided(nothing, 1 + meta["scale"], process=process)
    for net_time in fixture.numbered("cfg_out_t"):
        t = process.process_time(torch.full((len(stored["z"]),), float(net_time), dtype=torch.float64), model)
        got = predict(process, sampled, stored["z"], t, condition)
        assert_close(f"at net time {net_time}", got, stored[f"cfg_out_t{net_time}"])
    sampler = dpm_solver("dpm_solver" if continuous else "dpm_solver++", meta["steps"], fixture, continuous)
    got = sampler.sample(process, sampled, stored["z"], condition)
    # The published continuous sampler loses up to 1e-3 in its float32 lambda (see the dpm_cont fixtures).
    assert_close("final", got, stored["final"], of_max=1e-3 if continuous else 1e-4)


class WithNothing:
    """The model with the condition "nothing" of the official script: the last class, or the stored text."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens

    def __call__(self, x, t, y=None):
        return self.model(x, t, y)

    def null_condition(self, y):
        last = self.model.num_classes - 1
        return torch.full_like(y, last) if self.tokens is None else self.tokens.expand_as(y)


# PyTorch's own settings of AdamW, which a script that gives no others trains with.
ADAM = {"lr": 1e-3, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


def optimizer_of(fixture: Fixture, parameters) -> torch.optim.AdamW:
    """AdamW with the JSON's settings, and where it has none those of the prose, which else names AdamW alone."""
    told = fixture.meta["optimizer"].plain() if "optimizer" in fixture.meta else {}
    prose = {
        "lr": (rf"\blearning rate(?: of|[:=])? ?({NUMBER})",),
        "weight_decay": (rf"\bwd ?[:=]? ?({NUMBER})",),
        "eps": (),
    }
    settings = {
        name: told.pop(name) if name in told else fixture.setting(name, *patterns, told={"AdamW": ADAM[name]})
        for name, patterns in prose.items()
    }
    pair, gap = r"\bbetas? ?[:=]? ?[\[(]?", r"(?:/| ?, ?| and )"
    betas = told.pop("betas", None) or fixture.meta.get("betas") or (
        fixture.setting("beta1", rf"{pair}({NUMBER}){gap}", told={"AdamW": ADAM["betas"][0]}),
        fixture.setting("beta2", rf"{pair}{NUMBER}{gap}({NUMBER})", told={"AdamW": ADAM["betas"][1]}),
    )  # fmt: skip
    assert not told, f"{fixture.path.name}: the optimizer's {sorted(told)} are not read"
    return torch.optim.AdamW(parameters, betas=tuple(betas), **settings)


class Average:
    """The published average of all weights; its decay by the JSON or the prose."""

    def __init__(self, fixture: Fixture, model: torch.nn.Module):
        self.decay = fixture.setting("ema_decay", rf"(?:EMA|ema)(?: decay| rate)?(?: of|[:=])? ?({NUMBER})")
        self.state = {k: v.clone() for k, v in model.state_dict().items()}

    def update(self, model: torch.nn.Module) -> None:
        now = model.state_dict()
        self.state = {k: self.decay * v + (1 - self.decay) * now[k] for k, v in self.state.items()}


@parity_kind("dit.train_steps")
def check_dit_training(fixture: Fixture, case: str) -> None:
    model = load_official("dit", fixture.meta["kwargs"].plain(), fixture.under("state.")).train()
    process = gaussian_process(fixture, learned(model))
    optimizer = optimizer_of(
        fixture,
        [p for p in model.parameters() if p.requires_grad],
    )
    average = Average(fixture, model)
    numbers = fixture.numbered("step")
    assert numbers == list(range(len(numbers))) and numbers
    for number in numbers:
        step = fixture.under(f"step{number}.")
        t = process.chain().times[step.pop("t")]
        got = process.loss_terms(model, step.pop("x0"), step.pop("noise"), t, step.pop("y", None))
        optimizer.zero_grad()
        got["loss"].mean().backward()
        got["gradnorm"] = torch.stack(
            [p.grad.norm() for p in model.parameters() if p.grad is not None]
        ).norm()
        for key, want in step.items():
            limit = GRADIENT_RTOL_OF_MAX if key == "gradnorm" else OUTPUT_RTOL_OF_MAX
            assert_close(f"step {number} {key}", got[key], want, of_max=limit)
        optimizer.step()
        average.update(model)
    check_weights(fixture, model, average)


@parity_kind("uvit.train_steps")
def check_uvit_training(fixture: Fixture, case: str) -> None:
    meta, kwargs = fixture.meta, fixture.meta["kwargs"].plain()
    family = "uvit_t2i" if {"clip_dim", "num_clip_token"} & set(kwargs) else "uvit"
    model = load_official(family, kwargs, fixture.under("state.")).train()
    process = StableDiffusion()
    optimizer = optimizer_of(fixture, model.parameters())
    rate, warmup = optimizer.param_groups[0]["lr"], meta["warmup_steps"]
    average = Average(fixture, model)
    numbers = fixture.numbered("step")
    assert numbers == list(range(len(numbers))) and numbers

    def rate_at(number: int) -> float:
        return rate * min(number / warmup, 1) if warmup > 0 else rate

    for number in numbers:
        step = fixture.under(f"step{number}.")
        for group in optimizer.param_groups:
            group["lr"] = rate_at(number)
        t = 1 - step.pop("n").double() / process.steps
        condition = step.pop("y", step.pop("context", None))
        loss = process.loss(model, step.pop("x0"), step.pop("noise"), t, condition)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        got = {"loss": loss, "lr_after": torch.tensor(rate_at(number + 1))}
        for key, want in step.items():
            assert_close(f"step {number} {key}", got[key], want)
        average.update(model)
    check_weights(fixture, model, average)


def check_weights(fixture: Fixture, model: torch.nn.Module, average: Average) -> None:
    state = model.state_dict()
    for name, want in fixture.under("final.").items():
        assert_close(name, state[name], want)
    for name, want in fixture.under("ema.").items():
        assert_close(f"average of {name}", average.state[name], want)
