"""Paths: derivatives, quotients, end points, inverses, conversions."""

import math

import pytest
import torch

from tests.assertions import assert_close
from zigflow.processes import INTERPOLANTS, PREDICTIONS, Flow, Interpolant
from zigflow.processes.predictions import conversion
from zigflow.registry import UnknownNameError

INSIDE = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)
NAMES = INTERPOLANTS.names()


@pytest.fixture(params=NAMES)
def path(request):
    return INTERPOLANTS.get(request.param)()


@pytest.mark.parametrize("function", ["alpha", "sigma"])
def test_derivative_is_the_derivative(path, function):
    t = INSIDE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(getattr(path, function)(t).sum(), t)
    assert_close(function, getattr(path, f"d_{function}")(INSIDE), slope, of_max=1e-12)


def test_derivative_by_differences(path):
    h = 1e-6
    for function in ("alpha", "sigma"):
        value = getattr(path, function)
        slope = (value(INSIDE + h) - value(INSIDE - h)) / (2 * h)
        assert_close(function, getattr(path, f"d_{function}")(INSIDE), slope, of_max=1e-7)


def test_quotients_are_what_they_say(path):
    t = INSIDE
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    wronskian = alpha * d_sigma - d_alpha * sigma
    want = {
        "d_alpha_over_alpha": d_alpha / alpha,
        "d_sigma_over_sigma": d_sigma / sigma,
        "score_gain": d_alpha / alpha * sigma**2 - sigma * d_sigma,
        "noise_gain": wronskian / alpha,
        "data_gain": -wronskian / sigma,
    }
    for name, value in want.items():
        assert_close(name, getattr(path, name)(t), value, of_max=1e-10)
    split = (d_sigma / wronskian, -sigma / wronskian, -d_alpha / wronskian, alpha / wronskian)
    for got, value in zip(path.split_velocity(t), split, strict=True):
        assert_close("split_velocity", got, value, of_max=1e-10)


def test_time_runs_from_noise_to_data(path):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = path.alpha(ends), path.sigma(ends)
    assert alpha[1] == 1
    assert sigma[1] == 0
    assert math.isclose(sigma[0], 1, abs_tol=1e-4)
    assert alpha[0] < 1e-2
    assert (alpha[0] == 0) == path.noise_end_is_singular


def test_signal_to_noise_rises_and_inverts(path):
    log_snr = path.log_snr(INSIDE)
    assert (log_snr.diff() > 0).all()
    direct = 2 * (path.alpha(INSIDE) / path.sigma(INSIDE)).log()
    assert_close("log_snr", log_snr, direct, of_max=1e-12)
    assert_close("time_of_log_snr", path.time_of_log_snr(log_snr), INSIDE, of_max=1e-10)


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_conversions_agree_with_the_pair_that_made_the_state(path, source, target):
    t = INSIDE
    x1, x0 = torch.randn(2, len(t), 3, dtype=torch.float64)
    c = {k: getattr(path, k)(t)[:, None] for k in ("alpha", "sigma", "d_alpha", "d_sigma")}
    x = c["alpha"] * x1 + c["sigma"] * x0
    true = {
        "velocity": c["d_alpha"] * x1 + c["d_sigma"] * x0,
        "noise": x0,
        "data": x1,
        "score": -x0 / c["sigma"],
        "v": c["alpha"] * x0 - c["sigma"] * x1,
    }
    p, q = path.coefficients(source, target, t)
    got = p[:, None] * x + q[:, None] * true[source]
    assert_close(f"{source} to {target}", got, true[target], of_max=1e-9)


@pytest.mark.parametrize("path_type", NAMES)
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_conversions_round_trip(path_type, source, target):
    flow = Flow(path_type, source)
    t = torch.linspace(*flow.interval("ode"), 33, dtype=torch.float64)[1:-1]
    x, value = torch.randn(2, len(t), 4, dtype=torch.float64)
    there = flow.convert(value, x, t, target)
    back = flow.convert(there, x, t, source, source=target)
    assert_close(f"{source} to {target} and back", back, value, of_max=1e-9)


@pytest.mark.parametrize("path_type", NAMES)
@pytest.mark.parametrize("target", ["noise", "data", "velocity"])
def test_a_velocity_converts_at_both_ends(path_type, target):
    """At sigma = 0 or alpha = 0 noise and data still follow from a velocity (which VP does not have at 1)."""
    flow = Flow(path_type, "velocity")
    for t in (0.0, 1.0):
        x, v = torch.randn(2, 5, 3)
        assert torch.isfinite(flow.convert(v, x, t, target)).all()


@pytest.mark.parametrize("path_type", NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("use", ["train", "ode"])
def test_float32_conversions_are_finite_and_accurate_on_the_whole_interval(path_type, prediction, use):
    flow = Flow(path_type, prediction)
    t = torch.linspace(*flow.interval(use), 257)
    x, value = torch.randn(2, len(t), 3)
    for target in PREDICTIONS:
        if target == "score" and t[-1] == 1:
            continue
        got = flow.convert(value, x, t, target)
        want = flow.convert(value.double(), x.double(), t.double(), target)
        # Each row on its own: beside an end a quotient is large and would hide the others.
        error = (got - want).abs().amax(1) / want.abs().amax(1)
        assert torch.isfinite(got).all(), target
        # VP trains up to 1e-5 from the end, where float32 times are that coarse.
        allowed = 2e-2 if path_type == "VP" and use == "train" else 1e-3
        assert error.max() < allowed, target


def test_float64_states_get_float64_coefficients():
    flow = Flow("GVP", "noise")
    t = torch.full((3,), 0.3, dtype=torch.float64)
    x, value = torch.randn(2, 3, 2, dtype=torch.float64)
    assert flow.velocity(value, x, t).dtype == torch.float64
    assert flow.velocity(value.half(), x.half(), t.half()).dtype == torch.float32


def test_unknown_names_suggest():
    with pytest.raises(UnknownNameError, match="'Linear'"):
        Flow("linear")
    with pytest.raises(UnknownNameError, match="'velocity'"):
        Flow(prediction="velocty")
    with pytest.raises(UnknownNameError, match="'likelihood'"):
        Flow(prediction="noise", loss_weight="likelyhood")
    with pytest.raises(UnknownNameError, match="'logit_normal'"):
        Flow(time_law="logitnormal")
    with pytest.raises(UnknownNameError, match="'noise'"):
        Flow().convert(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), "noize")


class TestDerived:
    """All but alpha and sigma follows from them: the same as what is written out for the registered paths."""

    @staticmethod
    def derived(path):
        cls = type(
            "Derived",
            (Interpolant,),
            {"alpha": lambda _, t: path.alpha(t), "sigma": lambda _, t: path.sigma(t)},
        )
        return cls()

    def test_derived_is_closed(self, path):
        own = self.derived(path)
        assert own.noise_end_is_singular == path.noise_end_is_singular
        assert own.ends_are_regular == path.ends_are_regular
        for name in (
            "d_alpha", "d_sigma", "d_alpha_over_alpha", "d_sigma_over_sigma", "score_gain", "noise_gain", "data_gain",
            "wronskian", "log_snr",
        ):  # fmt: skip
            assert_close(name, getattr(own, name)(INSIDE), getattr(path, name)(INSIDE), of_max=1e-10)
        for got, want in zip(own.split_velocity(INSIDE), path.split_velocity(INSIDE), strict=True):
            assert_close("split_velocity", got, want, of_max=1e-10)
        log_snr = torch.linspace(-8, 12, 41, dtype=torch.float64)
        assert_close("time", own.time_of_log_snr(log_snr), path.time_of_log_snr(log_snr), of_max=1e-9)

    @pytest.mark.parametrize("source", PREDICTIONS)
    @pytest.mark.parametrize("target", PREDICTIONS)
    def test_the_general_conversion_is_the_written_one(self, path, source, target):
        if source == target:
            return
        got, want = conversion(path, source, target, INSIDE), path.coefficients(source, target, INSIDE)
        for part, (a, b) in enumerate(zip(got, want, strict=True)):
            # A coefficient of x that is zero is the difference of equal numbers.
            scale = float(torch.maximum(want[0].abs().max(), want[1].abs().max()))
            assert_close(f"part {part} of {source} to {target}", a, b, floor=1e-9 * max(scale, 1.0))

    def test_derivatives_are_there_without_and_within_autograd(self, path):
        own, t = self.derived(path), INSIDE.float()
        with torch.no_grad():
            plain = own.d_alpha(t)
        with torch.inference_mode():
            assert torch.equal(own.d_alpha(t.clone()), plain)
        slope = torch.autograd.functional.jacobian(lambda s: own.d_sigma(s), t[5:6])
        assert torch.isfinite(slope).all() and not plain.requires_grad

    def test_loss_weights_of_any_prediction_are_the_written_ones(self, path):
        for weight in ("velocity", "likelihood"):
            for prediction in ("data", "noise", "score"):
                flow = Flow(prediction=prediction, loss_weight=weight)
                flow.path = path
                got, want = flow._derived_loss_weights(INSIDE), flow.loss_weights(INSIDE)
                assert_close(f"{weight} of {prediction}", got, want, of_max=1e-9)
