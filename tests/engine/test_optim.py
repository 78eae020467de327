"""Optimizers by name, their state by parameter name, the learning rate as a function."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from tests.engine.toys import TinyModel, assert_same_bits
from zigflow.build import make, model_arguments
from zigflow.engine.checkpoint import CheckpointError
from zigflow.engine.combined import Combined, hidden_matrices
from zigflow.engine.optim import (
    COMMON_DEFAULTS,
    OPTIMIZERS,
    ClassFactory,
    Schedule,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
)
from zigflow.engine.precision import LossScaler
from zigflow.plugins import compose_config
from zigflow.registry import UnknownNameError
from zigflow.settings import Settings


def stepped(model, optimizer, steps=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_state_goes_round_by_name_whatever_the_order(name):
    model, other = TinyModel(), TinyModel()
    source = stepped(model, build_optimizer(name, model, lr=0.1))
    tensors, groups = optimizer_state(model, source)
    assert all("/" in key and "_orig_mod" not in key for key in tensors)
    target = build_optimizer(name, other, lr=0.1)
    for group in target.param_groups:
        group["params"].reverse()
    load_optimizer_state(other, target, tensors, groups)
    other.load_state_dict(model.state_dict())
    assert_same_bits(optimizer_state(other, target)[0], tensors)
    stepped(model, source, seed=6)
    stepped(other, target, seed=6)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


COMMON = {"lr": 0.01, **COMMON_DEFAULTS}


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_settings_that_nobody_changed_leave_an_optimizer_its_own_defaults(name):
    model, direct = TinyModel(), TinyModel()
    chosen = build_optimizer(name, model, common=COMMON)
    own = OPTIMIZERS.get(name)(direct, lr=0.01)
    for ours, theirs in zip(chosen.param_groups, own.param_groups, strict=True):
        differing = {
            key for key in ours if key not in ("params", "weight_decay") and ours[key] != theirs[key]
        }
        assert not differing
        assert ours.get("weight_decay", 0.0) == 0.0


def test_a_setting_that_an_optimizer_does_not_have_is_said_and_weight_decay_refused(caplog):
    build_optimizer("sgd", TinyModel(), common={**COMMON, "betas": (0.5, 0.9)})
    assert "optimizer sgd has no betas: the value (0.5, 0.9) is not used" in caplog.text
    with pytest.raises(ValueError, match=r"rprop has no weight decay, which is set to 0.1: set optim.wd=0"):
        build_optimizer("rprop", TinyModel(), common={**COMMON, "weight_decay": 0.1})


def test_own_settings_reach_the_optimizer_and_wrong_ones_are_refused_with_those_that_exist():
    (group,) = build_optimizer("sgd", TinyModel(), common=COMMON, momentum=0.9, nesterov=True).param_groups
    assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, 0.01)
    with pytest.raises(ValueError, match=r"sgd has no setting 'momentun'; it has .*momentum"):
        build_optimizer("sgd", TinyModel(), momentun=0.9)
    with pytest.raises(ValueError, match="optimizer adafactor: "):
        build_optimizer("adafactor", TinyModel(), eps=1e-8)


@pytest.mark.parametrize("name, reason", [("lbfgs", "several times"), ("sparseadam", "sparse")])
def test_optimizers_of_torch_that_cannot_train_say_why(name, reason):
    with pytest.raises(ValueError, match=reason):
        build_optimizer(name, TinyModel())


def test_every_other_optimizer_of_torch_can_be_chosen():
    classes = {
        n
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
    }
    known = {"LBFGS", "SparseAdam", "Optimizer"}
    assert {n.lower() for n in classes - known} <= set(OPTIMIZERS.names())


class PlainValues(torch.optim.Optimizer):
    """Keeps numbers and texts beside its tensors, as optimizers of other packages do."""

    def __init__(self, params, lr=0.1, pace=2):
        super().__init__(params, {"lr": lr, "pace": pace})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["mode"], state["share"] = "fast", 1 / state["count"]
                p.data.add_(p.grad, alpha=-group["lr"] * state["share"])


def test_a_class_of_another_package_keeps_its_plain_values_over_a_checkpoint():
    model, other = TinyModel(), TinyModel()
    source = stepped(model, build_optimizer(ClassFactory(PlainValues), model, common=COMMON, pace=3))
    tensors, groups = optimizer_state(model, source)
    assert not tensors
    target = build_optimizer(ClassFactory(PlainValues), other, common=COMMON)
    load_optimizer_state(other, target, tensors, json.loads(json.dumps(groups)))
    assert [dict(state) for state in target.state.values()] == [
        dict(state) for state in source.state.values()
    ]
    assert target.state[other.enter.weight] == {"count": 3, "mode": "fast", "share": 1 / 3}


class TakesAnything(torch.optim.SGD):
    def __init__(self, params, **kwargs):
        self.given = dict(kwargs)
        super().__init__(params, **kwargs)


def test_the_rate_reaches_an_optimizer_that_takes_anything_and_is_missed_aloud_otherwise(caplog):
    made = build_optimizer(ClassFactory(TakesAnything), TinyModel(), common={**COMMON, "weight_decay": 0.1})
    assert made.given == {"lr": 0.01} and made.param_groups[0]["weight_decay"] == 0.1

    def fixed(model):
        return torch.optim.SGD(model.parameters(), lr=0.3)

    build_optimizer(fixed, TinyModel(), common=COMMON)
    assert "optimizer fixed has no lr: the value 0.01 is not used" in caplog.text


def test_the_own_defaults_that_stand_are_said(caplog):
    caplog.set_level("INFO")
    (group,) = build_optimizer("adagrad", TinyModel(), common=COMMON).param_groups
    assert group["eps"] == 1e-10
    assert "optimizer adagrad: eps=1e-10 is its own default; optim.args.eps sets another" in caplog.text


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Muon])
def test_classes_that_cannot_train_are_refused_as_their_names_are(cls):
    with pytest.raises(ValueError, match=r"cannot train here|optim=muon"):
        ClassFactory(cls)


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = TinyModel()
    assert {id(p) for p in hidden_matrices(model)} == {id(block.weight) for block in model.blocks}
    optimizer = build_optimizer("muon", model, lr=0.02, adamw_lr=0.01)
    assert isinstance(optimizer, Combined)
    matrices, rest = optimizer.param_groups
    assert {id(p) for p in matrices["params"]} == {id(block.weight) for block in model.blocks}
    assert (matrices["lr"], rest["lr"]) == (0.02, 0.01)
    everything = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert everything == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "family", ["digits_zigzag8", "digits_dis", "digits_dim", "digits_dit", "digits_uvit"]
)
def test_every_family_has_matrices_for_muon_and_keeps_its_tables_from_it(family):
    with torch.device("meta"):
        settings = Settings.from_mapping(
            OmegaConf.to_container(compose_config([f"model={family}", "run_dir=x"]), resolve=True)
        )
        model = make("model", model_arguments(settings))
    names = {p: n for n, p in model.named_parameters()}
    chosen = {names[p] for p in hidden_matrices(model)}
    assert len(chosen) >= 4
    assert all(p.ndim == 2 for p in hidden_matrices(model))
    assert not [n for n in chosen if "A_log" in n or "embed" in n or n.startswith("final")]


def test_muon_makes_the_update_of_a_matrix_nearly_orthogonal():
    model = TinyModel()
    before = model.blocks[0].weight.detach().clone()
    stepped(model, build_optimizer("muon", model, lr=1.0, weight_decay=0.0, adjust_lr_fn="original"), steps=1)
    singular = torch.linalg.svdvals((before - model.blocks[0].weight).detach())
    # Five steps of the published Newton-Schulz polynomial bring singular values into about [0.7, 1.2].
    assert singular.max() < 1.3 and singular.min() > 0.3


def test_combined_optimizers_scale_together_and_refuse_shared_parameters():
    model = TinyModel()
    optimizer = build_optimizer("muon", model, lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    stepped(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Combined(*(torch.optim.SGD([model.enter.weight], lr=0.1) for _ in range(2)))
    with pytest.raises(ValueError, match="no linear layers"):
        build_optimizer("muon", nn.Linear(2, 2))


def test_the_step_is_a_tensor_without_dimensions():
    model = TinyModel()
    tensors, _ = optimizer_state(model, stepped(model, build_optimizer("adamw", model)))
    assert tensors["step/enter.weight"].shape == ()
    assert tensors["step/enter.weight"].item() == 3


def test_foreign_state_is_refused():
    model = TinyModel()
    tensors, groups = optimizer_state(model, stepped(model, build_optimizer("adamw", model)))
    model.frozen.requires_grad_(True)
    with pytest.raises(CheckpointError, match="frozen"):
        load_optimizer_state(model, build_optimizer("adamw", model), tensors, groups)


def test_names_of_a_compiled_model_are_clean():
    model = nn.Module()
    model._orig_mod = TinyModel()
    tensors, groups = optimizer_state(model, stepped(model, build_optimizer("adamw", model)))
    assert "exp_avg/enter.weight" in tensors
    assert "enter.weight" in groups[0]["parameters"]


def test_unknown_optimizer_suggests_a_near_one():
    with pytest.raises(UnknownNameError, match="adamw"):
        build_optimizer("adamW", TinyModel())


def test_weight_decay_spares_tagged_parameters_only_when_asked():
    model = TinyModel()
    model.enter.bias._no_weight_decay = True
    (everything,) = build_optimizer("adamw", model, weight_decay=0.1).param_groups
    assert any(p is model.enter.bias for p in everything["params"])
    decayed, spared = build_optimizer("adamw", model, weight_decay=0.1, exclude_tagged=True).param_groups
    assert [id(p) for p in spared["params"]] == [id(model.enter.bias)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable"):
        build_optimizer("adamw", TinyModel().requires_grad_(False))


def test_constant_schedule_is_one():
    assert {Schedule().factor(step, step * 8) for step in range(100)} == {1.0}


def test_warmup_is_linear_and_its_first_step_learns():
    schedule = Schedule(warmup=4)
    assert [schedule.factor(step, 0) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    images = Schedule(warmup=32, unit="images")
    assert [images.factor(9, seen, 8) for seen in range(0, 48, 8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_runs_from_one_to_its_end():
    schedule = Schedule("cosine", warmup=10, total=110, final=0.1)
    assert schedule.factor(10, 0) == 1.0
    assert math.isclose(schedule.factor(60, 0), 0.55)
    assert math.isclose(schedule.factor(110, 0), 0.1)
    assert math.isclose(schedule.factor(10**6, 0), 0.1)
    values = [schedule.factor(step, 0) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "linear"},
        {"unit": "epochs"},
        {"warmup": -1},
        {"kind": "cosine"},
        {"kind": "cosine", "warmup": 5, "total": 5},
        {"final": 2.0},
    ],
)
def test_impossible_schedules_are_refused(settings):
    with pytest.raises(ValueError):
        Schedule(**settings)


def test_a_loss_scale_that_fell_to_one_continues_and_that_of_another_precision_does_not():
    fallen = LossScaler(True, scale=2.0)
    assert not fallen.accepts(float("inf"))
    assert fallen.scale == 1.0
    resumed = LossScaler(True)
    resumed.load_state_dict(fallen.state_dict())
    assert resumed.state_dict() == fallen.state_dict()
    for state in (LossScaler(False).state_dict(), {"scale": 1.0, "good_steps": 0, "skips_in_a_row": 0}):
        fresh = LossScaler(True)
        fresh.load_state_dict(state)
        assert fresh.state_dict() == LossScaler(True).state_dict()
    before = LossScaler(True)
    before.load_state_dict({"scale": 8.0, "good_steps": 5, "skips_in_a_row": 0})
    assert (before.scale, before.good_steps) == (8.0, 5)
