"""Two real processes that run a module of the tests and join over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(module, *arguments, cpu=False):
    """Run ``python -m module`` as ranks 0 and 1 of one run; both must succeed.

    ``cpu`` tells accelerate so; without it, and without a GPU, the processes must join by themselves.
    """
    common = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": "true"} if cpu else {"CUDA_VISIBLE_DEVICES": ""}),
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n---\n".join(outputs)
