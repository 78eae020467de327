"""Sets that are sorted by class are recognized, indexed or streamed, and mixed ones are not complained of."""

import logging

import numpy as np
import pytest

from zigflow.data.mixing import SORTED, StreamMixing, class_of_key, mixing, tell_sorted_shards
from zigflow.data.shards import ShardReader
from zigflow.data.writer import ShardWriter, encode_png, writing_order
from zigflow.datasets.shards import ShardSource


def write(folder, order, key="s-{i:05d}", labels=True, classes=16, each=40):
    part, _ = writing_order(np.arange(classes * each), order, 0)
    with ShardWriter(folder, each) as writer:
        for i in map(int, part):
            members = {"png": encode_png(np.full((2, 2), i % 256, np.uint8))}
            members |= {"cls": str(i // each).encode()} if labels else {}
            writer.add(key.format(i=i, c=i // each), members)
    # As a foreign set: the index is no longer ours.
    for path in folder.glob("*.json"):
        path.unlink()
    return folder


@pytest.mark.parametrize("labels, key", [(True, "s-{i:05d}"), (False, "n{c:04d}_{i}"), (False, "c{c}/{i}")])
def test_a_sorted_foreign_set_is_said_at_the_start(tmp_path, caplog, labels, key):
    caplog.set_level(logging.INFO)
    mixed, sorted_ = (
        ShardSource(write(tmp_path / order, order, key, labels), channels=1, num_classes=16 * labels)
        for order in ("mixed", "given")
    )
    assert ShardReader(tmp_path / "given").index.meta["origin"] == "foreign"
    assert tell_sorted_shards(mixed, 4, "data=x") > 0.93
    assert "sorted by class" not in caplog.text
    assert tell_sorted_shards(sorted_, 4, "data=x") < 0.2
    assert [r.levelname for r in caplog.records if "data=x is sorted by class" in r.message] == ["WARNING"]
    assert "4 of 16 shards mix: set data.shards_at_once=16" in caplog.text
    caplog.clear()
    caplog.set_level(logging.INFO, logger="zigflow.data.mixing")
    tell_sorted_shards(sorted_, 16, "data=x")
    assert [r.levelname for r in caplog.records] == ["INFO"] and "training sees them mixed" in caplog.text


def test_sets_of_one_class_or_without_names_say_nothing(tmp_path, caplog):
    plain = ShardSource(write(tmp_path / "a", "given", "{i:05d}", labels=False), channels=1)
    single = ShardSource(write(tmp_path / "b", "given", "x_{i}", labels=False), channels=1)
    assert tell_sorted_shards(plain, 1, "a") is None is tell_sorted_shards(single, 1, "b")


def test_long_tails_are_not_taken_for_sorted_sets():
    rng = np.random.default_rng(0)
    for weights in (np.ones(1000), 1 / np.arange(1, 1001), np.array([0.99, 0.01])):
        labels = rng.choice(len(weights), (32, 16), p=weights / weights.sum()).tolist()
        assert 0.93 < mixing(labels) < 1.07
    two_each = [[2 * g, 2 * g + 1] * 8 for g in range(32)]
    assert mixing(two_each) < 0.2 < SORTED


def test_classes_of_keys():
    named = {"n01440764_18": "n01440764", "a/b/17": "a/b", "cat-3": "cat"}
    for key, name in (named | dict.fromkeys(("000123", "_7", "00012/000120001"))).items():
        assert class_of_key(key) == name


@pytest.mark.parametrize("order, said", [("given", 1), ("mixed", 0)])
def test_a_sorted_stream_is_said_once_from_its_first_buffers(tmp_path, caplog, order, said):
    pytest.importorskip("webdataset")
    write(tmp_path / "set", order, classes=10, each=200)
    options = {"shuffle_buffer": 200, "cache_dir": tmp_path / "cache"}
    source = ShardSource.stream(tmp_path / "set", channels=1, num_classes=10, stream=options)
    samples = source.samples(0, 1, 0, 0)
    for _ in range(1000):
        next(samples)
    lines = [r.message for r in caplog.records if "sorted by class" in r.message]
    assert len(lines) == said
    assert all("shuffle_buffer" in line and "make-shards" in line for line in lines)


def test_what_a_stream_without_labels_shows():
    watch = StreamMixing(10)
    for i in range(3000):
        watch.see({"key": f"{i:05d}"})
    assert watch._looks == [] and watch._labels == []
