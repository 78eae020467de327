"""The digits: split, values, and preparation that several processes may start at once."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zigflow.data.split import stratified_split
from zigflow.datasets.digits import DigitsSource, load_digits, write_digits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "deep" / "digits"
    DigitsSource(root)
    return root


def test_the_halves(root):
    train, heldout = DigitsSource(root), DigitsSource(root, "heldout")
    assert (len(train), len(heldout)) == (899, 898)
    assert train.image_shape == heldout.image_shape == (1, 8, 8)
    assert train.num_classes == 10
    images, labels = load_digits()
    seen = {}
    for source in (train, heldout):
        counts = np.zeros(10, dtype=int)
        for index in range(len(source)):
            sample = source[index]
            seen[sample["key"]] = sample
            counts[sample["labels"]] += 1
        assert np.abs(counts - np.bincount(labels) / 2).max() <= 0.5
    assert len(seen) == 1797
    for index in (0, 1, 700, 1796):
        sample = seen[f"digit-{index:04d}"]
        assert sample["labels"] == labels[index]
        assert torch.equal(
            ((sample["pixels"][0] + 1) * 127.5).round(), torch.from_numpy(images[index]).float()
        )


def test_values_fill_eight_bits():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max(), len(np.unique(images))) == (0, 255, 17)
    assert sorted(np.unique(labels)) == list(range(10))


def test_a_second_use_writes_nothing(root, monkeypatch):
    import zigflow.datasets.digits as module

    monkeypatch.setattr(module, "write_digits", lambda *_: pytest.fail("written again"))
    assert (
        DigitsSource(root).fingerprint
        == DigitsSource(root).fingerprint
        != DigitsSource(root, "heldout").fingerprint
    )
    assert DigitsSource(root, image_size=16, enlarge=True).image_shape == (1, 16, 16)
    with pytest.raises(ValueError, match=r"'tran'.*Did you mean 'train'"):
        DigitsSource(root, "tran")


def test_the_stored_split(root):
    """The bytes and the split are part of every published number: they must not move."""
    assert DigitsSource(root).fingerprint == "ebb8565e2b287caf557766ed1505a2f0"
    assert DigitsSource(root, "heldout").fingerprint == "36f1322384289cbcbe8f0a74fa9914e8"


def _start(barrier, root, queue):
    barrier.wait()
    try:
        queue.put(DigitsSource(root).fingerprint)
    except BaseException as error:
        queue.put(repr(error))


def test_two_processes_at_once(root, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_start, args=(barrier, tmp_path / "digits", queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert results == [DigitsSource(root).fingerprint] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_something_else_at_the_place_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="move it away"):
        DigitsSource(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="empty"):
        write_digits(tmp_path / "x", 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 1), st.integers(0, 9))
def test_stratified_splits(labels, fraction, seed):
    labels = np.asarray(labels, dtype=np.int64)
    first, second = stratified_split(labels, fraction, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert abs(len(first) - len(labels) * fraction) <= 0.5 + 1e-9
    for label in np.unique(labels):
        count = (labels == label).sum()
        assert abs((labels[first] == label).sum() - count * fraction) < 1


def test_a_split_is_keyed():
    labels = np.arange(200) % 3
    one = stratified_split(labels, 0.5, 1)[0]
    assert np.array_equal(one, stratified_split(labels, 0.5, 1)[0])
    assert not np.array_equal(one, stratified_split(labels, 0.5, 2)[0])
    with pytest.raises(ValueError, match="fraction"):
        stratified_split(labels, 1.5)
