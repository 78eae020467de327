"""Real digits in three parts (training half, held-out quarter, a quarter that plays samples), one fitted judge."""

import numpy as np
import pytest
import torch

from zigflow.data.split import stratified_split
from zigflow.metrics.digit_judge import DigitJudge

PER_CLASS = 40


@pytest.fixture(scope="session")
def digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.floor(bunch.images * 255 / 16 + 0.5).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    train, rest = stratified_split(labels, 0.5, seed=1)
    first, second = stratified_split(labels[rest], 0.5, seed=2)
    heldout, third = rest[first], rest[second]
    # Shuffled first: in the order of the file the digits go by writer.
    third = np.random.default_rng(0).permutation(third)
    third = np.concatenate([third[labels[third] == c][:PER_CLASS] for c in range(10)])
    return {
        name: (images[i], labels[i]) for name, i in (("train", train), ("heldout", heldout), ("third", third))
    }


@pytest.fixture(scope="session")
def fitted_judge(digits):
    torch.set_num_threads(1)
    # Fewer steps than a real verdict takes: enough for 98.3 %.
    metric = DigitJudge(num_subsets=6, fit_steps=450)
    metric.set_reference(digits["train"], digits["heldout"])
    assert metric.net is not None
    return metric


@pytest.fixture
def fresh_judge(fitted_judge):
    """The session's judge, its samples dropped before and after."""
    fitted_judge.reset()
    yield fitted_judge
    fitted_judge.reset()
