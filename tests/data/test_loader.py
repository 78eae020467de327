"""What the loaders deliver, for every number of workers, processes and starting points."""

import pytest
import torch

from zigflow.data.batch import Batch, collate
from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import PositionDataset, evaluation_loader, training_loader
from zigflow.data.order import DataOrder
from zigflow.datasets.shards import example as shards_example
from zigflow.datasets.synthetic import ShapesSource

SOURCE = ShapesSource(20, 6, tokens=(2, 3))
ORDER = DataOrder(SOURCE.shard_sizes, 3)


def flat(batches):
    """Position -> (key, bytes of the pixels), and the positions in their order."""
    out, ids = {}, []
    for batch in batches:
        ids += batch.ids.tolist()
        for row, g in enumerate(batch.ids.tolist()):
            out[g] = (batch.keys[row], batch.pixels[row].numpy().tobytes(), int(batch.labels[row]))
    return out, ids


def test_batches_hold_what_the_order_says():
    batches = list(training_loader(SOURCE, ORDER, GlobalBatch(8), stop_step=5))
    content, ids = flat(batches)
    assert ids == list(range(40))
    for g, (key, pixels, label) in content.items():
        sample = SOURCE[ORDER.index(g)]
        assert (key, label) == (sample["key"], sample["labels"])
        assert pixels == sample["pixels"].numpy().tobytes()
    first = batches[0]
    assert isinstance(first, Batch)
    assert (first.size, first.pixels.shape, first.tokens.shape) == (8, (8, 3, 6, 6), (8, 2, 3))
    assert first.pixels.dtype == torch.float32
    assert first.labels.dtype == first.ids.dtype == torch.int64
    assert first.latents is None
    assert first.captions[0] == SOURCE[ORDER.index(0)]["captions"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, tmp_path):
    source = shards_example(tmp_path)
    order = DataOrder(source.shard_sizes, 3)

    def batches(n):
        return list(training_loader(source, order, GlobalBatch(4), stop_step=4, num_workers=n))

    here, there = batches(0), batches(workers)
    assert [batch.keys for batch in here] == [batch.keys for batch in there]
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.latents, b.latents) for a, b in zip(here, there))


@pytest.mark.parametrize("world, accum", [(1, 1), (1, 4), (2, 1), (2, 3), (4, 1), (4, 3)])
def test_processes_change_nothing(world, accum):
    want, _ = flat(training_loader(SOURCE, ORDER, GlobalBatch(12), stop_step=4))
    got = {}
    for rank in range(world):
        part, ids = flat(training_loader(SOURCE, ORDER, GlobalBatch(12, world, rank, accum), stop_step=4))
        assert len(ids) == len(part) == 48 // world
        assert not set(part) & set(got)
        got |= part
    assert got == want


@pytest.mark.parametrize("start", [0, 1, 3, 5, 6])
def test_resuming_is_the_tail(start):
    whole, ids = flat(training_loader(SOURCE, ORDER, GlobalBatch(7), stop_step=6))
    tail, tail_ids = flat(training_loader(SOURCE, ORDER, GlobalBatch(7), start_step=start, stop_step=6))
    assert tail_ids == ids[start * 7 :]
    assert all(tail[g] == whole[g] for g in tail_ids)


def test_a_late_start_reads_only_its_own_samples():
    class Counting(ShapesSource):
        reads = 0

        def __getitem__(self, index):
            type(self).reads += 1
            return super().__getitem__(index)

    source = Counting(20, 6)
    order = DataOrder(source.shard_sizes, 3)
    batch = next(iter(training_loader(source, order, GlobalBatch(4), start_step=10**12)))
    assert batch.ids.tolist() == [4 * 10**12 + i for i in range(4)]
    assert Counting.reads == 4


def test_loading_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    next(iter(training_loader(SOURCE, ORDER, GlobalBatch(4))))
    list(evaluation_loader(SOURCE, 8))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [None, 1, 13])
def test_evaluation_counts_each_sample_once(world, count):
    ids, sizes = [], []
    for rank in range(world):
        loader = evaluation_loader(SOURCE, 4, rank=rank, world_size=world, num_samples=count)
        batches = list(loader)
        assert len(batches) == len(loader)
        ids += [g for batch in batches for g in batch.ids.tolist()]
        sizes += [batch.size for batch in batches]
    assert sorted(ids) == list(range(count or 20))
    assert max(sizes) <= 4


def test_evaluation_is_in_the_order_of_the_source():
    keys = [key for batch in evaluation_loader(SOURCE, 6) for key in batch.keys]
    assert keys == [SOURCE[i]["key"] for i in range(20)]
    with pytest.raises(ValueError, match="21 samples were asked for, the source has 20"):
        evaluation_loader(SOURCE, 6, num_samples=21)


class Broken(ShapesSource):
    def __getitem__(self, index):
        if index == 3:
            from zigflow.data.tar import ShardError

            raise ShardError("damaged", "s.tar", 512, "k")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_reaches_the_caller_with_its_place(workers):
    from zigflow.data.tar import ShardError

    loader = evaluation_loader(Broken(6, 4), 2, num_workers=workers)
    with pytest.raises(ShardError, match=r"shard s\.tar, offset 512, key 'k': damaged"):
        list(loader)


def test_an_order_over_another_source_is_refused():
    with pytest.raises(ValueError, match="over 19 samples, the source has 20"):
        PositionDataset(SOURCE, DataOrder([19], 0))
    with pytest.raises(ValueError, match="num_workers"):
        training_loader(SOURCE, ORDER, GlobalBatch(4), num_workers=-1)


def test_collate_names_samples_that_differ():
    one = {"key": "a", "pixels": torch.zeros(1, 2, 2), "id": 0}
    with pytest.raises(ValueError, match=r"'a' and 'b' differ in shape: \(1, 2, 2\) and \(1, 2, 3\)"):
        collate([one, {"key": "b", "pixels": torch.zeros(1, 2, 3), "id": 1}])
    with pytest.raises(ValueError, match="'a' and 'b' have different fields"):
        collate([one, {**one, "key": "b", "labels": 3}])
    with pytest.raises(ValueError, match="unknown fields"):
        collate([{**one, "image": 1}])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_batches_move():
    batch = collate([{**SOURCE[i], "id": i} for i in range(3)])
    moved = batch.to("meta")
    assert moved.pixels.device.type == moved.ids.device.type == moved.labels.device.type == "meta"
    assert moved.latents is None
    assert moved.keys == batch.keys
