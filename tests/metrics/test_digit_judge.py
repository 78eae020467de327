"""The judge accepts real digits that nobody trained on, and sees through every cheap way to please it."""

import json
import math

import numpy as np
import pytest
import torch

from tests.metrics.conftest import PER_CLASS
from zigflow.metrics.digit_judge import DigitJudge, DigitThresholds, judge
from zigflow.metrics.judge_net import JudgeNet, _AdamW, fit_judge_net

CRITERIA = (
    "classifier_heldout_accuracy",
    "agreement",
    "coverage",
    "nearest_train_distance_ratio",
    "frechet_ratio",
)


def verdict(metric, images, labels):
    metric.reset()
    metric.update(torch.as_tensor(images), torch.as_tensor(labels), torch.arange(len(images)))
    return metric.compute()


def failed(results):
    return {name for name in CRITERIA if not results[f"passed_{name}"]}


def of_each_class(pair, count):
    images, labels = pair
    # In the order of the file the digits go by writer.
    order = np.random.default_rng(0).permutation(len(labels))
    index = np.concatenate([order[labels[order] == c][:count] for c in range(10)])
    return images[index], labels[index]


def test_real_unseen_digits_pass(fresh_judge, digits):
    results = verdict(fresh_judge, *digits["third"])
    assert failed(results) == set()
    assert results["passed"] is True
    assert results["n"] == 10 * PER_CLASS
    assert results["classifier_heldout_accuracy"] >= 0.983
    assert 0.7 < results["frechet_ratio"] < 1.4
    assert 0.93 < results["nearest_train_distance_ratio"] < 1.07
    for label in range(10):
        assert results[f"agreement_class_{label}"] > 0.9
    assert all(math.isfinite(value) for value in results.values())
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_ten_memorized_prototypes_fail(fresh_judge, digits):
    images, labels = of_each_class(digits["train"], 1)
    results = verdict(fresh_judge, images.repeat(PER_CLASS, 0), labels.repeat(PER_CLASS))
    assert results["agreement"] >= 0.9
    assert {"coverage", "nearest_train_distance_ratio", "frechet_ratio"} <= failed(results)
    assert not results["passed"]


def test_ten_prototypes_with_jitter_fail_by_coverage(fresh_judge, digits):
    images, labels = of_each_class(digits["train"], 1)
    noise = np.random.default_rng(0).normal(0, 35, (10 * PER_CLASS, 1, 8, 8))
    images = np.clip(images.repeat(PER_CLASS, 0) + noise, 0, 255).astype(np.uint8)
    assert {"coverage", "frechet_ratio"} <= failed(verdict(fresh_judge, images, labels.repeat(PER_CLASS)))


def test_class_means_fail(fresh_judge, digits):
    images, labels = digits["train"]
    means = np.stack([images[labels == c].mean(0) for c in range(10)]).astype(np.uint8)
    results = verdict(fresh_judge, means.repeat(PER_CLASS, 0), np.arange(10).repeat(PER_CLASS))
    assert {"coverage", "frechet_ratio"} <= failed(results)


def test_noise_fails(fresh_judge):
    images = np.random.default_rng(0).integers(0, 256, (10 * PER_CLASS, 1, 8, 8)).astype(np.uint8)
    results = verdict(fresh_judge, images, np.arange(10).repeat(PER_CLASS))
    assert results["agreement"] < 0.3
    assert {"agreement", "coverage", "frechet_ratio"} <= failed(results)


def test_copies_of_training_images_fail(fresh_judge, digits):
    results = verdict(fresh_judge, *of_each_class(digits["train"], PER_CLASS))
    assert results["nearest_train_distance_samples"] == 0.0
    assert failed(results) == {"nearest_train_distance_ratio"}


def test_what_copies_drawn_with_replacement_get_is_told_beside(fresh_judge, digits):
    """The distance to the held-out half is at its floor for training images drawn once, above it for repeated ones."""
    results = verdict(fresh_judge, *digits["third"])
    assert 1.05 < results["frechet_copies_ratio"] < 1.6
    # The same draws, handed in as samples.
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    indices = fresh_judge._copies(0, labels.bincount().tolist())
    copied = verdict(fresh_judge, digits["train"][0][indices.numpy()], labels)
    assert len(indices.unique()) < len(indices)
    assert copied["agreement"] > 0.99 and copied["nearest_train_distance_samples"] == 0.0
    assert copied["frechet_ratio"] == pytest.approx(results["frechet_copies_ratio"], rel=0.35)


def test_half_copies_and_faint_noise_on_copies_fail(fresh_judge, digits):
    copies, labels = of_each_class(digits["train"], PER_CLASS)
    fresh, _ = digits["third"]
    mixed = np.where((np.arange(len(copies)) % 2 == 0)[:, None, None, None], copies, fresh)
    assert "nearest_train_distance_ratio" in failed(verdict(fresh_judge, mixed, labels))
    noisy = np.clip(copies + np.random.default_rng(0).normal(0, 12, copies.shape), 0, 255).astype(np.uint8)
    assert "nearest_train_distance_ratio" in failed(verdict(fresh_judge, noisy, labels))


def test_shuffled_labels_fail_by_agreement_alone(fresh_judge, digits):
    images, labels = digits["third"]
    results = verdict(fresh_judge, images, np.random.default_rng(0).permutation(labels))
    assert results["agreement"] < 0.3
    assert failed(results) == {"agreement"}


def test_result_does_not_depend_on_batches_order_or_merging(fresh_judge, digits):
    images, labels = map(torch.from_numpy, digits["third"])
    want = verdict(fresh_judge, images, labels)
    ids_sha256 = fresh_judge.protocol()["ids_sha256"]

    fresh_judge.reset()
    for part in torch.randperm(len(images)).split(37):
        fresh_judge.update(images[part], labels[part], part)
    assert fresh_judge.compute() == want
    assert fresh_judge.protocol()["ids_sha256"] == ids_sha256

    fresh_judge.reset()
    other = DigitJudge()
    other.set_reference(digits["train"], digits["heldout"])
    ids = torch.arange(len(images))
    fresh_judge.update(images[::2], labels[::2], ids[::2])
    other.update(images[1::2], labels[1::2], ids[1::2])
    fresh_judge.merge(other)
    assert fresh_judge.compute() == want
    with pytest.raises(ValueError, match="sample id 1 .*given twice"):
        fresh_judge.merge(other)


def test_thresholds_are_arguments_and_part_of_the_protocol(fresh_judge):
    metric = DigitJudge(thresholds={"coverage": 0.5})
    assert metric.protocol()["thresholds"]["coverage"] == 0.5
    assert metric.protocol()["thresholds"]["frechet_ratio"] == 1.5
    with pytest.raises(ValueError, match=r"digit judge threshold 'covrage'.*coverage"):
        DigitJudge(thresholds={"covrage": 0.5})
    with pytest.raises(ValueError, match="finite number"):
        DigitJudge(thresholds={"coverage": float("nan")})
    protocol = fresh_judge.protocol()
    assert json.loads(json.dumps(protocol, allow_nan=False)) == protocol
    assert protocol["train_n"] == 899


@pytest.mark.parametrize("name", CRITERIA)
def test_every_threshold_decides(name):
    bounds = DigitThresholds()
    good = {key: getattr(bounds, key) for key in CRITERIA}
    assert all(bounds.verdicts(good).values())
    worse = good | {name: good[name] + (1e-6 if name == "frechet_ratio" else -1e-6)}
    assert [key for key, passed in bounds.verdicts(worse).items() if not passed] == [name]


def test_fit_is_keyed_and_leaves_the_callers_state_alone(digits):
    images, labels = (torch.from_numpy(part[:128]) for part in digits["train"])
    before = torch.get_rng_state()
    one = fit_judge_net(images, labels, seed=3, steps=6, batch=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_num_threads(2)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            two = fit_judge_net(images, labels, seed=3, steps=6, batch=32)
            features = two.features(images)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert features.dtype == torch.float32
    assert not torch.equal(*(m.conv1.weight for m in one.members))
    other = fit_judge_net(images, labels, seed=4, steps=6, batch=32)
    assert not torch.equal(other.members[0].conv1.weight, one.members[0].conv1.weight)


def test_the_net_is_small():
    assert sum(p.numel() for p in JudgeNet((1, 8, 8), 10).parameters()) == 46_292
    JudgeNet((3, 5, 7), 2)
    with pytest.raises(ValueError, match="too small"):
        JudgeNet((1, 1, 8), 10)


def test_bad_samples_are_refused(fresh_judge, digits):
    images, labels = map(torch.from_numpy, digits["third"])
    ids = torch.arange(len(images))
    with pytest.raises(RuntimeError, match="no sample"):
        fresh_judge.compute()
    with pytest.raises(ValueError, match="uint8"):
        fresh_judge.update(images.float() / 255, labels, ids)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        fresh_judge.update(images[:, 0], labels, ids)
    with pytest.raises(ValueError, match="training images"):
        fresh_judge.update(images[..., :7], labels, ids)
    with pytest.raises(ValueError, match="one per image"):
        fresh_judge.update(images, labels[:-1], ids)
    with pytest.raises(ValueError, match="integers"):
        fresh_judge.update(images, labels.float(), ids)
    with pytest.raises(ValueError, match="need labels"):
        fresh_judge.update(images, None, ids)
    with pytest.raises(ValueError, match=r"label 11 .*0\.\.9"):
        fresh_judge.update(images, labels + 2, ids)
    with pytest.raises(ValueError, match="sample id 0 .*twice"):
        fresh_judge.update(images, labels, torch.zeros_like(ids))
    assert fresh_judge.count == 0
    fresh_judge.update(images[:4], labels[:4], ids[:4])
    with pytest.raises(ValueError, match="too few for k = 5"):
        fresh_judge.compute()


def test_more_samples_than_real_images_are_refused(fresh_judge, digits):
    images, labels = (np.concatenate([part] * 2) for part in digits["third"])
    fresh_judge.update(torch.from_numpy(images), torch.from_numpy(labels), torch.arange(len(images)))
    with pytest.raises(ValueError, match="80 samples of class 0 need as many heldout images"):
        fresh_judge.compute()


def test_bad_references_are_refused(digits):
    train, heldout = digits["train"], digits["heldout"]
    metric = DigitJudge()
    with pytest.raises(RuntimeError, match="set_reference"):
        metric.update(*map(torch.from_numpy, heldout), torch.arange(len(heldout[0])))
    with pytest.raises(ValueError, match="held-out images are needed"):
        metric.set_reference(train)
    with pytest.raises(ValueError, match="without labels"):
        metric.set_reference(train, (heldout[0], None))
    with pytest.raises(ValueError, match="also a training image"):
        metric.set_reference(train, train)
    with pytest.raises(ValueError, match="every class"):
        metric.set_reference(train, tuple(part[heldout[1] < 9] for part in heldout))
    with pytest.raises(ValueError, match="uint8"):
        metric.set_reference((train[0].astype(np.float32), train[1]), heldout)
    with pytest.raises(ValueError, match="k must be at least 1"):
        DigitJudge(k=0)
    with pytest.raises(ValueError, match="label 10"):
        judge(heldout[0], heldout[1] + 1, train, heldout)


def test_the_optimizer_is_adam_with_decoupled_decay():
    p, want = torch.nn.Parameter(torch.tensor([2.0, -3.0])), np.array([2.0, -3.0])
    optimizer = _AdamW([p])
    mean = square = np.zeros(2)
    for t, rate in enumerate((0.1, 0.2, 0.05), start=1):
        optimizer.step((p**3).sum(), rate)
        gradient = 3 * want**2
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        step = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        want = want - rate * 1e-2 * want - rate * step
        assert p.detach().numpy() == pytest.approx(want, rel=1e-5)
