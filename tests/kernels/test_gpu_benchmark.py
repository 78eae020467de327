"""benchmarks/kernels_gpu.py where there is no GPU: every contender that runs here is checked and timed."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHAPE = (2, 12, 16, 4)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as for a script
    yield importlib.import_module("kernels_gpu")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_are_checked_and_timed(bench, dtype):
    report = bench.measure("cpu", [SHAPE], dtype, turns=2)
    (row,) = report["shapes"].values()
    forward, backward = (row["scan"]["milliseconds"][kind] for kind in ("forward", "backward"))
    assert {"torch", "gather, scan, scatter", "published loop"} <= set(forward)
    assert set(backward) == set(forward) - {"published loop"}
    assert all(ms > 0 for ms in (*forward.values(), *backward.values()))
    assert all(0 <= error <= 1 for error in row["largest_error_over_allowed"].values())
    if not torch.cuda.is_available():
        assert "triton" in report["missing"] and "mamba-ssm alone" in report["missing"]
    assert {"torch", "reference"} <= set(row["causal_conv1d"]["milliseconds"]["backward"])


def test_a_wrong_contender_is_not_timed(bench, monkeypatch):
    monkeypatch.setattr(bench, "gathered", lambda out: out)
    with pytest.raises(SystemExit, match="gather, scan, scatter at"):
        bench.measure("cpu", [SHAPE], torch.float32, turns=1)


def test_the_floor_is_what_limits(bench):
    """At 4.3 TB/s and 132 multiprocessors of 1.755 GHz: exponentials forward, arithmetic backward."""
    rates = {"bytes": 4.3e9, "exponentials": 16 * 132 * 1.755e6, "arithmetic": 128 * 132 * 1.755e6}
    floors = bench.floors((16, 1024, 1536, 16), torch.bfloat16, rates)
    assert floors["forward"] == pytest.approx(0.129, abs=0.001)
    assert floors["backward"] == pytest.approx(0.23, abs=0.01)
    narrow = bench.floors((16, 1024, 1536, 1), torch.bfloat16, rates)
    assert narrow["forward"] == pytest.approx((4 * 16 * 1024 * 1536 * 2) / 4.3e9, rel=0.05)
