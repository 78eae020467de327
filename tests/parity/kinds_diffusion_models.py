"""DiT and U-ViT sampled and trained from end to end: model, guidance, process and sampler together."""

import torch

from tests.assertions import assert_close
from tests.parity.harness import Fixture, parity_kind
from zigflow.official import load_official
from zigflow.processes import Gaussian, StableDiffusion, VariancePreserving
from zigflow.processes.process import predict
from zigflow.samplers import ChainSampler, DpmSolver, Guided


def sibling(fixture: Fixture, name: str) -> Fixture:
    return Fixture(fixture.path.with_name(f"{name}.json"))


def load(fixture: Fixture) -> torch.nn.Module:
    """The model whose stored state the fixture uses."""
    source = sibling(fixture, fixture.meta["state_from"])
    family = source.kind.partition(".")[0]
    return load_official(family, source.meta["kwargs"], source.under("state."))


@parity_kind("dit.end_to_end")
def check_dit(fixture: Fixture, case: str) -> None:
    meta, stored, model = fixture.meta, fixture.tensors, load(fixture)
    # The published loop carries a second half of rows that never reaches the result.
    rows = len(stored["z"]) // 2
    process = Gaussian("linear")
    guided = Guided(model, meta["cfg_scale"], channels=3, process=process)
    sampler = ChainSampler(meta["kind"], meta["respacing"], meta["eta"])
    got = sampler.sample(
        process,
        guided,
        stored["z"][:rows],
        stored["y"][:rows],
        noise=lambda k, x: stored["noise"][k][:rows],
        return_trajectory=True,
    )
    assert_close("samples", got, stored["samples"][:, :rows])


@parity_kind("uvit.end_to_end")
def check_uvit(fixture: Fixture, case: str) -> None:
    meta, stored, model = fixture.meta, fixture.tensors, load(fixture)
    continuous = "eval_ldm.py" in meta["meaning"]
    process = VariancePreserving() if continuous else StableDiffusion()
    condition = stored["y"] if "y" in stored else stored["context"]
    # U-ViT publishes s = w - 1.
    guided = Guided(WithNothing(model, stored.get("empty_context")), 1 + meta["scale"], process=process)
    net_time = 500.0
    t = process.process_time(torch.full((len(stored["z"]),), net_time, dtype=torch.float64), model)
    assert_close("cfg_out_t500", predict(process, guided, stored["z"], t, condition), stored["cfg_out_t500"])
    method, variant, grid = (
        ("dpm_solver", "fast_equal_spans", "logSNR")
        if continuous
        else ("dpm_solver++", "fast", "time_uniform")
    )
    sampler = DpmSolver(method, variant, meta["steps"], 3, grid, last_step=False)
    got = sampler.sample(process, guided, stored["z"], condition)
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


@parity_kind("dit.train_steps")
def check_dit_training(fixture: Fixture, case: str) -> None:
    model = load_official("dit", fixture.meta["kwargs"], fixture.under("state.")).train()
    process = Gaussian("linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    for number in range(3):
        step = fixture.under(f"step{number}.")
        t = process.chain().times[step["t"]]
        terms = process.loss_terms(model, step["x0"], step["noise"], t, step["y"])
        for key in ("vb", "mse", "loss"):
            assert_close(f"step {number} {key}", terms[key], step[key])
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert_close(f"step {number} gradient norm", norm, step["gradnorm"], of_max=1e-3)
        optimizer.step()
        average = {k: 0.99 * average[k] + 0.01 * v for k, v in model.state_dict().items()}
    check_weights(fixture, model, average)


@parity_kind("uvit.train_steps")
def check_uvit_training(fixture: Fixture, case: str) -> None:
    meta = fixture.meta
    model = load_official("uvit", meta["kwargs"], fixture.under("state.")).train()
    process = StableDiffusion()
    settings = meta["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(), settings["lr"], settings["betas"], weight_decay=settings["weight_decay"]
    )
    average = {k: v.clone() for k, v in model.state_dict().items()}
    for number in range(3):
        step = fixture.under(f"step{number}.")
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * min(number / meta["warmup_steps"], 1)
        t = 1 - step["n"].double() / 1000
        loss = process.loss(model, step["x0"], step["noise"], t, step["y"])
        assert_close(f"step {number} loss", loss, step["loss"])
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        average = {k: 0.99 * average[k] + 0.01 * v for k, v in model.state_dict().items()}
    check_weights(fixture, model, average)


def check_weights(fixture: Fixture, model: torch.nn.Module, average: dict) -> None:
    state = model.state_dict()
    for name, want in fixture.under("final.").items():
        assert_close(name, state[name], want)
    for name, want in fixture.under("ema.").items():
        assert_close(f"average of {name}", average[name], want)
