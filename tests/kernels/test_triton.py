"""The Triton kernels without a GPU: interpreted against the definitions, and compiled for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dis_causal_conv1d
import dis_mamba
from dis_mamba import selective_scan

from .definitions import scan_arguments, with_gradients

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

has_triton = importlib.util.find_spec("triton") is not None


def run(*command, **env):
    return subprocess.run(
        [sys.executable, *command], env={**ENV, **env}, cwd=ROOT, capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
@pytest.mark.skipif(not has_triton, reason="triton has no package for this platform")
def test_interpreted_kernels_agree_with_the_definitions():
    from .triton_interpreter import CONVS, SCANS

    done = run("-m", "tests.kernels.triton_interpreter", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    agreed = [line for line in done.stdout.splitlines() if line.endswith(("agrees", "is finite"))]
    assert len(agreed) == len(SCANS) + len(CONVS) + 1


@pytest.mark.slow
@pytest.mark.skipif(not has_triton, reason="triton has no package for this platform")
@pytest.mark.parametrize("arch", [90, 80])
def test_compiled_kernels_spill_nothing(arch, tmp_path):
    done = run("benchmarks/triton_compile.py", "--arch", str(arch), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = {row["kernel"]: row for row in json.loads(done.stdout)["kernels"]}
    assert set(rows) == {"scan_forward", "scan_backward", "conv_forward", "conv_backward_taps"}
    for row in rows.values():
        assert row["spilled_bytes"] == row["LDL"] == row["STL"] == 0
        assert row["registers"] <= 255
    # The states of a token lie in the registers of one lane: the recurrence exchanges nothing between lanes.
    assert rows["scan_forward"]["SHFL"] == rows["scan_forward"]["LDS"] == rows["scan_forward"]["BAR"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_without_a_gpu_it_says_so():
    for listing in (dis_mamba.available_backends(), dis_causal_conv1d.available_backends()):
        assert listing["triton"] == "no CUDA device"
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: no CUDA device"):
        selective_scan(**scan_arguments(1, 2, 2, 2), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 3, 1), (2, 65, 33, 16), (1, 200, 130, 5), (3, 1024, 256, 16)])
def test_matches_the_torch_backend_on_a_gpu(shape, dtype, reverse):
    arguments = {
        k: v.detach().cuda().requires_grad_() for k, v in scan_arguments(*shape, dtype=dtype).items()
    }
    weight = torch.randn(shape[:3], dtype=torch.float64, device="cuda")
    flags = {"delta_softplus": True, "reverse": reverse}
    out, grads = with_gradients(selective_scan, arguments, weight, backend="triton", **flags)
    want, want_grads = with_gradients(selective_scan, arguments, weight, backend="torch", **flags)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert (out - want).abs().max() <= limit * want.abs().max()
    for name, grad in grads.items():
        assert (grad - want_grads[name]).abs().max() <= 10 * limit * want_grads[name].abs().max() + 1e-6
    again = with_gradients(selective_scan, arguments, weight, backend="triton", **flags)
    assert torch.equal(out, again[0])
    assert all(torch.equal(grads[name], again[1][name]) for name in grads)
