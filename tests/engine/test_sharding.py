"""Parameters in shards (fully_shard, two processes over gloo): the same run, the same checkpoint, the same samples."""

import os
import subprocess
import sys

import pytest
import torch

from tests.engine.shard_worker import samples
from tests.engine.test_real_model import zigma
from tests.engine.test_two_processes import ROOT, free_port
from zigflow.engine import checkpoint
from zigflow.engine.run_state import load_weights


@pytest.mark.slow
def test_sharded_parameters_train_resume_and_sample(tmp_path):
    # No ACCELERATE_USE_CPU: without a GPU the processes must join by themselves.
    common = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.shard_worker", str(tmp_path)],
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

    whole = zigma(11)
    load_weights(whole, checkpoint.open_checkpoint(tmp_path / "straight"), "official")
    want = samples(whole)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"samples_{rank}.pt", weights_only=True), want)
