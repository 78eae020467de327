"""Commands of the documentation, as a test can afford them."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a launcher sets; a test's own launcher must not see another's. Nor may the CPU be forced: it is found.
LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RUN_ID", "ACCELERATE_USE_CPU")
ENV = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def words(command):
    """A command line as a process can be started with it: this Python, files of this checkout."""
    command = re.sub(r"config/accelerate/\w+\.yaml", lambda m: str(ROOT / m[0]), command)
    first, *rest = shlex.split(command)
    programs = {
        "python": [sys.executable],
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    rest = rest[1:] if first == "accelerate" else rest
    return programs[first] + [str(ROOT / w) if w in ("train_acc.py", "sample_acc.py") else w for w in rest]


def start(command, folder, **environ):
    return subprocess.Popen(
        words(command),
        cwd=folder,
        env={**ENV, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, expected=0):
    """What the process printed."""
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == expected, output[-4000:]
    return output


def run(command, folder, expected=0, **environ):
    return finish(start(command, folder, **environ), expected)
