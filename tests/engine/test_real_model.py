"""Real models under their processes: trained, cut, resumed, sampled."""

import pytest
import torch

from model_zigma import ZigMa
from tests.engine.toys import PROFILES, Loader, assert_same_bits, make_sampling_run, make_trainer, snapshot
from zigflow.codec import IdentityCodec
from zigflow.engine import checkpoint
from zigflow.engine.run_state import load_weights
from zigflow.models.dis import DiS
from zigflow.processes import Gaussian
from zigflow.processes.flow import Flow
from zigflow.samplers import Guided, OdeSampler, SdeSampler


def zigma(seed, scan_type="zigzagN8", **changes):
    torch.manual_seed(seed)
    return ZigMa(
        in_channels=1, img_dim=4, embed_dim=16, depth=2, patch_size=1, scan_type=scan_type, use_pe=2,
        num_classes=3, class_dropout_prob=0.3, drop_path_rate=0.2, **changes,
    )  # fmt: skip


def dis(seed, **changes):
    torch.manual_seed(seed)
    return DiS(
        in_channels=1, img_dim=4, embed_dim=16, depth=2, patch_size=1, num_classes=3, class_dropout_prob=0.3,
        drop_path_rate=0.2, **changes,
    )  # fmt: skip


MODELS = {"zigma": (zigma, Flow), "dis": (dis, Gaussian)}


@pytest.mark.parametrize("policy", ["none", "block"])
@pytest.mark.parametrize("family", MODELS)
def test_a_model_resumes_to_the_bit(tmp_path, family, policy):
    """Label dropout and drop path draw by sample, so a recomputed or resumed step draws the same."""
    build, process = MODELS[family]
    common = {"process": process(), "checkpoint_policy": policy, "ema": PROFILES}
    straight = make_trainer(tmp_path / "a", steps=5, model=build(0), **common)
    straight.fit()
    make_trainer(tmp_path / "b", steps=2, model=build(0), **common).fit()
    again = make_trainer(tmp_path / "b", steps=5, model=build(1), loader=Loader(4), **common)
    again.fit()
    assert again.data.loader.starts == [2]
    assert_same_bits(snapshot(again), snapshot(straight))


@pytest.mark.parametrize("family", MODELS)
def test_checkpoint_policies_train_alike(tmp_path, family):
    build, process = MODELS[family]
    runs = {}
    for policy in ("none", "block"):
        trainer = make_trainer(
            tmp_path / policy, steps=3, model=build(0), process=process(), checkpoint_policy=policy
        )
        trainer.fit()
        runs[policy] = snapshot(trainer)
    runs["block"]["generator"] = runs["none"]["generator"]
    for name, value in runs["none"].items():
        assert torch.allclose(value.double(), runs["block"][name].double(), atol=1e-5), name


@pytest.mark.parametrize(
    "family, scan", [("zigma", {"scan_type": "randomN4"}), ("dis", {"scan": "random:4"})]
)
def test_random_scans_are_stored_and_must_match(tmp_path, family, scan):
    build, process = MODELS[family]
    make_trainer(tmp_path, steps=1, model=build(0, **scan, scan_seed=1), process=process()).fit()
    found = checkpoint.open_checkpoint(tmp_path)
    assert found.has("paths.safetensors")
    load_weights(build(3, **scan, scan_seed=1), found)
    with pytest.raises(checkpoint.CheckpointError, match="scan order"):
        load_weights(build(3, **scan, scan_seed=2), found)


@pytest.mark.parametrize(
    "sampler",
    [OdeSampler(method="heun", num_steps=4), SdeSampler(method="Euler", num_steps=4)],
    ids=["ODE", "SDE"],
)
@pytest.mark.parametrize("family", MODELS)
def test_sampling_from_a_checkpoint_in_any_split(tmp_path, family, sampler):
    build, process = MODELS[family]
    make_trainer(tmp_path / "run", steps=2, model=build(0), process=process()).fit()
    model = build(5)
    load_weights(model, checkpoint.open_checkpoint(tmp_path / "run"), "official")

    def sample(folder, count):
        return make_sampling_run(
            model=model, process=process(), sampler=sampler, codec=IdentityCodec(), shape=(1, 4, 4), seed=1,
            num_samples=count, batch_size=3, folder=tmp_path / folder, num_classes=3, progress=False,
            guide=lambda m: Guided(m, 2.0),
        ).run()  # fmt: skip

    few, many = sample("few", 2), sample("many", 7)
    assert (few.images == many.images[:2]).all()
    assert few.function_evaluations > 0
