"""The backend over mamba-ssm and causal-conv1d: conversions against stand-ins on the CPU, refusals, and on a GPU."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dis_causal_conv1d
import dis_mamba
from dis_causal_conv1d import causal_conv1d
from dis_causal_conv1d.backends.call import ConvCall
from dis_causal_conv1d.backends.cuda_package import PackageConv, package_conv, probe_conv
from dis_kernels.installed import refusal
from dis_mamba import selective_scan
from dis_mamba.backends.call import ScanCall
from dis_mamba.backends.cuda_package import PackageScan, package_scan, package_scan_backward, probe_scan
from tests.assertions import assert_close, assert_relative_rms

from . import package_stand_ins
from .definitions import (
    SCAN_NAMES,
    conv_arguments,
    conv_definition,
    scan_arguments,
    scan_definition,
    with_gradients,
)

ALL = ("D", "z", "delta_bias")


@pytest.fixture
def packages(monkeypatch):
    for name, module in package_stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def scan(delta_softplus=False, reverse=False, **arguments):
    """The registered operator, which looks at no device."""
    return package_scan(*(arguments.get(name) for name in SCAN_NAMES), delta_softplus, reverse)[0]


def conv(x, weight, bias=None, activation=None, reverse=False):
    return package_conv(x, weight, bias, activation is not None, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("options", [ALL, (), ("z",), ("D", "delta_bias")])
@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 1, 1, 1), (3, 4, 2, 16)])
def test_scan_and_its_gradients(packages, shape, options, reverse):
    arguments = scan_arguments(*shape, options=options)
    flags = {"delta_softplus": bool(options), "reverse": reverse}
    out, grads = with_gradients(scan, arguments, **flags)
    want, want_grads = with_gradients(scan_definition, arguments, **flags)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    assert_close("output", out, want, of_max=1e-5)
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=1e-4, floor=1e-6)


def test_scan_of_sequences_in_several_dtypes_and_strides(packages):
    arguments = scan_arguments(2, 6, 4, 3)
    arguments["u"] = arguments["u"].detach().bfloat16().requires_grad_()
    wide = torch.randn(2, 6, 9).half()
    arguments["B"] = wide[..., ::3].detach().requires_grad_()
    out, grads = with_gradients(scan, arguments, delta_softplus=True)
    want, want_grads = with_gradients(scan_definition, arguments, delta_softplus=True)
    assert out.dtype == torch.bfloat16
    assert_relative_rms("output", out, want, 2e-2)
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert_relative_rms(f"gradient of {name}", grad, want_grads[name], 2e-2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 16, 4), (2, 5, 3, 2), (1, 1, 8, 3)])
def test_convolution_and_its_gradients(packages, shape, bias, activation, reverse):
    arguments = conv_arguments(*shape, bias=bias)
    flags = {"activation": activation, "reverse": reverse}
    out, grads = with_gradients(conv, arguments, **flags)
    want, want_grads = with_gradients(conv_definition, arguments, **flags)
    assert out.is_contiguous()
    assert_close("output", out, want, of_max=1e-5)
    for name, grad in grads.items():
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=1e-4, floor=1e-6)


def test_convolution_of_half_precision_with_parameters_of_two_dtypes(packages):
    arguments = conv_arguments(2, 6, 8, 4, dtype=torch.bfloat16)
    arguments["weight"] = arguments["weight"].detach().float().requires_grad_()
    # Eight rows of sixteen at an odd address: the view may not go to the kernel as it is.
    shifted = torch.randn(2 * 6 * 8 + 1).bfloat16()[1:].view(2, 6, 8)
    for x in (arguments["x"].detach(), shifted):
        arguments["x"] = x.requires_grad_()
        out, grads = with_gradients(conv, arguments, activation="silu")
        want, want_grads = with_gradients(conv_definition, arguments, activation="silu")
        assert out.dtype == torch.bfloat16
        assert_relative_rms("output", out, want, 2e-2)
        for name, grad in grads.items():
            assert grad.dtype == arguments[name].dtype
            assert_relative_rms(f"gradient of {name}", grad, want_grads[name], 2e-2)


def test_an_empty_batch_never_reaches_the_packages():
    out, grads = with_gradients(scan, scan_arguments(0, 3, 2, 2))
    assert out.shape == (0, 3, 2)
    assert all((grad == 0).all() for grad in grads.values())
    out, grads = with_gradients(conv, conv_arguments(0, 3, 2, 2))
    assert out.shape == (0, 3, 2)
    assert all((grad == 0).all() for grad in grads.values())


@pytest.mark.parametrize("options", [ALL, ()])
def test_the_operators_keep_their_contracts(packages, options):
    arguments = scan_arguments(2, 5, 3, 2, options=options)
    tensors = [arguments.get(name) for name in SCAN_NAMES]
    torch.library.opcheck(package_scan, (*tensors, True, True))
    frozen = [None if t is None else t.detach() for t in tensors]
    out, *saved = package_scan(*frozen, True, False)
    torch.library.opcheck(package_scan_backward, (out, *frozen, *saved, True, False))
    arguments = conv_arguments(2, 5, 8, 3, bias=bool(options))
    torch.library.opcheck(package_conv, (*(arguments.get(n) for n in ("x", "weight", "bias")), True, True))


def test_compiled_without_a_graph_break(packages):
    arguments = scan_arguments(2, 5, 3, 2)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    out, grads = with_gradients(compiled, arguments, delta_softplus=True)
    want, want_grads = with_gradients(scan, arguments, delta_softplus=True)
    assert torch.equal(out, want)
    assert all(torch.equal(grads[name], want_grads[name]) for name in grads)


def test_selective_checkpointing_runs_the_package_once(packages, monkeypatch):
    calls = []
    forward = package_stand_ins.scan_fwd
    monkeypatch.setattr(
        sys.modules["selective_scan_cuda"], "fwd", lambda *given: calls.append(1) or forward(*given)
    )

    def keep(context, op, *args, **kwargs):
        kept = op.name().startswith("zigflow::")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    arguments = scan_arguments(1, 4, 2, 2)
    out = checkpoint(
        lambda *given: scan(**dict(zip(arguments, given, strict=True))),
        *arguments.values(),
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(keep),
    )
    out.sum().backward()
    assert len(calls) == 1


def test_there_is_no_second_derivative(packages):
    arguments = scan_arguments(1, 3, 2, 2)
    (grad,) = torch.autograd.grad(scan(**arguments).sum(), arguments["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="'cuda_package' has no second derivative"):
        grad.sum().backward()
    arguments = conv_arguments(1, 3, 8, 2)
    (grad,) = torch.autograd.grad(conv(**arguments).sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="'cuda_package' has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("probe", [probe_scan, probe_conv])
def test_a_working_package_is_not_refused(packages, probe):
    assert refusal("package", probe, "cpu") is None
    # Whatever the caller is in the middle of.
    with torch.inference_mode(), torch.device("meta"):
        assert refusal("package", probe, "cpu") is None


def raising(error):
    def function(*args):
        raise error

    return function


@pytest.mark.parametrize(
    "error,reason",
    [
        (
            RuntimeError("CUDA error: no kernel image is available\nmore"),
            "RuntimeError: CUDA error: no kernel image",
        ),
        (OSError("libcudart.so.11: cannot open"), "OSError: libcudart.so.11"),
        (TypeError("fwd(): incompatible function arguments"), r"TypeError: fwd\(\): incompatible"),
        (ImportError("undefined symbol: _ZN2at"), "ImportError: undefined symbol"),
    ],
)
def test_a_broken_package_is_refused_with_its_error(packages, monkeypatch, error, reason):
    monkeypatch.setattr(sys.modules["selective_scan_cuda"], "fwd", raising(error))
    functions = sys.modules["causal_conv1d.cpp_functions"]
    monkeypatch.setattr(functions, "causal_conv1d_fwd_function", raising(error))
    for package, probe in (("mamba-ssm", probe_scan), ("causal-conv1d", probe_conv)):
        found = refusal(package, probe, "cpu")
        assert found is not None
        assert "more" not in found
        with pytest.raises(AssertionError, match=f"{package} does not run here: {reason}"):
            raise AssertionError(found)


def test_a_package_that_computes_wrong_values_is_refused(packages, monkeypatch):
    def zeros(*given):
        return [torch.zeros_like(t) for t in package_stand_ins.scan_fwd(*given)]

    monkeypatch.setattr(sys.modules["selective_scan_cuda"], "fwd", zeros)
    assert "computes wrong values" in refusal("mamba-ssm", probe_scan, "cpu")


def test_a_package_that_is_missing_or_lacks_its_compiled_part_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    monkeypatch.setitem(sys.modules, "causal_conv1d.cpp_functions", None)
    for probe in (probe_scan, probe_conv):
        found = refusal("the package", probe, "cpu")
        assert "ModuleNotFoundError" in found
        assert "mamba-cuda" in found


def test_a_bug_of_ours_is_no_refusal():
    with pytest.raises(ZeroDivisionError):
        refusal("package", raising(ZeroDivisionError()), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_without_a_gpu_it_says_so(packages):
    for listing in (dis_mamba.available_backends(), dis_causal_conv1d.available_backends()):
        assert listing["cuda_package"] == "no CUDA device"
        names = list(listing)
        assert names.index("triton") < names.index("cuda_package") < names.index("torch")
    with pytest.raises(RuntimeError, match="backend 'cuda_package' cannot run here: no CUDA device"):
        selective_scan(**scan_arguments(1, 2, 2, 2), backend="cuda_package")


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU, for what ``accepts`` looks at."""

    is_cuda = True


def calls(dtype=torch.float32, N=2, W=4):
    arguments = scan_arguments(1, 3, 2, N, dtype=dtype)
    tensors = [arguments[name].detach().as_subclass(OnCuda) for name in SCAN_NAMES]
    conv = [t.detach().as_subclass(OnCuda) for t in conv_arguments(1, 3, 2, W, dtype=dtype).values()]
    return ScanCall(*tensors, True, False), ConvCall(*conv, True, False)


def test_what_a_call_is_refused_for():
    scan_call, conv_call = calls()
    assert PackageScan().accepts(scan_call) is None
    assert PackageConv().accepts(conv_call) is None
    on_cpu = scan_call._replace(u=scan_call.u.as_subclass(torch.Tensor))
    assert PackageScan().accepts(on_cpu) == "it takes CUDA tensors, got cpu"
    for call in calls(torch.float64):
        backend = PackageScan() if isinstance(call, ScanCall) else PackageConv()
        assert "float64: use backend='torch'" in backend.accepts(call)
    assert "at most 256 states, got 257" in PackageScan().accepts(calls(N=257)[0])
    assert "2 to 4 taps, got 5" in PackageConv().accepts(calls(W=5)[1])
    assert "2 to 4 taps, got 1" in PackageConv().accepts(calls(W=1)[1])


def test_atomics_are_refused_where_deterministic_algorithms_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for backend, call in zip((PackageScan(), PackageConv()), calls(), strict=True):
        assert "float atomics" in backend.accepts(call)


def test_transforms_and_tangents_are_refused():
    scan_call, _ = calls()
    plain = SimpleNamespace(reason=None)

    def inside(u):
        plain.reason = PackageScan().accepts(scan_call)
        return u.sum()

    torch.func.grad(inside)(torch.ones(2))
    assert "torch.func transform" in plain.reason
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(1, 3, 2), torch.ones(1, 3, 2))
        assert "forward-mode tangent" in PackageScan().accepts(scan_call._replace(z=dual))


needs_scan = pytest.mark.skipif(
    not torch.cuda.is_available() or dis_mamba.available_backends()["cuda_package"] is not None,
    reason="mamba-ssm does not run here",
)
needs_conv = pytest.mark.skipif(
    not torch.cuda.is_available() or dis_causal_conv1d.available_backends()["cuda_package"] is not None,
    reason="causal-conv1d does not run here",
)


@pytest.mark.gpu
@needs_scan
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 3, 1), (2, 65, 33, 16), (1, 2100, 24, 5), (3, 1024, 256, 16)])
def test_scan_matches_the_torch_backend_on_a_gpu(shape, dtype, reverse):
    arguments = {
        k: v.detach().cuda().requires_grad_() for k, v in scan_arguments(*shape, dtype=dtype).items()
    }
    weight = torch.randn(shape[:3], dtype=torch.float64, device="cuda")
    compare(selective_scan, arguments, weight, dtype, delta_softplus=True, reverse=reverse)


@pytest.mark.gpu
@needs_conv
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (2, 65, 33, 3), (3, 1024, 256, 4)])
def test_convolution_matches_the_torch_backend_on_a_gpu(shape, dtype, reverse):
    arguments = {
        k: v.detach().cuda().requires_grad_() for k, v in conv_arguments(*shape, dtype=dtype).items()
    }
    weight = torch.randn(shape[:3], dtype=torch.float64, device="cuda")
    compare(causal_conv1d, arguments, weight, dtype, activation="silu", reverse=reverse)


def compare(function, arguments, weight, dtype, **flags):
    out, grads = with_gradients(function, arguments, weight, backend="cuda_package", **flags)
    want, want_grads = with_gradients(function, arguments, weight, backend="torch", **flags)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert_close("output", out, want, of_max=limit)
    for name, grad in grads.items():
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=10 * limit, floor=1e-6)
