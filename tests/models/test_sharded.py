"""Transformers with their parameters in shards (fully_shard, two processes over gloo)."""

import os
import subprocess
import sys

import pytest

from tests.engine.test_two_processes import ROOT, free_port


@pytest.mark.slow
def test_sharded_transformers_equal_whole_ones():
    common = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.models.shard_worker"],
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
