"""Measurements for tests of benchmarks/gpu.py: they succeed, fail, die or never end. Imported by its worker."""

import os
import signal
import time


def right(device, value=1, **_):
    return {"value": value, "process": os.getpid(), "device": device}


def off(device, **_):
    return {"wrong": ["output is off by 3.0e+00 of its largest value, 1e-04 allowed"]}


def raises(device, **_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def leaves(device, **_):
    raise SystemExit("a contender is wrong")


def dies(device, **_):
    os.write(2, b"the driver says why\n")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(device, **_):
    time.sleep(600)


def differs(device, **_):
    return {"same": 1, "process": os.getpid()}


def no_number(device, **_):
    return {"milliseconds": float("nan")}


FUNCTIONS = {f.__name__: f for f in (right, off, raises, leaves, dies, hangs, differs, no_number)}
