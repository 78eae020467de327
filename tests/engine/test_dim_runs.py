"""DiM trained: cut and resumed, under each checkpoint policy, sampled in any split."""

import pytest
import torch

from tests.engine.toys import PROFILES, Loader, assert_same_bits, make_sampling_run, make_trainer, snapshot
from zigflow.codec import IdentityCodec
from zigflow.engine import checkpoint
from zigflow.engine.run_state import load_weights
from zigflow.models.dim import DiM
from zigflow.processes import StableDiffusion
from zigflow.processes.flow import Flow
from zigflow.samplers import DpmSolver, Guided


def dim(seed, **changes):
    torch.manual_seed(seed)
    return DiM(
        in_channels=1, img_dim=4, embed_dim=16, depth=3, patch_size=1, num_classes=3, class_dropout_prob=0.3,
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "block", "selective"])
def test_a_cut_run_resumes_to_the_bit(tmp_path, policy):
    common = {"process": StableDiffusion(), "checkpoint_policy": policy, "ema": PROFILES}
    straight = make_trainer(tmp_path / "a", steps=4, model=dim(0), **common)
    straight.fit()
    make_trainer(tmp_path / "b", steps=2, model=dim(0), **common).fit()
    again = make_trainer(tmp_path / "b", steps=4, model=dim(1), loader=Loader(4), **common)
    again.fit()
    assert again.data.loader.starts == [2]
    assert_same_bits(snapshot(again), snapshot(straight))


def test_random_scans_are_stored_and_must_match(tmp_path):
    random = {"scan": "random"}
    make_trainer(tmp_path, steps=1, model=dim(0, **random, scan_seed=1), process=Flow()).fit()
    found = checkpoint.open_checkpoint(tmp_path)
    load_weights(dim(3, **random, scan_seed=1), found)
    with pytest.raises(checkpoint.CheckpointError, match="scan order"):
        load_weights(dim(3, **random, scan_seed=2), found)


def test_sampling_from_a_checkpoint_in_any_split(tmp_path):
    process = StableDiffusion()
    make_trainer(tmp_path / "run", steps=2, model=dim(0), process=process).fit()
    model = dim(5)
    load_weights(model, checkpoint.open_checkpoint(tmp_path / "run"), "official")

    def sample(folder, number):
        return make_sampling_run(
            model=model, process=process, sampler=DpmSolver("dpm_solver++", "fast", 4, 3, "time_uniform"),
            codec=IdentityCodec(), shape=(1, 4, 4), seed=1, num_samples=number, batch_size=3,
            folder=tmp_path / folder, num_classes=3, progress=False,
            guide=lambda m: Guided(m, 1.4, process=process),
        ).run()  # fmt: skip

    few, many = sample("few", 2), sample("many", 7)
    assert (few.images == many.images[:2]).all()
