"""benchmarks/kernels_gpu.py where there is no GPU: every contender that runs here is checked and timed."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from . import package_stand_ins

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


def test_a_wrong_contender_is_reported_and_not_timed(bench, monkeypatch):
    monkeypatch.setattr(bench, "gathered", lambda out: out)
    report = bench.Report({}, None)
    with pytest.raises(SystemExit, match="gather, scan, scatter at"):
        bench.measure("cpu", [SHAPE], torch.float32, turns=1, report=report)
    (row,) = report["shapes"].values()
    (message,) = row["wrong"].values()
    assert re.search(r"output is off by \d\.\de[+-]\d+, not timed", message)
    for each in row["scan"]["milliseconds"].values():
        assert "torch" in each and "gather, scan, scatter" not in each


def test_a_contender_wrong_at_one_shape_is_timed_at_others(bench, monkeypatch, tmp_path):
    from machine import Report

    other = (1, 5, 8, 2)
    check = bench.check

    def wrong_at_the_second(contender, shape, dtype):
        if shape == other and contender.name == "torch":
            raise bench.Wrong(f"{contender.name} at {shape}: not timed")
        return check(contender, shape, dtype)

    monkeypatch.setattr(bench, "check", wrong_at_the_second)
    target = tmp_path / "result.json"
    with pytest.raises(SystemExit, match="not timed"), Report({"note": "a test"}, target) as report:
        bench.measure("cpu", [SHAPE, other], torch.float32, turns=1, report=report)
    stored = json.loads(target.read_text())
    timed = {
        shape: "torch" in row["scan"]["milliseconds"]["forward"] for shape, row in stored["shapes"].items()
    }
    assert timed == {str(SHAPE): True, str(other): False}
    assert stored["note"] == "a test"
    assert stored["complete"] is False
    assert stored["stopped"].endswith("at (1, 5, 8, 2): not timed")


def test_the_packages_alone_compute_scan_and_convolution(bench, monkeypatch):
    """Their compiled functions, called as the benchmark calls them, by stand-ins with their signatures and checks."""
    for name, module in package_stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    alone = bench.Contender("mamba-ssm alone", "cpu", bench.package_scan, bench.channel_major)
    assert 0 < bench.check(alone, SHAPE, torch.float32) <= 1
    row = bench.measure_convolutions(SHAPE, torch.float32, "cpu", turns=1)
    for kind in ("forward", "backward"):
        assert row["milliseconds"][kind][bench.PACKAGE_CONV] > 0
    # "triton" stands for a backend that runs here.
    monkeypatch.setattr(
        bench, "measure_scans", lambda *_: {"milliseconds": {"forward": {"torch": 3, "triton": 2}}}
    )
    convolutions = {"milliseconds": {"backward": {bench.PACKAGE_CONV: 4, "triton": 1}}}
    monkeypatch.setattr(bench, "measure_convolutions", lambda *_: convolutions)
    monkeypatch.setattr(bench, "check", lambda *_: 0.5)
    (row,) = bench.measure("cpu", [SHAPE], turns=1)["shapes"].values()
    assert row["peer_over_triton"] == {
        "scan: torch, forward": 1.5,
        f"causal_conv1d: {bench.PACKAGE_CONV}, backward": 4,
    }


def test_a_wrong_convolution_is_not_timed(bench, monkeypatch):
    for name, module in package_stand_ins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        sys.modules["causal_conv1d.cpp_functions"],
        "causal_conv1d_bwd_function",
        lambda x, weight, bias, *_: (torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)),
    )
    row = bench.measure_convolutions(SHAPE, torch.float32, "cpu", turns=1)
    (message,) = row["wrong"].values()
    assert re.search(r"causal-conv1d alone at .*: x off by 1.0e\+00, not timed", message)
    for each in row["milliseconds"].values():
        assert "torch" in each and bench.PACKAGE_CONV not in each


def test_a_machine_without_a_compiler_is_no_hindrance(bench, monkeypatch):
    import kernels

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.packages()["compiler"].startswith("none: no C++ compiler: CXX = 'no-such-compiler'")


def test_the_floor_is_what_limits(bench):
    """At 4.3 TB/s and 132 multiprocessors of 1.755 GHz: exponentials forward, arithmetic backward."""
    rates = {"bytes": 4.3e9, "exponentials": 16 * 132 * 1.755e6, "arithmetic": 128 * 132 * 1.755e6}
    floors = bench.floors((16, 1024, 1536, 16), torch.bfloat16, rates)
    assert floors["forward"] == pytest.approx(0.129, abs=0.001)
    assert floors["backward"] == pytest.approx(0.23, abs=0.01)
    narrow = bench.floors((16, 1024, 1536, 1), torch.bfloat16, rates)
    assert narrow["forward"] == pytest.approx((4 * 16 * 1024 * 1536 * 2) / 4.3e9, rel=0.05)
