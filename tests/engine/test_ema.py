"""The averages against their closed form."""

import math

import pytest
import torch
from torch import nn

from tests.assertions import assert_close
from tests.engine.toys import TinyModel
from zigflow.engine.checkpoint import CheckpointError
from zigflow.engine.ema import EmaProfile, EmaProfiles


def run(profile, weights, batch=8, seen=0):
    """Average a scalar weight that takes ``weights`` one after the other, the first being the initial one."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(weights[0])
    ema = EmaProfiles(model, [profile])
    for step, weight in enumerate(weights[1:]):
        model.weight.data.fill_(weight)
        ema.update(seen + step * batch, batch)
    return ema.state_dict(profile.name)["weight"].item()


def test_constant_rate_is_the_geometric_sum():
    weights = torch.randn(30, dtype=torch.float64).tolist()
    got = run(EmaProfile("r", rate=0.9), weights)
    n = len(weights) - 1
    want = 0.9**n * weights[0] + sum(0.1 * 0.9 ** (n - k) * weights[k] for k in range(1, n + 1))
    assert math.isclose(got, want, rel_tol=1e-12)


def test_half_life_halves_what_is_old():
    # No ramp: after half_life images of constant weight 0, half of the initial 1 is left.
    assert math.isclose(run(EmaProfile("h", half_life=64, ramp=0.0), [1.0] + [0.0] * 8), 0.5, rel_tol=1e-12)
    assert math.isclose(
        run(EmaProfile("h", half_life=64, ramp=0.0), [1.0] + [0.0] * 4, batch=32), 0.25, rel_tol=1e-12
    )


def test_half_life_counts_images_not_steps():
    fine = run(EmaProfile("h", half_life=100, ramp=0.0), [1.0] + [0.0] * 12, batch=5)
    coarse = run(EmaProfile("h", half_life=100, ramp=0.0), [1.0] + [0.0] * 3, batch=20)
    assert math.isclose(fine, coarse, rel_tol=1e-12)


def test_the_ramp_forgets_the_initial_weights():
    profile = EmaProfile("h", half_life=500_000)
    # The first step copies; a thousand steps on, a constant 0.9999 would still hold 90 % of the start.
    assert run(profile, [1.0] + [0.0]) == 0.0
    assert run(EmaProfile("r", rate=0.9999), [1.0] + [0.0] * 1000) > 0.9
    assert profile.decay(0, 128) == 0.0
    seen, batch = 40_000, 128
    assert math.isclose(profile.decay(seen, batch), 2 ** (-batch / (0.05 * seen)), rel_tol=1e-12)
    assert math.isclose(profile.decay(10**9, batch), 2 ** (-batch / 500_000), rel_tol=1e-12)


def test_ramped_closed_form():
    profile = EmaProfile("h", half_life=50, ramp=0.5)
    weights = torch.randn(20, dtype=torch.float64).tolist()
    want, seen = weights[0], 0
    products = []
    for weight in weights[1:]:
        d = 0.0 if seen == 0 else 2 ** (-8 / min(50, 0.5 * seen))
        products.append((d, weight))
        seen += 8
    for d, weight in products:
        want = d * want + (1 - d) * weight
    assert math.isclose(run(profile, weights), want, rel_tol=1e-12)


def test_float32_master_of_bfloat16_weights():
    model = TinyModel(dtype=torch.bfloat16)
    ema = EmaProfiles(model, [EmaProfile("r", rate=0.999)])
    for step in range(50):
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
        ema.update(step * 4, 4)
    state = ema.state_dict("r")
    assert all(value.dtype == torch.float32 for value in state.values())
    start = dict(TinyModel(dtype=torch.bfloat16).named_parameters())["enter.weight"].detach().float()
    # A bfloat16 average would not move by thousandths.
    assert_close("master", state["enter.weight"], 0.999**50 * start + (1 - 0.999**50))


def test_floating_parameters_frozen_ones_included_and_nothing_else():
    model = TinyModel()
    ema = EmaProfiles(model, [EmaProfile("r", rate=0.5)])
    assert set(ema.state_dict("r")) == {name for name, _ in model.named_parameters()}
    assert "frozen" in ema.state_dict("r")
    model.frozen.data.fill_(3.0)
    ema.update(0, 1)
    assert torch.equal(ema.state_dict("r")["frozen"], torch.full((3,), 2.0))


def test_names_do_not_carry_compilation():
    wrapper = nn.Module()
    wrapper._orig_mod = TinyModel()
    names = {name for name, _ in TinyModel().named_parameters()}
    assert set(EmaProfiles(wrapper, [EmaProfile("r", rate=0.5)]).state_dict("r")) == names


def test_state_goes_round_and_copies_into_a_model():
    model, other = TinyModel(seed=0), TinyModel(seed=1)
    ema = EmaProfiles(model, [EmaProfile("r", rate=0.5)])
    fresh = EmaProfiles(other, [EmaProfile("r", rate=0.5)])
    fresh.load_state_dict("r", ema.state_dict("r"))
    fresh.copy_to(other, "r")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match=r"frozen is missing there and \(3,\) in the model;"):
        fresh.load_state_dict("r", {k: v for k, v in ema.state_dict("r").items() if k != "frozen"})
    with pytest.raises(CheckpointError, match=r"enter\.weight is \(2,\) there and \(8, 17\) in the model"):
        fresh.load_state_dict("r", ema.state_dict("r") | {"enter.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"other is \(2,\) there and missing in the model"):
        fresh.load_state_dict("r", ema.state_dict("r") | {"other": torch.zeros(2)})
    with pytest.raises(KeyError, match="known: r"):
        fresh.state_dict("s")


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "a/b", "rate": 0.5},
        {"name": "a"},
        {"name": "a", "rate": 0.5, "half_life": 3},
        {"name": "a", "rate": 1.0},
        {"name": "a", "half_life": 0},
        {"name": "a", "half_life": 1, "ramp": -1},
    ],
)
def test_impossible_profiles_are_refused(settings):
    with pytest.raises(ValueError, match="EMA profile"):
        EmaProfile(**settings)


def test_two_profiles_of_one_name_are_refused():
    with pytest.raises(ValueError, match="distinct"):
        EmaProfiles(TinyModel(), [EmaProfile("a", rate=0.5)] * 2)
