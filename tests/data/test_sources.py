"""Every data source in datasets/, found by its file, against the batch contract; and the contract itself."""

import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import training_loader
from zigflow.data.order import DataOrder
from zigflow.data.source import check_source
from zigflow.data.tar import ShardError
from zigflow.data.writer import ShardWriter, encode_npy, encode_png
from zigflow.datasets.image_folder import ImageFolderSource
from zigflow.datasets.shards import ShardSource
from zigflow.datasets.synthetic import SHAPES, ShapesSource

FILES = sorted((Path(__file__).resolve().parents[2] / "datasets").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_source_keeps_the_contract(path, tmp_path):
    module = importlib.import_module(f"zigflow.datasets.{path.stem}")
    source = module.example(tmp_path / "a")
    check_source(source, samples=6)
    copy = pickle.loads(pickle.dumps(source))
    assert copy[0]["key"] == source[0]["key"]
    assert module.example(tmp_path / "b").fingerprint == source.fingerprint
    order = DataOrder(source.shard_sizes, 0)
    batch = next(iter(training_loader(source, order, GlobalBatch(3))))
    if batch.moments is not None:
        channels, *sides = source.image_shape
        assert batch.moments.shape == (3, 2 * channels, *sides)
    else:
        images = batch.pixels if batch.pixels is not None else batch.latents
        assert images.shape == (3, *source.image_shape)
    assert (batch.labels is not None) == (source.num_classes > 0)


def test_the_readme_names_every_source():
    text = (FILES[0].parent / "README.md").read_text()
    assert [path.name for path in FILES if path.name not in text] == []


class Faulty(ShapesSource):
    def __init__(self, **changes):
        super().__init__(5, 4)
        self.changes = changes

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample.update(self.changes)
        return {name: value() if callable(value) else value for name, value in sample.items()}


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"key": ""}, "no key"),
        ({"key": "same"}, "share the key"),
        ({"image": 1}, "unknown fields"),
        ({"labels": 4}, r"label 4 outside 0\.\.3"),
        ({"labels": lambda: torch.rand(1).item()}, "differs between two reads"),
        ({"pixels": torch.zeros(3, 4, 5)}, "image_shape"),
        ({"pixels": torch.full((3, 4, 4), 1.5)}, "allowed"),
        ({"pixels": torch.full((3, 4, 4), torch.nan)}, "finite"),
        ({"pixels": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "float32"),
        ({"pixels": lambda: torch.rand(3, 4, 4)}, "pixels differs"),
        ({"pixels": None}, "neither"),
    ],
)
def test_the_check_finds_what_breaks_the_contract(changes, match):
    with pytest.raises(ValueError, match=match):
        check_source(Faulty(**changes))


def test_the_check_wants_the_attributes():
    with pytest.raises(TypeError, match="list is no data source: it lacks image_shape"):
        check_source([1, 2])
    source = ShapesSource(5, 4)
    source.shard_sizes = (4,)
    with pytest.raises(ValueError, match="add up"):
        check_source(source)


def write(folder, samples, **meta):
    with ShardWriter(folder, meta=meta) as writer:
        for index, members in enumerate(samples):
            writer.add(f"{index:03d}", members)
    return folder


def image(value=0, size=(4, 4)):
    return encode_png(np.full(size, value, np.uint8))


def test_fields_follow_the_suffixes(tmp_path):
    members = {
        "image.png": image(255),
        "img_feature256.npy": encode_npy(np.ones((4, 2, 2), np.float16)),
        "cls_id.cls": b"7",
        "caption.json": json.dumps(["one", "two"]).encode(),
        "caption_feature.npy": encode_npy(np.zeros((2, 5, 3), np.float32)),
        "cls_name.json": b'{"any": 1}',
    }
    folder = write(tmp_path, [members] * 2, num_classes=8, class_names=["a"])
    sample = ShardSource(folder)[0]
    assert sample["pixels"].shape == (3, 4, 4)
    assert sample["pixels"].min() == 1
    assert sample["latents"].shape == (4, 2, 2)
    assert sample["latents"].dtype == torch.float32
    assert sample["labels"] == 7
    assert sample["captions"] == ("one", "two")
    assert sample["tokens"].shape == (2, 5, 3)
    only = ShardSource(folder, fields=("latents",))
    assert (set(only[0]), only.image_shape, only.num_classes) == ({"key", "latents"}, (4, 2, 2), 0)
    renamed = ShardSource(
        folder, {"image.png": "pixels", "cls_id.cls": "labels"}, channels=1, image_size=8, enlarge=True
    )
    assert (set(renamed[0]), renamed.image_shape, renamed.num_classes) == (
        {"key", "pixels", "labels"},
        (1, 8, 8),
        8,
    )
    assert len({s.fingerprint for s in (only, renamed, ShardSource(folder))}) == 3


def test_videos(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 6), dtype=np.uint8)
    folder = write(tmp_path, [{"frames.npy": encode_npy(frames), "cls": b"0"}], num_classes=1)
    source = ShardSource(folder)
    check_source(source)
    assert source.image_shape == (3, 3, 4, 6)
    assert torch.equal(((source[0]["pixels"] + 1) * 127.5).round(), torch.from_numpy(frames).float())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rename": {"image.png": "pixel"}}, "Did you mean 'pixels'"),
        ({"rename": {"photo.png": "pixels"}}, r"has no photo\.png"),
        ({"rename": {"cls": "labels"}, "fields": ["labels"]}, "pixels or latents cannot be found"),
        ({"fields": ["latents"]}, "latents cannot be found"),
        ({"fields": ["x"]}, "batch field"),
        ({"image_size": 0}, "image_size"),
        ({"channels": 2}, "channels"),
    ],
)
def test_choices_that_cannot_be_met(tmp_path, options, match):
    folder = write(tmp_path, [{"image.png": image(), "cls": b"0"}])
    with pytest.raises(ValueError, match=match):
        ShardSource(folder, **options)


def test_two_suffixes_for_one_field_need_a_choice(tmp_path):
    latent = {
        name: encode_npy(np.full((1, 1, 1), i)) for i, name in enumerate(["latent.npy", "latent_hr.npy"])
    }
    folder = write(tmp_path, [latent])
    with pytest.raises(ValueError, match=r"latents can come from latent\.npy or latent_hr\.npy"):
        ShardSource(folder)
    assert ShardSource(folder, {"latent_hr.npy": "latents"})[0]["latents"].item() == 1


GOOD = {"image.png": image(), "cls": b"0", "latent.npy": encode_npy(np.zeros((1, 2, 2)))}


@pytest.mark.parametrize(
    "change, match",
    [
        ({"cls": None}, "missing"),
        ({"cls": b"3"}, r"label 3 is outside 0\.\.2"),
        ({"cls": b"x"}, "a class is a number"),
        ({"image.png": b"junk"}, "not a readable image"),
        (
            {"image.png": image(size=(4, 5))},
            r"shape \(3, 4, 5\), the first sample has \(3, 4, 4\).*image_size",
        ),
        ({"latent.npy": encode_npy(np.full((1, 2, 2), np.nan))}, "not finite"),
        ({"latent.npy": encode_npy(np.zeros((2, 2)))}, "dimensions"),
    ],
)
def test_a_bad_member_is_named_with_shard_offset_and_key(tmp_path, change, match):
    bad = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    source = ShardSource(write(tmp_path, [GOOD, GOOD, bad], num_classes=3))
    source[1]
    with pytest.raises(ShardError, match=match) as error:
        source[2]
    assert (error.value.shard, error.value.key) == ("shard-000000.tar", "002")
    entries = {entry.suffix: entry.offset for entry in source.reader.sample(0, 2).entries}
    assert error.value.offset == entries.get(next(iter(change)), min(entries.values()))


def test_image_folders(tmp_path):
    for name, value in (
        ("b/1.png", 10),
        ("b/deep/2.jpeg", 20),
        ("a/3.PNG", 30),
        (".cache/4.png", 1),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(value, (6, 9)))
    source = ImageFolderSource(tmp_path, (4, 3), channels=1)
    check_source(source)
    assert source.class_names == ("a", "b")
    assert [(source[i]["key"], source[i]["labels"]) for i in range(3)] == [
        ("a/3.PNG", 0),
        ("b/1.png", 1),
        ("b/deep/2.jpeg", 1),
    ]
    (tmp_path / "a" / "3.PNG").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"3\.PNG: not a readable"):
        source[0]
    assert ImageFolderSource(tmp_path, (4, 3), channels=1).fingerprint != source.fingerprint


def test_image_folders_without_classes_or_images(tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(image())
    flat = ImageFolderSource(tmp_path / "flat", 4)
    check_source(flat)
    assert (flat.num_classes, "labels" in flat[0]) == (0, False)
    (tmp_path / "1.png").write_bytes(image())
    with pytest.raises(ValueError, match="which is it"):
        ImageFolderSource(tmp_path, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        ImageFolderSource(tmp_path / "empty", 4)
    with pytest.raises(NotADirectoryError):
        ImageFolderSource(tmp_path / "missing", 4)


def test_shapes_differ_by_class_and_move():
    source = ShapesSource(8, 32, num_classes=8, num_frames=3)
    check_source(source)
    masks = [(source[i]["pixels"][0] > -1).any(dim=0).float().mean() for i in range(4)]
    assert all(0.01 < mask < 0.7 for mask in masks)
    assert len(SHAPES) == 4
    colors = {tuple(source[i]["pixels"].amax(dim=(0, 2, 3)).tolist()) for i in (0, 4)}
    assert len(colors) == 2
    video = source[0]["pixels"]
    assert not torch.equal(video[0], video[2])
    latents = ShapesSource(2, 4, channels=5, as_latents=True, num_classes=0)
    check_source(latents)
    assert set(latents[0]) == {"key", "latents"}
    with pytest.raises(ValueError, match="positive"):
        ShapesSource(0)
