"""What is logged of a training run: loss, loss by time, speed, waiting, memory, utilization.

Losses are sums over the samples of all processes in float64. A step's local sums wait in a list and are added over
the processes in one collective when a line is due or a checkpoint is saved, step by step in the order of steps: so a
line's bits depend neither on where the run was cut nor on how often it was saved. What has been added up stands
in the counters and travels in the checkpoint.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks
from .run_state import Counters
from .step import StepRecord

__all__ = ["MACHINE_KEYS", "Monitor", "process_memory"]

# The keys of a line that depend on the machine; all others are equal in a run that was cut and one that was not.
MACHINE_KEYS = ("images_per_second", "data_wait", "mfu", "memory_gib", "cuda_memory_gib")
_GIB = 1024.0**3


class Monitor:
    """Turns steps into lines.

    Args:
        counters: hold the sums since the last line.
        ranks: all processes call every method together.
        interval: first and last training time of the process, cut into ``num_bins`` equal bins.
        num_bins: 0 logs no loss by time.
        training_flops: operations of one sample's forward and backward pass, or None.
        peak_flops: operations per second of one device, or None.
        device: whose memory is asked for.

    Attributes:
        images_per_second: of the whole run, since the last line.
    """

    def __init__(
        self,
        counters: Counters,
        ranks: Ranks,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        num_bins: int = 8,
        training_flops: float | None = None,
        peak_flops: float | None = None,
        device: torch.device | str = "cpu",
    ):
        self.counters, self.ranks, self.num_bins = counters, ranks, num_bins
        self.interval = interval
        self.device = torch.device(device)
        self._flops, self._peak = training_flops, peak_flops
        self._pending: list[list[float]] = []
        self.images_per_second = 0.0
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """The clock starts here: call it before the first step of this process."""
        self._started, self._images = time.perf_counter(), self.counters.images_seen
        self._waited = self._paused = 0.0

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for data."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Take time that was no training (an evaluation, a save) out of the speed."""
        self._paused += seconds

    def observe(self, record: StepRecord) -> None:
        """Take in a step."""
        sums, counts = self._binned(record.times, record.losses)
        self._pending.append([record.loss, 1.0, *sums, *counts])
        elapsed = max(time.perf_counter() - self._started - self._paused, 1e-9)
        self.images_per_second = (record.images_seen - self._images) / elapsed

    def flush(self) -> None:
        """Add what is pending over all processes into the counters; called by all before a checkpoint."""
        if not self._pending:
            return
        width, bins = len(self._pending[0]), self.num_bins
        flat = self.ranks.sum([value for step in self._pending for value in step])
        self._pending = []
        counters = self.counters
        if len(counters.time_sums) != bins:
            counters.time_sums, counters.time_counts = [0.0] * bins, [0.0] * bins
        for first in range(0, len(flat), width):
            loss, processes, *rest = flat[first : first + width]
            counters.loss_sum += loss / processes
            counters.loss_steps += 1
            for i in range(bins):
                counters.time_sums[i] += rest[i]
                counters.time_counts[i] += rest[bins + i]

    def line(self, record: StepRecord) -> dict[str, Any]:
        """The values since the last line; the next ones start here."""
        self.flush()
        counters = self.counters
        elapsed = max(time.perf_counter() - self._started - self._paused, 1e-9)
        values: dict[str, Any] = {
            "step": record.step,
            "images_seen": record.images_seen,
            "loss": counters.loss_sum / counters.loss_steps,
            "loss_by_time": self._by_time(),
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "skipped": counters.skipped,
            "images_per_second": self.images_per_second,
            "data_wait": self._waited / elapsed,
            "memory_gib": process_memory() / _GIB,
        }
        if self.device.type == "cuda":
            values["cuda_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / _GIB
        if self._flops and self._peak:
            values["mfu"] = self._flops * self.images_per_second / (self._peak * self.ranks.size)
        counters.loss_sum, counters.loss_steps = 0.0, 0
        counters.time_sums, counters.time_counts = [], []
        self.start()
        self._images = record.images_seen
        return values

    def _binned(self, times: Tensor, losses: Tensor) -> tuple[list[float], list[float]]:
        """Sums and counts of this process's losses by bin."""
        low, high = self.interval
        if not self.num_bins:
            return [], []
        place = (times.double() - low) / (high - low) * self.num_bins
        index = place.floor().long().clamp(0, self.num_bins - 1)
        zeros = torch.zeros(self.num_bins, dtype=torch.float64)
        sums = zeros.index_add(0, index, losses.double())
        counts = zeros.index_add(0, index, torch.ones_like(losses, dtype=torch.float64))
        return sums.tolist(), counts.tolist()

    def _by_time(self) -> dict[str, float]:
        """Mean loss by "first-last" time; a bin without samples is left out."""
        low, high = self.interval
        edges = (
            [low + (high - low) * i / self.num_bins for i in range(self.num_bins + 1)]
            if self.num_bins
            else []
        )
        sums = zip(self.counters.time_sums, self.counters.time_counts, strict=True)
        return {
            f"{edges[i]:.4g}-{edges[i + 1]:.4g}": total / count
            for i, (total, count) in enumerate(sums)
            if count
        }


def process_memory() -> int:
    """Bytes of memory that this process holds now (its peak where the system does not say)."""
    # At use: Windows has no such module.
    import resource

    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
