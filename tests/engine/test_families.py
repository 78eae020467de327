"""Every family trained by two processes, with a copy or a part of each parameter, and by one: the same model."""

from itertools import count

import pytest
import torch

from tests.assertions import assert_close
from tests.engine.toys import PROFILES, batch_at, make_trainer
from tests.workers import run_two
from zigflow.engine import checkpoint
from zigflow.models.dim import DiM
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT
from zigflow.processes.flow import Flow


def _family(model, **options):
    def build(seed):
        torch.manual_seed(seed)
        return model(
            in_channels=1, img_dim=4, embed_dim=16, depth=3, patch_size=1, num_classes=3, class_dropout_prob=0.3,
            **options,
        )  # fmt: skip

    return build


FAMILIES = {
    "dim": _family(DiM),
    "dis": _family(DiS, learn_sigma=False, drop_path_rate=0.2),
    "dit": _family(DiT, num_heads=2, drop_sigma=True),
    "uvit": _family(UViT, num_heads=2),
}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    run_two("tests.engine.family_worker", tmp_path)

    def batches(start):
        # A process has 2 samples in each of 2 micro-batches of a step.
        for micro in count(start * 2):
            yield batch_at(range(4 * micro, 4 * micro + 4))

    for family, build in FAMILIES.items():
        single = make_trainer(
            tmp_path / f"{family}_single", steps=2, model=build(0), loader=batches, process=Flow(), ema=PROFILES,
            batch_size=4, grad_accum=2, max_grad_norm=0.05,
        )  # fmt: skip
        single.fit()
        found = checkpoint.open_checkpoint(tmp_path / family / "whole").tensors("model")
        for name, value in found.items():
            assert_close(f"{family} {name}", single.model.state_dict()[name], value)
