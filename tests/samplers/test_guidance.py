"""Guidance: identities, intervals, channels, conditions, errors."""

from dataclasses import dataclass

import pytest
import torch

from model_zigma import ZigMa
from tests.assertions import assert_close
from tests.samplers.problems import Network
from zigflow.nn import Condition as ModelCondition
from zigflow.processes import Flow
from zigflow.samplers import Guided, OdeSampler

X, T, Y = torch.randn(4, 16), torch.full((4,), 0.4), torch.tensor([0, 1, 2, 3])


def parts(model):
    null = model.null_condition(Y)
    return model(X, T, Y), model(X, T, null)


def test_scale_one_is_off_and_calls_the_model_once():
    model = Network()
    assert torch.equal(Guided(model, 1.0)(X, T, Y), model(X, T, Y))
    assert model.calls == [4, 4]


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 7.0, -2.0])
def test_output_is_linear_in_the_scale(scale):
    model = Network()
    cond, uncond = parts(model)
    model.calls.clear()
    assert_close("guided", Guided(model, scale)(X, T, Y), uncond + scale * (cond - uncond), of_max=1e-5)
    assert model.calls == [8]


def test_a_scale_for_every_sample():
    model = Network()
    cond, uncond = parts(model)
    scale = torch.tensor([0.0, 1.0, 2.0, 3.0])
    want = uncond + scale[:, None] * (cond - uncond)
    assert_close("guided", Guided(model, scale)(X, T, Y), want, of_max=1e-5)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        Guided(model, scale[:3])(X, T, Y)


def test_interval_is_in_process_time_and_saves_calls():
    model = Network()
    model.time_scale = 1000.0
    cond, uncond = (model(X, 1000 * T, y) for y in (Y, model.null_condition(Y)))
    guided = Guided(model, 3.0, interval=(0.2, 0.6))
    assert guided.time_scale == 1000.0
    model.calls.clear()
    assert_close("inside", guided(X, 1000 * T, Y), uncond + 3 * (cond - uncond), of_max=1e-5)
    late = torch.full((4,), 700.0)
    assert torch.equal(guided(X, late, Y), model(X, late, Y))
    assert model.calls == [8, 4, 4]


def test_interval_is_decided_for_every_sample():
    model = Network()
    t = torch.tensor([0.1, 0.3, 0.5, 0.7])
    inside = ((t >= 0.2) & (t <= 0.6))[:, None]
    full = Guided(model, 3.0)(X, t, Y)
    got = Guided(model, 3.0, interval=(0.2, 0.6))(X, t, Y)
    assert_close("inside", got, torch.where(inside, full, model(X, t, Y)), of_max=1e-5)


def test_adaptive_solvers_keep_samples_apart_under_an_interval():
    """Whether all samples are outside depends on the neighbors, so the batch stays doubled."""
    flow, model = Flow(), Network()
    guided = Guided(model, 2.0, interval=(0.4, 0.6))
    other = 4 * torch.randn(4, 16)
    other[3] = X[1]
    first = OdeSampler("dopri5").sample(flow, guided, X, Y)
    second = OdeSampler("dopri5").sample(flow, guided, other, torch.tensor([4, 4, 4, 1]))
    assert torch.equal(first[1], second[3])
    assert set(model.calls) == {8}
    model.calls.clear()
    OdeSampler("euler", 11).sample(flow, guided, X, Y)
    assert set(model.calls) == {4, 8}


@pytest.mark.parametrize("shape", [(4, 5, 2, 2), (4, 3, 5, 2, 2)])
def test_guidance_on_some_channels(shape):
    class Model:
        def null_condition(self, y):
            return torch.zeros_like(y)

        def __call__(self, x, t, y):
            return x * (1 + y.reshape(-1, *(1,) * (x.ndim - 1)))

    x = torch.randn(shape)
    axis = len(shape) - 3
    got = Guided(Model(), 4.0, channels=3)(x, T, Y)
    guided, cond = Guided(Model(), 4.0)(x, T, Y), Model()(x, T, Y)
    assert torch.equal(got.narrow(axis, 0, 3), guided.narrow(axis, 0, 3))
    assert torch.equal(got.narrow(axis, 3, 2), cond.narrow(axis, 3, 2))
    with pytest.raises(ValueError, match="9 channels"):
        Guided(Model(), 4.0, channels=9)(x, T, Y)


@dataclass(frozen=True)
class Condition:
    labels: torch.Tensor
    tokens: torch.Tensor | None = None


@pytest.mark.parametrize(
    "wrap", [lambda y: y, lambda y: Condition(y), lambda y: {"y": y}, lambda y: (y, None)]
)
def test_conditions_of_any_build(wrap):
    class Model:
        def null_condition(self, y):
            return wrap(torch.zeros(4, dtype=torch.long))

        def __call__(self, x, t, y):
            labels = y if isinstance(y, torch.Tensor) else None
            if isinstance(y, Condition):
                labels = y.labels
            elif isinstance(y, dict):
                labels = y["y"]
            elif isinstance(y, tuple):
                labels = y[0]
            return x * labels[:, None]

    got = Guided(Model(), 2.0)(X, T, wrap(Y))
    assert_close("guided", got, 2 * X * Y[:, None])


@pytest.mark.parametrize("reads", ["labels", "tokens"])
def test_the_real_model_is_guided_on_condition_objects(reads):
    """A condition object of labels, or of tokens with a mask, gives what plain labels or two plain calls give."""
    options = {"num_classes": 4} if reads == "labels" else {"has_text": True, "d_context": 6}
    model = ZigMa(
        in_channels=2,
        embed_dim=16,
        depth=2,
        img_dim=4,
        scan_type="zigzagN2",
        class_dropout_prob=0.1,
        **options,
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.abs().max() == 0:
                p.normal_(std=0.2)
        model.y_embedder.get_parameter("embedding_table.weight" if reads == "labels" else "weight").normal_()
    x, tokens = torch.randn(4, 2, 4, 4), torch.randn(4, 5, 6)
    mask = torch.arange(5) < torch.tensor([1, 3, 5, 5])[:, None]
    if reads == "labels":
        given, plain, null = ModelCondition(labels=Y, mask=mask), Y, torch.full((4,), 4)
    else:
        given = plain = ModelCondition(tokens=tokens, mask=mask)
        null = ModelCondition(tokens=torch.zeros_like(tokens), mask=mask)
    cond, uncond = model(x, T, plain), model(x, T, null)
    assert (cond - uncond).abs().max() > 1e-3
    assert_close("guided", Guided(model, 2.0)(x, T, given), 2 * cond - uncond)


def test_conditions_that_cannot_be_joined_are_refused():
    class Model(Network):
        def null_condition(self, y):
            return None

    with pytest.raises(TypeError, match="Tensor, NoneType"):
        Guided(Model(), 2.0)(X, T, Y)


def test_guidance_without_null_condition_says_what_to_do():
    with pytest.raises(ValueError, match="class_dropout_prob > 0.*cfg_scale=1"):
        Guided(lambda x, t, y: x, 2.0)
    assert torch.equal(Guided(lambda x, t, y: x, 1.0)(X, T, Y), X)


def test_guidance_without_condition_says_what_to_do():
    with pytest.raises(ValueError, match="needs a condition"):
        Guided(Network(), 2.0)(X, T)


def test_impossible_settings_are_refused():
    for kwargs in (
        {"scale": float("nan")},
        {"scale": 2.0, "interval": (0.6, 0.2)},
        {"scale": 2.0, "channels": 0},
    ):
        with pytest.raises(ValueError, match="guidance"):
            Guided(Network(), **kwargs)
