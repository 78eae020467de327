"""Captions picked where they are read, counted skips, dead workers, and folders indexed by many at once."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.hostile import END, good, sample
from zigflow.data.batch import condition
from zigflow.data.fields import OFFICIAL_KEYS, normal_rename
from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import pick_caption, training_loader
from zigflow.data.order import DataOrder
from zigflow.data.skipped import SkippedSamples
from zigflow.data.tar import BudgetError, ShardError
from zigflow.data.writer import ShardWriter, encode_npy, encode_png
from zigflow.datasets.shards import ShardSource
from zigflow.datasets.synthetic import ShapesSource
from zigflow.keyed import KeyedDraws


def text_shards(folder, counts):
    """Latents with ``counts[i]`` captions; feature n of sample i is 100 i + n."""
    with ShardWriter(folder, samples_per_shard=3) as writer:
        for index, count in enumerate(counts):
            numbers = 100.0 * index + np.arange(count)
            members = {
                "image.jpg": encode_png(np.zeros((8, 8, 3), np.uint8)),
                "img_feature256.npy": encode_npy(np.full((4, 2, 2), index, np.float32)),
                "caption.json": json.dumps([f"{index}/{n}" for n in range(count)]).encode(),
                "caption_clip_feature.npy": encode_npy(
                    np.broadcast_to(numbers[:, None, None], (count, 5, 3))
                ),
            }
            writer.add(f"{index:03d}", members)
    return folder


ZIGMA = {
    "image": "image.jpg",
    "caption": "caption.json",
    "caption_feature": "caption_clip_feature.npy",
    "img_feature": "img_feature256.npy",
}


def test_zigmas_renaming_reads_zigmas_layout(tmp_path):
    source = ShardSource(text_shards(tmp_path, [2, 3]), ZIGMA)
    found = source[1]
    assert set(found) == {"key", "pixels", "latents", "tokens", "captions"}
    assert found["tokens"].shape == (3, 5, 3)
    assert found["captions"] == ("1/0", "1/1", "1/2")
    turned = ShardSource(tmp_path, {suffix: key for key, suffix in ZIGMA.items()})
    fields = {"pixels": "image.jpg", "captions": "caption.json", "tokens": "caption_clip_feature.npy",
              "latents": "img_feature256.npy"}  # fmt: skip
    ours = ShardSource(tmp_path, {suffix: field for field, suffix in fields.items()})
    assert source.fingerprint == turned.fingerprint == ours.fingerprint
    only = ShardSource(tmp_path, ZIGMA, fields=["latents", "tokens"])
    assert only.image_shape == (4, 2, 2)


def test_videos_with_classes_in_zigmas_layout(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for index in range(3):
            latent = encode_npy(np.full((16, 4, 32, 32), index, np.float16))
            members = {"frame_feature256.npy": latent, "cls_id.cls": b"7", "cls_name.json": b'"Archery"'}
            writer.add(str(index), members)
    rename = {"frame_feature256": "frame_feature256.npy", "cls_id": "cls_id.cls", "cls_name": "cls_name.json"}
    source = ShardSource(tmp_path, rename, num_classes=101)
    assert (source.image_shape, source.num_classes) == ((16, 4, 32, 32), 101)
    assert (source[2]["labels"], source[2]["captions"]) == (7, ("Archery",))


@given(
    st.dictionaries(st.sampled_from(sorted(OFFICIAL_KEYS)), st.from_regex(r"[a-z]{1,6}\.npy", fullmatch=True))
)
def test_renaming_means_the_same_either_way_round(rename):
    want = {suffix: OFFICIAL_KEYS[key] for key, suffix in rename.items()}
    assert normal_rename(rename) == want
    assert normal_rename({suffix: key for key, suffix in rename.items()}) == want
    assert normal_rename(want) == want


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(1, 9))
def test_a_caption_is_picked_as_training_would_pick_it(position, seed, count):
    tokens = torch.arange(count)[:, None, None].expand(count, 2, 3).float()
    captions = tuple(map(str, range(count)))
    got = pick_caption({"id": position, "tokens": tokens, "captions": captions}, seed)
    ids = torch.tensor([position])

    class Whole:
        labels = None

    Whole.tokens = tokens[None]
    want = condition(Whole, True, KeyedDraws(seed, ids))[0]
    assert torch.equal(got["tokens"], want)
    assert got["captions"] == (str(int(want[0, 0])),)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_may_have_different_numbers_of_captions(tmp_path, workers):
    source = ShardSource(text_shards(tmp_path, [2, 5, 1, 4, 3]), ZIGMA)
    order = DataOrder(source.shard_sizes, 0)
    loader = training_loader(source, order, GlobalBatch(5), stop_step=40, caption_seed=3, num_workers=workers)
    seen: dict[int, set] = {}
    for batch in loader:
        assert batch.tokens.shape == (5, 5, 3)
        for row, key in enumerate(batch.keys):
            number = int(batch.tokens[row, 0, 0]) - 100 * int(key)
            assert batch.captions[row] == (f"{int(key)}/{number}",)
            seen.setdefault(int(key), set()).add(number)
    assert seen == {0: {0, 1}, 1: set(range(5)), 2: {0}, 3: set(range(4)), 4: set(range(3))}


class Damaged(ShapesSource):
    """Samples whose number is in ``bad`` cannot be read."""

    def __init__(self, count, bad):
        super().__init__(count, 4)
        self.bad = frozenset(bad)

    def __getitem__(self, index):
        if index in self.bad:
            raise ShardError("damaged", "s.tar", 512 * index, f"k{index}")
        return super().__getitem__(index)


def contents(source, world, accum, workers=0, steps=6, **options):
    order, out = DataOrder(source.shard_sizes, 1), {}
    for rank in range(world):
        batches = GlobalBatch(12, world, rank, accum)
        for batch in training_loader(
            source,
            order,
            batches,
            stop_step=steps,
            num_workers=workers,
            max_skipped=source.num_samples,
            **options,
        ):
            out |= dict(zip(batch.ids.tolist(), batch.keys))
    return out


@settings(max_examples=8)
@given(st.sets(st.integers(0, 29), max_size=29), st.sampled_from([(1, 1), (1, 3), (2, 1), (4, 3)]))
def test_a_replacement_is_a_function_of_the_position(bad, shape):
    source = Damaged(30, bad)
    got = contents(source, *shape)
    assert got == contents(source, 1, 1)
    order = DataOrder(source.shard_sizes, 1)
    assert sorted(got) == list(range(72))
    for position, key in got.items():
        later = (order.index(position + ahead) for ahead in range(200))
        index = next(index for index in later if index not in bad)
        assert key == ShapesSource.__getitem__(source, index)["key"]


def test_workers_do_not_change_replacements():
    source = Damaged(30, {1, 2, 3, 17})
    assert contents(source, 2, 1, workers=2) == contents(source, 1, 1)


def test_a_resumed_run_sees_the_same_replacements():
    source = Damaged(30, {1, 2, 3, 17})
    whole = contents(source, 1, 1)
    tail = contents(source, 1, 1, start_step=3)
    assert tail == {g: key for g, key in whole.items() if g >= 36}


def met(bad, limit, steps=10, max_skipped=30):
    source = Damaged(30, bad)
    order = DataOrder(source.shard_sizes, 1)
    skipped = SkippedSamples(limit)
    loader = training_loader(source, order, GlobalBatch(6), stop_step=steps, max_skipped=max_skipped)
    keys = []
    for batch in loader:
        skipped.add(batch.skipped)
        keys += batch.keys
    return skipped, keys


def test_each_unreadable_sample_counts_once_however_often_it_is_met(caplog):
    with caplog.at_level("WARNING"):
        skipped, keys = met({3, 4, 5}, 3)
    assert (len(keys), len(skipped.messages)) == (60, 3)
    for index in (3, 4, 5):
        assert caplog.text.count(f"offset {512 * index}, key 'k{index}': damaged") == 1
    with pytest.raises(BudgetError, match="3 unreadable samples, data.max_skipped is 2; the last here|here"):
        met({3, 4, 5}, 2)
    skipped.check(3)
    with pytest.raises(BudgetError, match="4 unreadable samples"):
        skipped.check(4)


def test_without_a_budget_the_first_is_an_error():
    with pytest.raises(ShardError, match=r"shard s\.tar, offset 1536, key 'k3': damaged"):
        met({3}, 0, max_skipped=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_ends(workers):
    source = Damaged(30, range(30))
    order = DataOrder(source.shard_sizes, 1)
    loader = training_loader(source, order, GlobalBatch(6), max_skipped=4, num_workers=workers)
    with pytest.raises(BudgetError, match="5 unreadable samples in a row, data.max_skipped is 4"):
        next(iter(loader))


class Dying(ShapesSource):
    def __getitem__(self, index):
        if index == 5:
            if self.seed == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return super().__getitem__(index)


@pytest.mark.parametrize("seed, match", [(1, "worker .*(killed|exited)"), (2, "timed out after 1 seconds")])
def test_a_dead_or_stuck_worker_is_an_error(seed, match):
    source = Dying(8, 4, seed=seed)
    order = DataOrder(source.shard_sizes, 0, shuffle=False)
    loader = training_loader(source, order, GlobalBatch(2), num_workers=1, timeout=1 if seed == 2 else 30)
    with pytest.raises(RuntimeError, match=match):
        for _ in zip(loader, range(8)):
            pass


def _index(folder, gate, results):
    gate.wait()
    source = ShardSource(folder, channels=1)
    results.put((source.fingerprint, len(source), source[len(source) - 1]["key"]))


def test_many_processes_index_a_folder_at_once(tmp_path):
    for number in range(8):
        rows = b"".join(sample(f"{number}-{i}", good(i % 3)) for i in range(20))
        (tmp_path / f"{number}.tar").write_bytes(rows + END)
    context = multiprocessing.get_context("fork")
    gate, results = context.Event(), context.Queue()
    workers = [context.Process(target=_index, args=(tmp_path, gate, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    gate.set()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert len(set(found)) == 1
    assert found[0][1:] == (160, "7-19")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.json", *(f"{n}.tar{s}" for n in range(8) for s in ("", ".index.json"))}


def test_tars_that_change_while_they_are_indexed_are_refused(tmp_path, monkeypatch):
    from zigflow.data import indexing

    (tmp_path / "a.tar").write_bytes(sample("0", good()) + END)
    real = indexing.scan_shard

    def scan(path, **options):
        samples = real(path, **options)
        (tmp_path / "b.tar").write_bytes(sample("1", good()) + END)
        return samples

    monkeypatch.setattr(indexing, "scan_shard", scan)
    with pytest.raises(ShardError, match="changed while they were indexed"):
        ShardSource(tmp_path)
    monkeypatch.undo()
    assert len(ShardSource(tmp_path)) == 2
