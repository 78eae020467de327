"""Upsampling: matched times, what is replaced and what stays, every process, prediction, family and sampler."""

import pytest
import torch

from model_zigma import ZigMa
from tests.assertions import assert_close
from tests.models.transformers import filled, inputs
from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT
from zigflow.nn.skip_tuning import skip_weights
from zigflow.processes import Flow, Gaussian, StableDiffusion, VariancePreserving
from zigflow.processes.process import predict
from zigflow.registry import UnknownNameError
from zigflow.samplers import ChainSampler, DpmSolver, Guided, OdeSampler, SdeSampler, Upsampled
from zigflow.samplers.upsampling import match_as_published, match_exactly, pool, repeat

PROCESSES = {
    "linear": Flow(),
    "gvp-data": Flow("GVP", "data"),
    "flow-vp-score": Flow("VP", "score"),
    "linear-noise": Flow("Linear", "noise"),
    "gaussian": Gaussian(),
    "gaussian-v": Gaussian("cosine", prediction="v"),
    "vp": VariancePreserving(),
    "vp-cosine-data": VariancePreserving("cosine", prediction="data"),
    "sd": StableDiffusion(),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(process, number=9):
    low, high = process.interval("ode")
    return torch.linspace(low + 0.01, 0.9 * high, number, dtype=torch.float64)


class Oracle:
    """Expects the same data whatever it sees: ``large`` for large states, ``small`` for small ones."""

    def __init__(self, process, large, small):
        self.process, self.data, self.calls = process, {v.shape[-1]: v for v in (large, small)}, []

    def __call__(self, x, t, y=None):
        self.calls.append(x.shape[-1])
        time = self.process.process_time(t.double(), self)
        data = self.data[x.shape[-1]].to(x.dtype).expand(x.shape)
        return self.process.convert(data, x, time, self.process.prediction, source="data")


@every_process
@pytest.mark.parametrize("m", [2, 3, 5])
def test_a_pooled_state_is_a_state_of_the_matched_time(process, m):
    t = times(process)
    tau, scale = match_exactly(process, t, m)
    path, inside = process.path, tau < process.interval("ode")[1]
    assert inside.sum() >= 5 and (tau >= t).all()
    assert_close("signal", (scale * path.alpha(t))[inside], path.alpha(tau)[inside], of_max=1e-6)
    assert_close("noise", (scale * path.sigma(t) / m)[inside], path.sigma(tau)[inside], of_max=1e-6)
    assert (tau <= torch.maximum(t, torch.tensor(process.interval("ode")[1]))).all()


@every_process
def test_matching_is_finite_at_both_ends(process):
    low, high = process.interval("ode")
    tau, scale = match_exactly(process, torch.tensor([low, high], dtype=torch.float64), 2)
    assert torch.isfinite(tau).all() and torch.isfinite(scale[:1]).all()
    # The same signal beside less noise is as near to the data as there are times for.
    assert tau[1] == high


@every_process
def test_branches_that_agree_change_nothing(process):
    torch.manual_seed(0)
    large = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    oracle = Oracle(process, large, pool(large, 3))
    for t in times(process, 4):
        x, t = torch.randn(2, 2, 6, 6, dtype=torch.float64), t.expand(2)
        got = predict(process, Upsampled(oracle, process, 3, eta=1.0), x, t)
        assert_close(f"t={t[0]:.2f}", got, predict(process, oracle, x, t), of_max=1e-5)
    assert oracle.calls.count(2) == 4


@every_process
@pytest.mark.parametrize("theta", [1.0, 0.4])
def test_block_means_are_those_of_the_small_image_and_the_rest_stays(process, theta):
    torch.manual_seed(0)
    large, small = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 2, 2)
    oracle = Oracle(process, large, small)
    t = times(process)[3].expand(2)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    got = process.data(predict(process, Upsampled(oracle, process, 2, 1.0, theta), x, t), x, t)
    means = (1 - theta) * pool(large, 2) + theta * small
    assert_close("means", pool(got, 2), means.expand(2, -1, -1, -1), of_max=1e-4)
    rest = large - repeat(pool(large, 2), 2)
    assert_close("rest", got - repeat(pool(got, 2), 2), rest.expand(2, -1, -1, -1), of_max=1e-4)


def test_only_the_first_share_of_the_time_is_guided():
    process = StableDiffusion()
    large, small = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 2, 2)
    oracle = Oracle(process, large, small)
    upsampled = Upsampled(oracle, process, 2, eta=0.3)
    x = torch.randn(3, 2, 4, 4)
    for net_time, acts in ((1000.0, True), (700.0, True), (699.0, False), (1.0, False)):
        oracle.calls.clear()
        t = torch.full((3,), net_time)
        assert torch.equal(upsampled(x, t), oracle(x, t)) != acts
        assert oracle.calls == [4, 2, 4] if acts else [4, 4]
    # Of a batch at two times each sample is treated as its own time says.
    mixed = torch.tensor([900.0, 900.0, 100.0])
    got = upsampled(x, mixed)
    assert torch.equal(got[2], oracle(x, mixed)[2])
    assert torch.equal(got[:2], upsampled(x[:2], mixed[:2]))


def test_a_sample_does_not_depend_on_its_neighbors():
    torch.manual_seed(0)
    process, model = VariancePreserving(), family("uvit")
    guided = Guided(model, 1.5, process=process)
    upsampled = Upsampled(guided, process, 2)
    x, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 0])
    other, labels = torch.randn(4, 2, 8, 8), torch.tensor([2, 2, 2, 1])
    other[3] = x[1]
    for sampler in (
        OdeSampler("bosh3", atol=0.1, rtol=0.5),
        DpmSolver(variant="adaptive", order=2, atol=0.3),
    ):
        first = sampler.sample(process, upsampled, x, y)
        second = sampler.sample(process, upsampled, other, labels)
        assert torch.equal(first[1], second[3])


def test_a_learned_variance_is_that_of_the_large_image():
    process = Gaussian()

    def model(x, t, y=None):
        return torch.cat([x * 0.1, torch.full_like(x, float(x.shape[-1]))], 1)

    x, t = torch.randn(2, 2, 4, 4), torch.full((2,), 900.0)
    got = Upsampled(model, process, 2)(x, t)
    assert got.shape == (2, 4, 4, 4)
    assert torch.equal(got[:, 2:], torch.full((2, 2, 4, 4), 4.0))
    assert not torch.equal(got[:, :2], x * 0.1)


def test_videos_are_pooled_frame_by_frame():
    process = VariancePreserving()
    large, small = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 3, 2, 2, 2)
    upsampled = Upsampled(Oracle(process, large, small), process, 2)
    x, t = torch.randn(2, 3, 2, 4, 4), torch.full((2,), 0.1, dtype=torch.float64)
    data = process.data(predict(process, upsampled, x, t), x, t)
    assert_close("means", pool(data, 2), small.expand(2, -1, -1, -1, -1), of_max=1e-3)


SIZE = {"in_channels": 2, "img_dim": (4, 4), "patch_size": 2, "embed_dim": 16, "num_classes": 3,
        "class_dropout_prob": 0.3}  # fmt: skip
FAMILIES = {
    "zigma": (ZigMa, {"depth": 2, "scan_type": "zigzagN8", "use_pe": 2, "ssm_cfg": {"d_state": 4}}),
    "dit": (DiT, {"depth": 2, "num_heads": 2, "learn_sigma": True}),
    "uvit": (UViT, {"depth": 4, "num_heads": 2}),
    "dis": (DiS, {"depth": 4, "ssm_cfg": {"d_state": 4}, "learn_sigma": False}),
    "dim": (DiM, {"depth": 5, "ssm_cfg": {"d_state": 4}, "pad_layout": "rho_pad"}),
}


def family(name):
    torch.manual_seed(0)
    build, options = FAMILIES[name]
    return filled(build(**{**SIZE, **options})).eval()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("m", [2, 3])
def test_every_family_under_every_kind_of_sampler(name, m):
    model = family(name)
    _, _, y = inputs(model, 2)
    for process, sampler in (
        (Flow(), OdeSampler("euler", 4)),
        (Gaussian(), ChainSampler("ddim", 4)),
        (VariancePreserving(), SdeSampler("Euler", 4)),
        (StableDiffusion(), DpmSolver("dpm_solver", num_steps=4)),
    ):
        drop = name == "dit" and isinstance(process, Flow)
        model.drop_sigma = drop
        guided = Guided(model, 1.5, process=process)
        x = torch.randn(2, 2, 4 * m, 4 * m, generator=torch.Generator().manual_seed(1))
        steps = []
        options = {"callback": lambda step, t, x: steps.append(step)}
        if isinstance(sampler, (ChainSampler, SdeSampler)):
            options["noise"] = lambda k, x: torch.ones_like(x)
        plain = sampler.sample(process, guided, x, y, **options)
        got = sampler.sample(process, Upsampled(guided, process, m), x, y, **options)
        assert got.shape == x.shape and torch.isfinite(got).all() and steps
        assert not torch.equal(got, plain)


@pytest.mark.parametrize("name", ["uvit", "dis", "dim"])
def test_skip_tuning_off_in_effect_as_published_and_by_the_noise_as_intended(name):
    model = family(name)
    x, _, y = inputs(model, 2)
    noisy, clean = torch.full((2,), 999.0), torch.zeros(2)
    plain = model(x, noisy, y), model(x, clean, y)
    model.set_skip_tuning("as_published", (0.82, 1.0))
    assert_close("published", model(x, noisy, y), plain[0], of_max=2e-3)
    assert not torch.equal(model(x, noisy, y), plain[0])
    model.set_skip_tuning("as_intended", (0.5, 0.6))
    assert torch.equal(model(x, clean, y), plain[1])
    assert (model(x, noisy, y) - plain[0]).abs().max() > 1e-2 * plain[0].abs().max()
    model.set_skip_tuning(None, (0.82, 1.0))
    assert torch.equal(model(x, noisy, y), plain[0])


def test_skip_weights_run_from_the_first_joining_block_to_the_last():
    weights = skip_weights(torch.tensor([0.0, 1000.0]), "as_intended", (0.82, 1.0), 3)
    assert_close("weights", torch.stack(weights), torch.tensor([[1, 1], [1, 0.91], [1, 0.82]]))
    assert skip_weights(torch.zeros(1), None, (0.82, 1.0), 2) == [None, None]


def test_errors_say_what_to_do():
    process, model = VariancePreserving(), lambda x, t, y=None: x
    for options, message in (
        ({"factor": 1}, "from 2 on"),
        ({"factor": 2.5}, "whole number"),
        ({"eta": 0.0}, r"\(0, 1\]"),
        ({"theta": 0.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Upsampled(model, process, **{"factor": 2, **options})
    with pytest.raises(UnknownNameError, match="as_published"):
        Upsampled(model, process, 2, matching="as_publishd")
    with pytest.raises(TypeError, match="process=flow, gaussian, vp or sd_discrete"):
        Upsampled(model, object(), 2)
    with pytest.raises(ValueError, match="process=sd_discrete"):
        match_as_published(Gaussian(), torch.tensor([0.1]), 2)
    with pytest.raises(ValueError, match="multiples of 3"):
        Upsampled(model, process, 3)(torch.randn(1, 1, 8, 8), torch.tensor([900.0]))
    with pytest.raises(ValueError, match="no long skip"):
        family("dit").set_skip_tuning("as_intended", (0.82, 1.0))
    with pytest.raises(UnknownNameError, match="as_intended"):
        family("uvit").set_skip_tuning("intended", (0.82, 1.0))
