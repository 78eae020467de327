"""Optimizers by name, their state by parameter name, the learning rate as a function."""

import math

import pytest
import torch
from torch import nn

from tests.engine.toys import TinyModel, assert_same_bits
from zigflow.engine.checkpoint import CheckpointError
from zigflow.engine.optim import OPTIMIZERS, Schedule, build_optimizer, load_optimizer_state, optimizer_state
from zigflow.engine.precision import LossScaler
from zigflow.registry import UnknownNameError


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
