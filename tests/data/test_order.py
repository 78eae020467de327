"""The sample order as a function of the global position."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zigflow.data.order import DataOrder, shards_that_mix

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(lambda values: sum(values) > 0)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 99), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_each_sample_once_per_epoch(shard_sizes, seed, block, at_once, shuffle, epoch):
    order = DataOrder(shard_sizes, seed, shuffle=shuffle, block_size=block, shards_at_once=at_once)
    n = order.num_samples
    indices = order.indices(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(indices), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 99), st.integers(1, 5), st.integers(1, 4), st.data())
def test_random_access_equals_walking(shard_sizes, seed, block, at_once, data):
    order = DataOrder(shard_sizes, seed, block_size=block, shards_at_once=at_once)
    walk = order.indices(range(3 * order.num_samples))
    positions = data.draw(st.lists(st.integers(0, 3 * order.num_samples - 1), max_size=30))
    fresh = DataOrder(shard_sizes, seed, block_size=block, shards_at_once=at_once)
    assert np.array_equal(fresh.indices(np.asarray(positions, dtype=np.int64)), walk[positions])
    for g in positions[:5]:
        epoch, shard, member = fresh.locate(g)
        assert epoch == g // order.num_samples
        assert 0 <= member < shard_sizes[shard]
        assert sum(shard_sizes[:shard]) + member == walk[g] == fresh.index(g)


def test_blocks_stay_together_and_shards_of_a_window_too():
    order = DataOrder([6, 5, 7, 6, 4, 6], 1, block_size=3, shards_at_once=2)
    places = [order.locate(g) for g in range(order.num_samples)]
    at = 0
    while at < len(places):
        _, shard, member = places[at]
        assert member % 3 == 0
        length = min(3, int(order.sizes[shard]) - member)
        assert [(p.shard, p.member) for p in places[at : at + length]] == [
            (shard, member + i) for i in range(length)
        ]
        at += length
    windows = []
    for place in places:
        if not windows or (place.shard not in windows[-1] and len(windows[-1]) == 2):
            windows.append(set())
        windows[-1].add(place.shard)
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))


def test_shuffling_mixes_and_differs_by_seed_and_epoch():
    order = DataOrder([500, 500], 0)
    first, second = order.indices(range(1000)), order.indices(range(1000, 2000))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, DataOrder([500, 500], 1).indices(range(1000)))
    for walk in (first, second):
        assert abs(np.corrcoef(walk, np.arange(1000))[0, 1]) < 0.16
        assert 400 < (walk[:500] < 500).sum() * 2 < 600
    plain = DataOrder([500, 500], 0, shuffle=False)
    assert np.array_equal(plain.indices(range(1500)), np.arange(1500) % 1000)


def test_stored_order():
    """A change of these values would silently change the data of every resumed run."""
    order = DataOrder([3, 4, 2], 42, shards_at_once=2)
    assert order.indices(range(18)).tolist() == [4, 5, 6, 3, 2, 0, 1, 8, 7, 7, 8, 5, 6, 4, 3, 0, 2, 1]


def distinct(labels, window):
    """Mean number of classes in windows of that many consecutive samples."""
    starts = range(0, len(labels) - window + 1, window)
    return np.mean([len(set(labels[start : start + window])) for start in starts])


def test_a_sorted_set_of_imagenets_size_is_mixed():
    """1,281 shards of 1,000 images, class after class: the statistics of the order alone, no pixels."""
    images, classes, window = 1_281_000, 1000, 5000
    order = DataOrder([1000] * 1281, 0)
    labels = order.indices(np.arange(50_000)) * classes // images
    drawn = np.random.default_rng(0).integers(0, classes, 50_000)
    assert len(set(labels)) == classes
    assert distinct(labels, window) > 0.99 * distinct(drawn, window)
    assert distinct(labels, 256) > 0.98 * distinct(drawn, 256)
    # What 0.1 did, by name: a run that began so continues so.
    former = DataOrder([1000] * 1281, 0, shards_at_once=64).indices(np.arange(50_000)) * classes // images
    assert len(set(former)) < 130


def test_how_many_shards_mix_by_default():
    for sizes_of, wanted in (
        ([5], 1),
        ([1000] * 1281, 1281),
        ([1 << 22], 1),
        ([10_000] * 100_000, 419),
        ([1 << 21] * 3, 3),
        ([1 << 21] * 300, 64),
    ):
        assert DataOrder(sizes_of, 0).shards_at_once == shards_that_mix(sizes_of) == wanted
    few = [7, 3, 9, 4]
    whole, former = DataOrder(few, 3), DataOrder(few, 3, shards_at_once=64)
    assert np.array_equal(whole.indices(range(60)), former.indices(range(60)))


def test_huge_sets_cost_a_window():
    order = DataOrder([10_000] * 100_000, 0, shards_at_once=4)
    g = 123 * order.num_samples + 987_654_321
    epoch, shard, member = order.locate(g)
    assert (epoch, 0 <= shard < 100_000, 0 <= member < 10_000) == (123, True, True)
    assert sum(window.size for window in order._windows.values()) <= 4 * 40_000


def test_the_identity_tells_orders_apart():
    order = DataOrder([30, 12], 5).identity()
    assert DataOrder([30, 12], 5).identity() == order
    for other in (
        DataOrder([30, 12], 6),
        DataOrder([12, 30], 5),
        DataOrder([30, 13], 5),
        DataOrder([30, 12], 5, block_size=2),
        DataOrder([30, 12], 5, shuffle=False),
    ):
        assert other.identity() != order


def test_pickle_drops_the_caches():
    order = DataOrder([300, 120], 5)
    walk = order.indices(range(420))
    copy = pickle.loads(pickle.dumps(order))
    assert not copy._windows
    assert np.array_equal(copy.indices(range(420)), walk)


@pytest.mark.parametrize(
    "shard_sizes, options",
    [([], {}), ([0], {}), ([3, -1], {}), ([3], {"block_size": 0}), ([3], {"shards_at_once": 0})],
)
def test_refusals(shard_sizes, options):
    with pytest.raises(ValueError, match="at least 1"):
        DataOrder(shard_sizes, 0, **options)


def test_negative_positions():
    with pytest.raises(ValueError, match="negative"):
        DataOrder([3], 0).index(-1)
