"""The most memory that a call needs above what was there before it."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(device: torch.device, function: Callable[[], object]) -> int:
    """Bytes of torch's allocator at their highest during ``function()``, less those held when it began.

    On a GPU the allocator counts itself. On a CPU the profiler reports every allocation and release, of eager
    operators, of compiled code and inside operators alike; a scratch buffer that a kernel gets from the system is not
    among them. The call is slower for it: never time it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # profiler.events() folds them into operators: what is held between two of an operator's own would be lost.
    # Beside what torch declares: the events as they came.
    recorded: Any = profiler.profiler
    found = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
