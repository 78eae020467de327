"""Backend selection, and what the public functions refuse before any work."""

import logging
from typing import NamedTuple

import pytest
import torch

import dis_kernels.dispatch as dispatch
import dis_mamba
from dis_causal_conv1d import available_backends, causal_conv1d
from dis_kernels.dispatch import Dispatcher, use_backend
from dis_mamba import permute, selective_scan

from .definitions import conv_arguments, scan_arguments


class Call(NamedTuple):
    size: int


class FakeBackend:
    def __init__(self, name, limit=None, missing=None, error=None):
        self.name, self.limit, self.missing, self.error = name, limit, missing, error

    def unavailable(self):
        return self.missing

    def accepts(self, call):
        too_large = self.limit is not None and call.size > self.limit
        return f"size {call.size} is over {self.limit}" if too_large else None

    def run(self, call):
        if self.error is not None:
            raise self.error
        return self.name


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(dispatch, "_dispatchers", list(dispatch._dispatchers))
    monkeypatch.setattr(dispatch, "_announced", set())
    return lambda *backends: Dispatcher("fake_op", backends)


def test_auto_takes_the_first_that_accepts(make):
    op = make(
        FakeBackend("missing", missing="no such device"), FakeBackend("small", limit=3), FakeBackend("any")
    )
    assert op.run(Call(3)) == "small"
    assert op.run(Call(4)) == "any"
    assert op.available() == {"missing": "no such device", "small": None, "any": None}


def test_a_named_backend_runs_or_raises(make):
    op = make(
        FakeBackend("missing", missing="no such device"), FakeBackend("small", limit=3), FakeBackend("any")
    )
    assert op.run(Call(1), "any") == "any"
    with pytest.raises(ValueError, match="'small' does not take this call: size 4 is over 3"):
        op.run(Call(4), "small")
    with pytest.raises(RuntimeError, match="'missing' cannot run here: no such device"):
        op.run(Call(4), "missing")
    with pytest.raises(
        ValueError, match=r"unknown backend 'smal'. Did you mean 'small'.*Known: auto, missing, small"
    ):
        op.run(Call(4), "smal")


def test_when_none_accepts_every_reason_is_given(make):
    op = make(FakeBackend("missing", missing="no such device"), FakeBackend("small", limit=3))
    with pytest.raises(RuntimeError, match="missing: no such device; small: size 4 is over 3"):
        op.run(Call(4))


def test_an_error_is_not_replaced_by_another_backend(make):
    op = make(FakeBackend("broken", error=ZeroDivisionError("inside")), FakeBackend("any"))
    with pytest.raises(ZeroDivisionError, match="inside"):
        op.run(Call(1))


def test_a_choice_is_logged_once(make, caplog):
    op = make(FakeBackend("small", limit=3), FakeBackend("any"))
    with caplog.at_level(logging.INFO, logger="dis_kernels.dispatch"):
        for size in (1, 1, 9, 9, 1):
            op.run(Call(size))
    assert [record.getMessage() for record in caplog.records] == [
        "fake_op runs on backend 'small'",
        "fake_op runs on backend 'any'",
    ]


def test_what_only_counts_is_no_choice(monkeypatch, caplog):
    """A model's operations are counted on the meta device, before it runs on another backend."""
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, logger="dis_kernels.dispatch"):
        with use_backend("torch"):
            causal_conv1d(torch.empty(1, 4, 2, device="meta"), torch.empty(2, 3, device="meta"))
        assert caplog.records == []
        causal_conv1d(torch.ones(1, 4, 2), torch.ones(2, 3), backend="reference")
    assert [record.getMessage() for record in caplog.records] == ["causal_conv1d runs on backend 'reference'"]


def test_use_backend_nests_and_yields_to_an_explicit_name(make):
    op = make(FakeBackend("first"), FakeBackend("second"), FakeBackend("third"))
    with use_backend("second"):
        assert op.run(Call(1)) == "second"
        assert op.run(Call(1), "third") == "third"
        with use_backend("third"):
            assert op.run(Call(1)) == "third"
        assert op.run(Call(1)) == "second"
    with pytest.raises(KeyError), use_backend("third"):
        raise KeyError
    assert op.run(Call(1)) == "first"


def test_compiled_code_takes_another_for_a_preferred_backend_that_runs_eagerly_alone(make, monkeypatch):
    make(FakeBackend("eager"), FakeBackend("plain"))
    eager = FakeBackend("eager", limit=3)
    eager.eager_only = True
    op = Dispatcher("another_op", [eager, FakeBackend("plain")], otherwise="plain")
    with use_backend("eager"):
        assert op.run(Call(1)) == "eager"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert op.run(Call(1)) == "plain"
        with pytest.raises(ValueError, match="another_op: backend 'eager' does not take this call"):
            op.run(Call(4), "eager")


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="Did you mean 'reference'"), use_backend("refrence"):
        pass


def test_the_environment_names_a_backend(make, monkeypatch):
    op = make(FakeBackend("first"), FakeBackend("second", limit=3))
    monkeypatch.setenv("ZIGFLOW_BACKEND", "second")
    assert op.run(Call(1)) == "second"
    assert op.run(Call(1), "first") == "first"
    with use_backend("first"):
        assert op.run(Call(1)) == "first"
    with pytest.raises(ValueError, match="'second' does not take this call"):
        op.run(Call(4))
    monkeypatch.setenv("ZIGFLOW_BACKEND", "frst")
    with pytest.raises(ValueError, match="ZIGFLOW_BACKEND: unknown backend 'frst'. Did you mean 'first'"):
        op.run(Call(1))
    monkeypatch.setenv("ZIGFLOW_BACKEND", "auto")
    assert op.run(Call(1)) == "first"


def test_both_operations_try_the_fastest_first_and_list_what_exists():
    for listing in (available_backends(), dis_mamba.available_backends()):
        names = list(listing)
        assert names.index("cpu") < names.index("torch") < names.index("reference") == len(names) - 1
        assert listing["torch"] is None
        assert listing["reference"] is None


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"u": torch.ones(2, 3)}, ValueError, r"u has shape \(2, 3\), expected \(B,L,E\)"),
        ({"u": torch.ones(2, 0, 3)}, ValueError, r"u has shape \(2, 0, 3\): \(L,E\) must be at least 1"),
        ({"u": [1.0]}, TypeError, "u must be a tensor, got list"),
        (
            {"u": torch.ones(2, 4, 3, dtype=torch.int64)},
            TypeError,
            "u has dtype torch.int64, expected one of float32",
        ),
        (
            {"delta": torch.ones(2, 4, 5)},
            ValueError,
            r"delta has shape \(2, 4, 5\), expected \(B,L,E\) = \(2, 4, 3\)",
        ),
        ({"A": torch.ones(2, 5)}, ValueError, r"A has shape \(2, 5\), expected \(E,N\) = \(3, 5\)"),
        (
            {"B": torch.ones(2, 2, 4)},
            ValueError,
            r"B has shape \(2, 2, 4\), expected \(B,L,N\) = \(2, 4, 2\)",
        ),
        ({"C": torch.ones(2, 4, 2, dtype=torch.complex64)}, TypeError, "C has dtype torch.complex64"),
        ({"D": torch.ones(3, 1)}, ValueError, r"D has shape \(3, 1\), expected \(E\) = \(3,\)"),
        ({"z": torch.ones(1, 4, 3)}, ValueError, r"z has shape \(1, 4, 3\), expected \(B,L,E\)"),
        (
            {"delta_bias": torch.ones(3, device="meta")},
            ValueError,
            "delta_bias is on meta, the first argument on cpu",
        ),
        ({"backend": "trch"}, ValueError, "selective_scan: unknown backend 'trch'. Did you mean 'torch'"),
    ],
)
def test_selective_scan_refuses(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**(scan_arguments(2, 4, 3, 2) | change))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"x": torch.ones(2, 0, 3)}, ValueError, r"x has shape \(2, 0, 3\)"),
        ({"weight": torch.ones(3, 1, 4)}, ValueError, r"weight has shape \(3, 1, 4\), expected \(E,W\)"),
        ({"weight": torch.ones(5, 4)}, ValueError, r"weight has shape \(5, 4\), expected \(E,W\) = \(3, 4\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(E\) = \(3,\)"),
        ({"bias": torch.ones(3, dtype=torch.bool)}, TypeError, "bias has dtype torch.bool"),
        ({"activation": "relu"}, ValueError, "unknown activation 'relu', expected None, 'silu' or 'swish'"),
        ({"backend": "reference_"}, ValueError, "Did you mean 'reference'"),
    ],
)
def test_causal_conv1d_refuses(change, error, message):
    with pytest.raises(error, match=message):
        causal_conv1d(**(conv_arguments(2, 4, 3, 4) | change))


@pytest.mark.parametrize(
    "x,order,error,message",
    [
        (torch.ones(2, 4), torch.arange(4), ValueError, r"x has shape \(2, 4\), expected \(B,L,D\)"),
        (
            torch.ones(2, 4, 3),
            torch.arange(4).int(),
            TypeError,
            "order must be an int64 tensor, got torch.int32",
        ),
        (torch.ones(2, 4, 3), [0, 1, 2, 3], TypeError, "order must be an int64 tensor"),
        (
            torch.ones(2, 4, 3),
            torch.arange(5),
            ValueError,
            r"order has shape \(5,\), expected \(L,\) = \(4,\)",
        ),
        (torch.ones(2, 4, 3), torch.arange(4).expand(2, 4), ValueError, r"\(K,L\) and \(B,L\) are reserved"),
    ],
)
def test_permute_refuses(x, order, error, message):
    with pytest.raises(error, match=message):
        permute(x, order, order)


def test_permute_gathers_and_is_undone_by_the_inverse():
    order = torch.randperm(7)
    x = torch.randn(2, 7, 3, requires_grad=True)
    y = permute(x, order, order.argsort())
    assert torch.equal(y, x[:, order])
    assert torch.equal(permute(y, order.argsort(), order), x)
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(grad, weight[:, order.argsort()])


def test_a_shape_is_known_without_data_whatever_backend_is_named():
    scan = {name: value.to("meta") for name, value in scan_arguments(2, 4, 3, 2).items()}
    conv = {name: value.to("meta") for name, value in conv_arguments(2, 4, 3, 2).items()}
    for backend in ("reference", "torch"):
        out = selective_scan(**scan, backend=backend)
        assert out.is_meta and out.shape == scan["u"].shape
        out = causal_conv1d(**conv, backend=backend)
        assert out.is_meta and out.shape == conv["x"].shape
