"""Two processes over gloo: one run, one checkpoint, one decision to stop."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.assertions import assert_close
from tests.engine.toys import TinyModel, make_trainer
from zigflow.engine import checkpoint

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes(tmp_path):
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.worker", str(tmp_path)],
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n---\n".join(outputs)
    assert len(list(tmp_path.glob("done_*.json"))) == 2

    # The same global batches on one process: the same run within rounding.
    single = make_trainer(tmp_path / "single", steps=6, batch_size=8, model=TinyModel(dropout=0.0))
    single.fit()
    found = checkpoint.open_checkpoint(tmp_path / "straight")
    for name, value in found.tensors("model").items():
        if name != "calls":
            assert_close(name, value, single.model.state_dict()[name])
