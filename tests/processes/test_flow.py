"""The flow process: losses, times, intervals, diffusion."""

import math

import pytest
import torch

from tests.assertions import assert_close
from zigflow.processes import DIFFUSION_FORMS, INTERPOLANTS, PREDICTIONS, TIME_LAWS, Flow, Process
from zigflow.registry import UnknownNameError

PATHS = INTERPOLANTS.names()
WEIGHTS = [None, "velocity", "likelihood"]


def batch(n=7, dtype=torch.float64):
    x1, x0 = torch.randn(2, n, 2, 3, 4, dtype=dtype)
    return x1, x0, torch.linspace(0.1, 0.9, n, dtype=dtype)


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_loss_vanishes_at_the_optimum_and_only_there(path_type, prediction, weight):
    """Data at a single point: the network can be exact."""
    flow = Flow(path_type, prediction, weight)
    _, x0, t = batch()
    point = torch.randn(2, 3, 4, dtype=torch.float64)
    x1 = point.expand_as(x0)

    def exact(x, t, y):
        return flow.convert(x1, x, t, prediction, source="data")

    assert_close("loss", flow.loss(exact, x1, x0, t), torch.zeros(7), floor=1e-18)
    worse = flow.loss(lambda x, t, y: exact(x, t, y) + 0.1, x1, x0, t)
    assert worse.shape == (7,)
    assert (worse > 1e-6).all()


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("prediction", ["score", "noise", "data"])
def test_velocity_weight_makes_every_prediction_the_velocity_loss(path_type, prediction):
    x1, x0, t = batch()
    velocity, other = Flow(path_type), Flow(path_type, prediction, "velocity")

    def model(x, t, y):
        return torch.tanh(x) + t[:, None, None, None]

    def converted(x, t, y):
        return velocity.convert(model(x, t, y), x, t, prediction)

    got = other.loss(converted, x1, x0, t)
    assert_close("loss", got, velocity.loss(model, x1, x0, t), of_max=1e-9)


@pytest.mark.parametrize("path_type", PATHS)
def test_likelihood_weight_is_the_same_for_score_noise_and_data(path_type):
    x1, x0, t = batch()
    losses = []
    for prediction in ("score", "noise", "data"):
        flow = Flow(path_type, prediction, "likelihood")
        losses.append(
            flow.loss(
                lambda x, t, y, f=flow: f.convert(torch.tanh(x), x, t, f.prediction, source="noise"),
                x1,
                x0,
                t,
            )
        )
    assert_close("noise", losses[1], losses[0], of_max=1e-9)
    assert_close("data", losses[2], losses[0], of_max=1e-9)


def test_loss_weight_has_no_effect_on_velocity():
    x1, x0, t = batch()
    losses = [Flow("GVP", "velocity", w).loss(lambda x, t, y: x, x1, x0, t) for w in WEIGHTS]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_target_is_what_a_perfect_network_returns():
    x1, x0, t = batch()
    for path_type in PATHS:
        for prediction in PREDICTIONS:
            flow = Flow(path_type, prediction)
            target = flow.target(x1, x0, t)
            assert_close(
                prediction, flow.loss(lambda x, t, y: target, x1, x0, t), torch.zeros(7), floor=1e-20
            )


def test_the_model_is_given_scaled_time_and_the_condition():
    x1, x0, t = batch(dtype=torch.float32)
    seen = {}

    class Model:
        time_scale = 1000.0

        def __call__(self, x, t, y):
            seen.update(t=t, y=y, dtype=x.dtype)
            return x.bfloat16()

    y = torch.arange(7)
    loss = Flow().loss(Model(), x1, x0, t, y)
    assert torch.equal(seen["t"], t * 1000)
    assert seen["y"] is y
    assert seen["dtype"] == torch.float32
    assert loss.dtype == torch.float32


def test_half_precision_data_are_joined_in_float32():
    x1, x0, t = batch(dtype=torch.float32)
    x_t, velocity = Flow().interpolate(x1.bfloat16(), x0.bfloat16(), t)
    assert x_t.dtype == velocity.dtype == torch.float32


def test_the_channels_of_a_learned_variance_are_dropped():
    x1, x0, t = batch()
    plain = Flow().loss(lambda x, t, y: 2 * x, x1, x0, t)
    learned = Flow().loss(lambda x, t, y: torch.cat([2 * x, x / 0], 1), x1, x0, t)
    assert torch.equal(plain, learned)


def test_shape_errors_name_the_shapes():
    x1, x0, t = batch()
    with pytest.raises(ValueError, match=r"\(7, 6, 3, 4\).*\(7, 2, 3, 4\)"):
        Flow().loss(lambda x, t, y: torch.cat([x, x, x], 1), x1, x0, t)
    with pytest.raises(ValueError, match="must agree"):
        Flow().interpolate(x1, x0[:3], t)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        Flow().loss(lambda x, t, y: x, x1, x0, t[:3])


def test_flow_is_a_process():
    assert isinstance(Flow(), Process)


class TestIntervals:
    def test_velocity_on_regular_paths_uses_all_times_whatever_is_given(self):
        for path_type in ("Linear", "GVP"):
            flow = Flow(path_type, train_eps=0.1, sample_eps=0.2)
            assert flow.interval("train") == flow.interval("ode") == (0, 1)

    def test_each_epsilon_has_its_own_default(self):
        assert Flow("Linear", "score", train_eps=0.01).sample_eps == 1e-3
        assert Flow("Linear", "score", sample_eps=0.01).train_eps == 1e-3
        assert Flow("VP", train_eps=0.01).sample_eps == 1e-3
        assert Flow("VP").train_eps == 1e-5

    @pytest.mark.parametrize("eps", [-0.1, 0.5, 3])
    def test_impossible_epsilons_are_refused(self, eps):
        with pytest.raises(ValueError, match="train_eps"):
            Flow("VP", train_eps=eps)

    @pytest.mark.parametrize("path_type", PATHS)
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    @pytest.mark.parametrize("form", DIFFUSION_FORMS.names())
    @pytest.mark.parametrize("evaluates_end", [False, True])
    def test_sde_terms_are_finite_on_the_interval(self, path_type, prediction, form, evaluates_end):
        flow = Flow(path_type, prediction)
        low, high = flow.sde_interval(form, 0.0, evaluates_end)
        t = torch.linspace(low, high if evaluates_end else high - 0.01, 9)
        x, output = torch.randn(2, 9, 2)
        diffusion = flow.diffusion(x, t, form, 1.0)
        drift = flow.velocity(output, x, t) + diffusion * flow.score(output, x, t)
        assert torch.isfinite(drift).all()
        assert (diffusion >= 0).all()

    def test_unknown_use(self):
        with pytest.raises(UnknownNameError, match="'train'"):
            Flow().interval("training")


class TestTimeLaws:
    u = torch.linspace(0, 1, 4097)[:-1]

    @pytest.mark.parametrize("law", TIME_LAWS.names())
    @pytest.mark.parametrize("prediction", ["velocity", "noise"])
    def test_times_rise_with_u_and_stay_in_the_interval(self, law, prediction):
        flow = Flow("Linear", prediction, time_law=law)
        t = flow.sample_time(self.u)
        low, high = flow.interval("train")
        assert t.dtype == torch.float32
        assert (t.diff() >= 0).all()
        assert t.min() >= torch.tensor(low)
        assert t.max() <= torch.tensor(high)
        assert torch.isfinite(t).all()

    def test_uniform_spans_the_interval(self):
        t = Flow("Linear", "score", train_eps=0.1).sample_time(self.u)
        assert_close("uniform", t, 0.1 + 0.8 * self.u)

    def test_logit_normal_has_its_moments(self):
        flow = Flow(time_law="logit_normal", logit_mean=0.4, logit_std=0.7)
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        logit = torch.logit(flow.sample_time(u))
        assert math.isclose(logit.mean(), 0.4, abs_tol=1e-4)
        assert math.isclose(logit.std(), 0.7, abs_tol=1e-4)

    def test_logit_normal_is_truncated_not_clipped(self):
        flow = Flow("Linear", "score", train_eps=0.3, time_law="logit_normal")
        u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
        t = flow.sample_time(u)
        normal = torch.distributions.Normal(0.0, 1.0)
        ends = torch.logit(torch.tensor([0.3, 0.7], dtype=torch.float64))
        below = (normal.cdf(torch.logit(t)) - normal.cdf(ends[0])) / (
            normal.cdf(ends[1]) - normal.cdf(ends[0])
        )
        assert_close("distribution function", below, u, of_max=1e-6)

    @pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
    def test_impossible_moments_are_refused(self, std):
        with pytest.raises(ValueError, match="logit_std"):
            Flow(time_law="logit_normal", logit_std=std)


class TestDiffusion:
    def test_published_misspelling_is_the_same_form(self):
        x, t = torch.zeros(5, 2), torch.linspace(0.1, 0.9, 5)
        a, b = (
            Flow().diffusion(x, t, name, 0.7) for name in ("increasing-decreasing", "inccreasing-decreasing")
        )
        assert torch.equal(a, b)

    @pytest.mark.parametrize("form", DIFFUSION_FORMS.names())
    def test_shape_multiplies_a_state(self, form):
        x = torch.zeros(5, 2, 3, 4)
        assert Flow().diffusion(x, torch.linspace(0.1, 0.9, 5), form).shape == (5, 1, 1, 1)

    def test_unknown_form_suggests(self):
        with pytest.raises(UnknownNameError, match="'increasing-decreasing'"):
            Flow().diffusion(torch.zeros(1, 1), torch.ones(1), "increasing_decreasing")

    @pytest.mark.parametrize("path_type", PATHS)
    def test_drift_terms_give_the_velocity_from_the_score(self, path_type):
        flow = Flow(path_type, "score")
        x, score = torch.randn(2, 9, 3, dtype=torch.float64)
        t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
        mean, gain = flow.drift_terms(x, t)
        assert_close("velocity", mean + gain * score, flow.velocity(score, x, t), of_max=1e-12)
