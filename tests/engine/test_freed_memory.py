"""Freed memory is kept for the next step, unless the user has told the C library otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from zigflow.engine import launch
from zigflow.engine.freed_memory import keep_freed_memory

PAGES = 16384
PROGRAM = f"""
import resource, sys
from zigflow.engine.freed_memory import keep_freed_memory
changed = keep_freed_memory() if sys.argv[1] == "keep" else False
def step():
    block = bytearray({PAGES} * 4096)
    block[::4096] = b"x" * {PAGES}
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(int(changed), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what, environ=None):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True, env=environ
    )
    changed, pages = map(int, done.stdout.split())
    return bool(changed), pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library here is not glibc")
def test_the_next_step_finds_its_pages(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    changed, pages = faults("keep")
    assert changed
    # A kernel of larger pages faults less often either way.
    assert pages < faults("leave")[1] / 10


@pytest.mark.parametrize(
    "environ",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1"},
        {"MALLOC_ARENA_MAX": "2"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"},
    ],
)
def test_what_the_user_chose_stays(environ):
    assert not keep_freed_memory(environ)


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory({})


def test_whatever_runs_on_a_cpu_keeps_its_memory(monkeypatch):
    called = []
    monkeypatch.setattr(launch, "keep_freed_memory", lambda: called.append(True))
    launch.make_accelerator(cpu=True)
    assert called == [True]
