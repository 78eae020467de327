"""The profile of a step and its peak memory (benchmarks/): every millisecond is in a row, every byte is counted."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from dis_mamba import use_backend

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))  # as for a script
    names = ("step_profile", "peak_memory", "cases")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(BENCHMARKS))


def case_of(bench, arrangement="ours", mode="eager", policy="none", setting=None):
    options = Namespace(device=CPU, precision="no", backend="torch")
    setting = setting or bench.cases.SIZES["tiny"][0]
    return bench.cases.Case(
        setting, arrangement, mode, policy, bench.cases.weights_of(setting, options), options
    )


def table_of(bench, case):
    case.train()
    return bench.step_profile.profiled(case.train, case.model, CPU, 2, seconds=1.0)


def groups(table):
    # Every number is rounded to 0.1 us, which of a step of 70 us is more than a thousandth.
    rounding = 1e-4 * len(table["rows"])
    assert sum(row["ms"] for row in table["rows"]) == pytest.approx(table["step_ms"], rel=1e-3, abs=rounding)
    assert sum(row["share"] for row in table["rows"]) == pytest.approx(
        1, abs=1e-3 + rounding / table["step_ms"]
    )
    return {row["group"]: row for row in table["rows"]}


def test_rows_of_an_eager_step_are_the_whole_step(bench):
    case = case_of(bench)
    found = groups(table_of(bench, case))
    for group in (
        "matrix products", "selective scan, forward", "selective scan, backward", "convolution, forward",
        "convolution, backward", "norms, modulation, residual sums", "optimizer",
        "averages of the weights", "loss", "copies and casts", "views and allocation", "autograd engine",
        "Python between operators",
    ):  # fmt: skip
        assert found[group]["ms"] > 0, group
    assert found["not attributed"]["ms"] == pytest.approx(0, abs=1e-3)
    with use_backend("torch"):
        unfused = groups(table_of(bench, case))
    # Two layers; forward, backward of the gathers to and back: an operator and what it calls, at least.
    assert unfused["scan orders (gathers)"]["events"] >= 8
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in case.model.modules()]
    assert not any(any(pair) for pair in hooks), "the profile leaves hooks behind"


def test_attention_and_recomputation_have_their_place(bench):
    assert "attention" in groups(table_of(bench, case_of(bench, "dit")))
    once, twice = (
        groups(table_of(bench, case_of(bench, policy=policy)))["selective scan, forward"]["events"]
        for policy in ("none", "block")
    )
    assert twice > once


@pytest.mark.slow
def test_kernels_of_a_compiled_step_go_by_their_names(bench, monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "enable_kernel_profile", True)
    torch._dynamo.reset()
    found = groups(table_of(bench, case_of(bench, mode="compiled")))
    torch._dynamo.reset()
    generated = [group for group in found if group.startswith("generated: cpp_fused_")]
    assert any("silu" in name for name in generated), found.keys()
    for group in (
        "matrix products", "selective scan, forward", "selective scan, backward", "optimizer",
        "norms, modulation, residual sums",
    ):  # fmt: skip
        assert found[group]["ms"] > 0, group


@torch.library.custom_op("benchmark_tests::sleep", mutates_args=())
def unheard_of(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_unknown_operators_go_by_their_names(bench):
    def step():
        torch.ops.benchmark_tests.sleep(torch.ones(3))
        torch.ones(3).cumsum(0)

    found = groups(bench.step_profile.profiled(step, torch.nn.Identity(), CPU, 1, seconds=1.0))
    assert {"other: benchmark_tests::sleep", "other: aten::cumsum"} <= set(found)


def operator(name, parent=None, kernels=(), sequence=-1):
    return SimpleNamespace(
        name=name, device_type=DeviceType.CPU, is_async=False, cpu_parent=parent, cpu_time_total=1000.0,
        kernels=[SimpleNamespace(name=k, duration=d) for k, d in kernels], sequence_nr=sequence,
        is_user_annotation=False,
    )  # fmt: skip


def kernel(name, start, end, scope=False):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, device_type=DeviceType.CUDA, is_async=True, time_range=span, kernels=[], sequence_nr=-1,
        is_user_annotation=scope, cpu_parent=None,
    )  # fmt: skip


def test_kernels_of_a_gpu_are_counted_once_and_gaps_are_a_row(bench):
    """A step of 2 ms with 1.2 ms of kernels, of which 0.1 ms ran beside another: as the profiler gives events there."""
    step = operator("benchmark: step")
    block = operator("benchmark: module ZigMaBlock", step)
    norm = operator("aten::mul", block, [("vectorized_mul", 100.0)], sequence=7)
    node = operator("autograd::engine::evaluate_function: MulBackward0", None, sequence=7)
    scan = operator("zigflow::triton_scan_backward", operator("Node", None), [("scan_backward", 300.0)])
    events = [
        step, block, norm, node, scan,
        operator("aten::mul", operator("MulBackward0", node), [("vectorized_mul", 100.0)]),
        operator("aten::mm", step, [("nvjet_tst_128x256", 400.0)]),
        operator("triton_poi_fused_add_mul_3", step, [("triton_poi_fused_add_mul_3", 100.0)]),
        operator("mylib::op", block, [("a_kernel", 50.0)]),
        # Scopes are repeated on the device, and are no kernels.
        operator("benchmark: step", None, [("benchmark: step", 1900.0)]),
        kernel("benchmark: step", 0, 1900, scope=True),
        kernel("vectorized_mul", 0, 100), kernel("vectorized_mul", 100, 200), kernel("scan_backward", 200, 500),
        kernel("nvjet_tst_128x256", 500, 900), kernel("triton_poi_fused_add_mul_3", 800, 900),
        kernel("a_kernel", 1000, 1050), kernel("nobody_knows", 1100, 1250),
    ]  # fmt: skip
    table = bench.step_profile.account(events, on_gpu=True, steps=1, seconds=2e-3)
    found = {name: row["ms"] for name, row in groups(table).items()}
    assert found == {
        "no kernel runs": pytest.approx(0.9),
        "matrix products": pytest.approx(0.4),
        "selective scan, backward": pytest.approx(0.3),
        "norms, modulation, residual sums": pytest.approx(0.2),
        "other: nobody_knows": pytest.approx(0.15),
        "generated: triton_poi_fused_add_mul": pytest.approx(0.1),
        "other: mylib::op": pytest.approx(0.05),
        "kernels at the same time": pytest.approx(-0.1),
        "not attributed": pytest.approx(0),
    }
    assert "no kernel runs" in bench.step_profile.text_of(table)


def test_peak_memory_counts_every_byte(bench):
    x = torch.zeros(1000, 100)
    size = x.numel() * 4
    peak = bench.peak_memory.peak_bytes
    assert peak(CPU, lambda: (x + 1) + (x + 2)) == pytest.approx(3 * size, rel=0.001)
    assert peak(CPU, lambda: ((x + 1).sum(), (x + 2).sum())) == pytest.approx(size, rel=0.01)
    kept = []
    assert peak(CPU, lambda: kept.append(x + 1)) == pytest.approx(size, rel=0.001)


@pytest.mark.slow
def test_checkpoint_policies_differ_in_peak_memory(bench):
    setting = bench.cases.Setting("", 64, 4, 1, 16, 1)
    found = {}
    for policy in ("none", "selective", "block"):
        case = case_of(bench, policy=policy, setting=setting)
        case.train()
        found[policy] = bench.peak_memory.peak_bytes(CPU, case.train)
    case.inference()
    found["inference"] = bench.peak_memory.peak_bytes(CPU, case.inference)
    # Norms and gathers keep nothing, so that recomputing them frees nothing.
    assert min(found["none"], found["selective"]) > 1.5 * found["block"] > found["inference"] > 0
