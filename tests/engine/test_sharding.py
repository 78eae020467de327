"""Parameters in shards (fully_shard, two processes over gloo): the same run, the same checkpoint, the same samples."""

import pytest
import torch

from tests.engine.shard_worker import samples
from tests.engine.test_real_model import zigma
from tests.workers import run_two
from zigflow.engine import checkpoint
from zigflow.engine.run_state import load_weights


@pytest.mark.slow
def test_sharded_parameters_train_resume_and_sample(tmp_path):
    run_two("tests.engine.shard_worker", tmp_path)

    whole = zigma(11)
    load_weights(whole, checkpoint.open_checkpoint(tmp_path / "straight"), "official")
    want = samples(whole)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"samples_{rank}.pt", weights_only=True), want)
