"""The fastest that a device can multiply: what utilization is measured against."""

import functools
import logging
import re
import time

import torch

__all__ = ["PEAKS", "peak_flops"]

log = logging.getLogger(__name__)

# Dense tensor-core rates in TFLOP/s from the vendors' data sheets, by what the device's name holds, first match:
# float32 without tensor cores, float32 through TF32, float16 and bfloat16.
PEAKS = (
    ("B200", (75.0, 1100.0, 2250.0)),
    ("GB200", (80.0, 1250.0, 2500.0)),
    ("H100 PCIE", (51.0, 378.0, 756.0)),
    ("H100 NVL", (60.0, 418.0, 835.0)),
    ("H100", (67.0, 494.5, 989.0)),
    ("H200 NVL", (60.0, 418.0, 835.0)),
    ("H200", (67.0, 494.5, 989.0)),
    ("GH200", (67.0, 494.5, 989.0)),
    ("A100", (19.5, 156.0, 312.0)),
    ("A800", (19.5, 156.0, 312.0)),
    ("A40", (37.4, 74.8, 149.7)),
    ("A30", (10.3, 82.0, 165.0)),
    ("A10", (31.2, 62.5, 125.0)),
    ("L40S", (91.6, 183.0, 362.0)),
    ("L40", (90.5, 90.5, 181.0)),
    ("L4", (30.3, 60.0, 121.0)),
    ("V100", (15.7, 15.7, 125.0)),
    ("T4", (8.1, 8.1, 65.0)),
    ("RTX 4090", (82.6, 82.6, 165.2)),
    ("RTX 3090", (35.6, 35.6, 71.0)),
)


def peak_flops(device: torch.device, mixed_precision: str = "no") -> float | None:
    """Operations per second (a multiply-add is two) of one device at the precision of a run's products.

    A GPU's number is looked up; a CPU multiplies two matrices once per process, with the threads that it has now.

    Returns:
        None when the GPU is not in the table; give ``loop.peak_flops`` then.
    """
    if device.type == "cpu":
        return _measured(mixed_precision, torch.get_num_threads())
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rate = rate_of(name, mixed_precision, torch.get_float32_matmul_precision() != "highest")
    if rate is None:
        log.info("the peak rate of %s is not known: no utilization is logged; give loop.peak_flops", name)
    return rate


def rate_of(name: str, mixed_precision: str, tf32: bool) -> float | None:
    """The table's operations per second for a device of that name."""
    for known, rates in PEAKS:
        # Whole words: "A10" is not in "A100", "L4" not in "L40S".
        if re.search(rf"(?<![A-Z0-9]){known}(?![A-Z0-9])", name.upper().replace("-", " ")):
            return 1e12 * rates[2 if mixed_precision in ("fp16", "bf16") else int(tf32)]
    return None


@functools.cache
def _measured(mixed_precision: str, threads: int) -> float:
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    size = 512
    # Not from torch's generator, whose state belongs to the run.
    a = torch.linspace(-1, 1, size * size).reshape(size, size).to(dtype)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    rate = 2 * size**3 / best
    log.info("this CPU multiplies at %.3g FLOP/s with %d threads", rate, threads)
    return rate
