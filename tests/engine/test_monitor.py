"""What a run logs: sums over samples, time bins, speed, utilization; the same lines however the run is cut."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.toys import TinyModel, make_trainer
from zigflow.engine import checkpoint, peak
from zigflow.engine.log import read_metrics
from zigflow.engine.monitor import MACHINE_KEYS, Monitor, process_memory
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_state import Counters
from zigflow.engine.step import StepRecord


def record(step, losses, times=None, batch=None):
    losses = torch.tensor(losses)
    times = torch.rand(len(losses)) if times is None else torch.tensor(times)
    loss = float(losses.double().mean())
    seen = step * (batch or len(losses))
    return StepRecord(step, seen, loss, 1.0, 0.1, torch.arange(len(losses)), times, losses)


class Joined:
    """Rank r of n threads that add their lists up."""

    def __init__(self, rank, size, barrier, slots):
        self.rank, self.size, self.is_main = rank, size, rank == 0
        self._barrier, self._slots = barrier, slots

    def sum(self, values):
        self._slots[self.rank] = list(values)
        self._barrier.wait(20)
        total = [math.fsum(column) for column in zip(*self._slots, strict=True)]
        self._barrier.wait(20)
        return total


def lines_of(losses_by_step, times_by_step, size, every, flush_at=()):
    """The lines of ``size`` processes, each with its part of every step."""
    barrier, slots = threading.Barrier(size), [None] * size
    found = {}

    def work(rank):
        counters = Counters()
        monitor = Monitor(counters, Joined(rank, size, barrier, slots), num_bins=4)
        lines = []
        for i, (losses, times) in enumerate(zip(losses_by_step, times_by_step, strict=True), start=1):
            part = slice(rank * len(losses) // size, (rank + 1) * len(losses) // size)
            step = record(i, losses[part], times[part], len(losses))
            monitor.observe(step)
            if i in flush_at:
                monitor.flush()
            if i % every == 0:
                lines.append({k: v for k, v in monitor.line(step).items() if k not in MACHINE_KEYS})
        found[rank] = lines

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(lines == found[0] for lines in found.values()), "every process knows the same sums"
    return found[0]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 5), st.sets(st.integers(1, 12)))
def test_lines_are_means_over_all_samples(seed, every, flush_at):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(12, 8, generator=generator).tolist()
    times = torch.rand(12, 8, generator=generator).tolist()
    one = lines_of(losses, times, 1, every, flush_at)
    assert one == lines_of(losses, times, 1, every), "saving in between changes no bit"
    assert lines_of(losses, times, 2, every, flush_at) == lines_of(losses, times, 2, every)
    for line, again in zip(one, lines_of(losses, times, 4, every), strict=True):
        assert line["loss"] == pytest.approx(again["loss"], rel=1e-12)
        assert line["loss_by_time"] == pytest.approx(again["loss_by_time"], rel=1e-12)
    for number, line in enumerate(one):
        window = range(number * every, (number + 1) * every)
        flat = [(t, x) for i in window for t, x in zip(times[i], losses[i], strict=True)]
        assert line["loss"] == pytest.approx(sum(x for _, x in flat) / len(flat), rel=1e-6)
        for i in range(4):
            inside = [x for t, x in flat if i / 4 <= t < (i + 1) / 4]
            name = f"{i / 4:.4g}-{(i + 1) / 4:.4g}"
            assert (name in line["loss_by_time"]) == bool(inside)
            if inside:
                assert line["loss_by_time"][name] == pytest.approx(sum(inside) / len(inside), rel=1e-6)


def test_times_at_and_beyond_the_ends_belong_to_the_outer_bins():
    monitor = Monitor(Counters(), Ranks(), interval=(0.25, 0.75), num_bins=2)
    step = record(1, [1.0, 2.0, 4.0, 8.0, 16.0], [0.0, 0.25, 0.5, 0.75, 1.0])
    monitor.observe(step)
    assert monitor.line(step)["loss_by_time"] == {"0.25-0.5": 1.5, "0.5-0.75": 28 / 3}
    none = Monitor(Counters(), Ranks(), num_bins=0)
    none.observe(step)
    assert none.line(step)["loss_by_time"] == {}


def test_speed_waiting_and_utilization(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("zigflow.engine.monitor.time.perf_counter", lambda: clock[0])
    monitor = Monitor(Counters(), Ranks(), training_flops=50.0, peak_flops=1000.0)
    monitor.waited(1.0)
    clock[0] += 6.0
    monitor.paused(2.0)
    step = record(1, [1.0] * 20)
    monitor.observe(step)
    line = monitor.line(step)
    assert line["images_per_second"] == 5.0, "a pause is not counted"
    assert line["data_wait"] == 0.25
    assert line["mfu"] == 50 * 5 / 1000
    clock[0] += 2.0
    second = record(2, [1.0] * 20)
    monitor.observe(second)
    line = monitor.line(second)
    assert (line["images_per_second"], line["data_wait"]) == (10.0, 0.0)
    assert 0.01 < line["memory_gib"] < 1000
    assert process_memory() > 1 << 24


def test_a_run_logs_from_its_first_step(tmp_path):
    make_trainer(tmp_path, steps=5, log_every=3, training_flops=1e3, peak_flops=1e9).fit()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 3]
    wanted = {
        "loss",
        "loss_by_time",
        "grad_norm",
        "lr",
        "images_per_second",
        "data_wait",
        "memory_gib",
        "mfu",
    }
    assert all(wanted <= set(line) for line in lines)
    assert lines[0]["loss"] > 0
    for line in lines:
        assert min(line["loss_by_time"].values()) <= line["loss"] <= max(line["loss_by_time"].values())
    counters = checkpoint.open_checkpoint(tmp_path).trainer["counters"]
    assert counters["loss_steps"] == 2
    assert sum(counters["time_counts"]) == 8


def test_without_known_peak_nothing_is_made_up(tmp_path):
    make_trainer(tmp_path, steps=1, model=TinyModel(), training_flops=1e3).fit()
    assert "mfu" not in read_metrics(tmp_path / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    "name, precision, tf32, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989),
        ("NVIDIA H100 PCIe", "fp16", False, 756),
        ("NVIDIA H200", "no", True, 494.5),
        ("NVIDIA A100-SXM4-80GB", "no", False, 19.5),
        ("NVIDIA A10", "bf16", False, 125),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA L4", "bf16", False, 121),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125),
        ("NVIDIA GH200 480GB", "bf16", False, 989),
    ],
)
def test_known_devices(name, precision, tf32, teraflops):
    assert peak.rate_of(name, precision, tf32) == teraflops * 1e12


def test_an_unknown_device_has_no_rate_and_a_cpu_is_measured_once():
    assert peak.rate_of("NVIDIA H1000", "bf16", False) is None
    state = torch.get_rng_state()
    first = peak.peak_flops(torch.device("cpu"))
    assert first > 1e6
    assert peak.peak_flops(torch.device("cpu")) == first
    assert torch.equal(state, torch.get_rng_state())
