"""A checkpoint that this format's first release wrote: it verifies, loads and goes on, in every later version."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.golden.make_checkpoint_v1 import STEPS, golden_model, golden_trainer
from zigflow.engine import checkpoint
from zigflow.engine.run_state import load_weights
from zigflow.engine.sampling_run import weights_hash

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_v1"
WANTED = json.loads((GOLDEN / "expected.json").read_text())


def test_it_verifies_and_is_small():
    found = checkpoint.open_checkpoint(GOLDEN)
    assert found.step == STEPS
    assert json.loads((found.path / "SEAL.json").read_text())["format_version"] == 1
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*")) < 200_000


@pytest.mark.parametrize("weights", ["model", "short"])
def test_its_weights_are_those_that_were_written(weights):
    model = golden_model(7)
    load_weights(model, checkpoint.open_checkpoint(GOLDEN), weights)
    assert weights_hash(model) == WANTED[weights]


def test_its_run_goes_on(tmp_path):
    shutil.copytree(GOLDEN / "step-0000003", tmp_path / "checkpoints" / "step-0000003")
    seen = []
    trainer = golden_trainer(
        tmp_path, STEPS + 2, 9, hooks=[lambda t, r: seen.append((r.step, r.images_seen, r.loss, r.grad_norm))]
    )
    counters = trainer.fit()
    assert (counters.step, counters.images_seen, counters.skipped) == (5, 20, 0)
    assert [row[:2] for row in seen] == [(4, 16), (5, 20)]
    # Other machines and versions of torch round otherwise.
    for (_, _, loss, norm), (want, want_norm) in zip(
        seen, WANTED["next loss and gradient norm"], strict=True
    ):
        assert loss == pytest.approx(want, rel=1e-4)
        assert norm == pytest.approx(want_norm, rel=1e-3)
    generator = checkpoint.open_checkpoint(GOLDEN).tensors("rank_0000")["cpu"]
    assert generator.dtype == torch.uint8
