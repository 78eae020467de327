"""make-shards and verify-shards as a user calls them."""

import gzip
import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from zigflow.data.shard_index import INDEX_NAME
from zigflow.data.shards import ShardReader
from zigflow.data.tar import ShardError
from zigflow.datasets.shards import ShardSource
from zigflow.tools import __main__ as tools
from zigflow.tools.make_shards import read_idx
from zigflow.tools.verify_shards import verify_folder

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 5, 6), dtype=np.uint8)
LABELS = (np.arange(20) % 4).astype(np.uint8)


def idx(array, kind=0x08):
    head = bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    (tmp_path / "images.gz").write_bytes(gzip.compress(idx(IMAGES)))
    (tmp_path / "labels").write_bytes(idx(LABELS))
    return ["--input", str(tmp_path / "images.gz"), "--labels", str(tmp_path / "labels")]


def run(*args):
    return tools.main([str(arg) for arg in args])


def test_idx_to_shards_and_back(mnist, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--output", out, "--shard-size", 4, "--split-fraction", 0.5]
    assert run("make-shards", "idx", *mnist, *options) == 0
    assert "20 samples written" in capsys.readouterr().out
    seen = {}
    for split in ("train", "heldout"):
        source = ShardSource(out / split, channels=1)
        assert (len(source), source.shard_sizes, source.num_classes) == (10, (4, 4, 2), 4)
        labels = [source[i]["labels"] for i in range(10)]
        assert all(2 <= labels.count(label) <= 3 for label in range(4))
        seen |= {source[i]["key"]: source[i] for i in range(10)}
    for index in range(20):
        sample = seen[f"idx-{index:08d}"]
        assert np.array_equal(((sample["pixels"][0].numpy() + 1) * 127.5).round(), IMAGES[index])
        assert sample["labels"] == LABELS[index]
    assert run("verify-shards", out) == 0
    assert "all shards are sound" in capsys.readouterr().out


def test_idx_without_labels(mnist, tmp_path):
    assert run("make-shards", "idx", *mnist[:2], "--output", tmp_path / "out") == 0
    source = ShardSource(tmp_path / "out", channels=1)
    assert (len(source), source.num_classes, set(source[0])) == (20, 0, {"key", "pixels"})


def test_a_folder_of_images(tmp_path, capsys):
    for index in range(6):
        folder = tmp_path / "in" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + index, 9), (index * 40, 0, 0)).save(
            folder / f"{index}.{('png', 'jpg')[index % 2]}"
        )
    base = ["make-shards", "folder", "--input", tmp_path / "in", "--order", "given"]
    assert run(*base, "--output", tmp_path / "small", "--resize", 8) == 0
    source = ShardSource(tmp_path / "small")
    assert (source.image_shape, source.class_names) == ((3, 8, 8), ("cat", "dog"))
    assert [source[i]["labels"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    capsys.readouterr()
    assert run(*base, "--output", tmp_path / "whole") == 0
    assert "the images have 6 sizes" in capsys.readouterr().out
    reader = ShardReader(tmp_path / "whole")
    assert reader.read(0, 0)[1]["image.png"] == (tmp_path / "in" / "cat" / "0.png").read_bytes()
    mixed = ShardSource(tmp_path / "whole", {"image.png": "pixels", "image.jpg": "pixels"}, image_size=8)
    assert mixed[5]["pixels"].shape == (3, 8, 8)


def test_samples_are_written_in_mixed_order(tmp_path):
    """Sorted by class is how a folder is listed: shards written like that show a reader one class for long."""
    classes, each = 8, 30
    for index in range(classes * each):
        folder = tmp_path / "in" / f"{index // each:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), index % 256).save(folder / f"{index:03d}.png")
    base = ["make-shards", "folder", "--input", tmp_path / "in", "--shard-size", each]
    for name, *options in (("a",), ("b",), ("seed", "--seed", 1), ("given", "--order", "given")):
        assert run(*base, "--output", tmp_path / name, *options) == 0
    assert run(*base, "--output", tmp_path / "split", "--split-fraction", 0.5) == 0

    def labels_of(folder):
        source = ShardSource(tmp_path / folder, channels=1)
        # The pixels tell which file came.
        shown = [round((float(source[i]["pixels"][0, 0, 0]) + 1) * 127.5) for i in range(len(source))]
        labels = [source[i]["labels"] for i in range(len(source))]
        assert all(label == value // each for label, value in zip(labels, shown, strict=True))
        return np.split(np.array(labels), np.cumsum(source.shard_sizes)[:-1]), sorted(shown)

    mixed, shown = labels_of("a")
    assert shown == list(range(classes * each))
    assert min(len(set(shard)) for shard in mixed) >= classes - 2
    for split in ("train", "heldout"):
        assert min(len(set(shard)) for shard in labels_of(f"split/{split}")[0][:-1]) >= classes - 2
    assert [set(shard) for shard in labels_of("given")[0]] == [{c} for c in range(classes)]
    prints = {name: ShardReader(tmp_path / name).fingerprint for name in ("a", "b", "seed", "given")}
    assert prints["a"] == prints["b"] and len(set(prints.values())) == 3
    assert ShardReader(tmp_path / "seed").index.meta["order"] == {"kind": "mixed", "seed": 1}
    assert "order" not in ShardReader(tmp_path / "given").index.meta


def test_digits(tmp_path, capsys):
    assert run("make-shards", "digits", "--output", tmp_path / "d", "--split-fraction", 0.25) == 0
    assert "1797 samples written" in capsys.readouterr().out
    assert len(ShardReader(tmp_path / "d" / "train")) == 449
    assert run("make-shards", "digits", "--output", tmp_path / "e", "--seed", 1) == 1


@pytest.mark.parametrize(
    "data, match",
    [
        (b"", "no idx file"),
        (b"\0\0\x08", "no idx file"),
        (b"\0\1\x08\1" + bytes(4), "no idx file"),
        (b"\0\0\x07\1" + bytes(4), "no idx file"),
        (b"\0\0\x08\0", "no idx file"),
        (b"\0\0\x08\xff" + bytes(2000), "no idx file"),
        (b"\0\0\x08\3" + bytes(7), "ends inside its header"),
        (b"\0\0\x0e\4" + b"\xff" * 16, "at most"),
        (idx(IMAGES)[:-1], "has 599"),
        (idx(IMAGES) + b"x", "has more than 600"),
        (gzip.compress(idx(IMAGES))[:-30], "has"),
        (b"\x1f\x8b" + bytes(30), "gzip"),
        (gzip.compress(idx(IMAGES)[:100] + bytes(1 << 24)), "has more than 600"),
    ],
)
def test_malformed_idx_files(tmp_path, data, match):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=match):
        read_idx(tmp_path / "x")


def test_idx_types(tmp_path):
    for kind, dtype in ((0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")):
        array = np.arange(6).reshape(2, 3).astype(dtype)
        (tmp_path / "x").write_bytes(idx(array, kind))
        assert np.array_equal(read_idx(tmp_path / "x"), array)


@pytest.mark.parametrize(
    "images, labels, match",
    [
        (LABELS, LABELS, "images are uint8"),
        (IMAGES, LABELS[:-1], "20 uint8 labels are needed"),
        (IMAGES, IMAGES, "labels are needed"),
    ],
)
def test_idx_files_that_do_not_fit(tmp_path, capsys, images, labels, match):
    (tmp_path / "i").write_bytes(idx(images))
    (tmp_path / "l").write_bytes(idx(labels))
    args = ["--input", tmp_path / "i", "--labels", tmp_path / "l", "--output", tmp_path / "out"]
    assert run("make-shards", "idx", *args) == 1
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_outputs_are_never_overwritten(mnist, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert run("make-shards", "idx", *mnist, "--output", tmp_path / "out") == 1
    assert "not empty" in capsys.readouterr().err
    assert run("make-shards", "idx", *mnist, "--output", tmp_path / "x", "--shard-size", 0) == 1
    assert run("make-shards", "idx", *mnist, "--output", tmp_path / "x", "--split-fraction", 0.001) == 1
    assert not (tmp_path / "x").exists()


@pytest.fixture
def shards(mnist, tmp_path):
    assert (
        run("make-shards", "idx", *mnist, "--output", tmp_path / "set", "--shard-size", 8, "--order", "given")
        == 0
    )
    return tmp_path / "set"


def place(folder, shard, member, suffix):
    return next(e for e in ShardReader(folder).sample(shard, member).entries if e.suffix == suffix)


def change(folder, shard, at, value=None):
    path = folder / f"idx-{shard:06d}.tar"
    data = bytearray(path.read_bytes())
    data[at] = data[at] ^ 1 if value is None else value
    path.write_bytes(data)


def test_damage_is_named(shards, capsys):
    image = place(shards, 1, 3, "image.png")
    change(shards, 1, image.offset + 10)
    label = place(shards, 2, 0, "cls_id.cls")
    change(shards, 2, label.offset)
    assert run("verify-shards", shards) == 1
    out = capsys.readouterr().out
    assert f"shard idx-000001.tar, offset {image.offset}, key 'idx-00000011'" in out
    assert f"shard idx-000002.tar, offset {label.offset}, key 'idx-00000016'" in out
    assert "idx-000000.tar: 16 members, all sound" in out
    assert "2 errors" in out
    assert run("verify-shards", shards, "--max-errors", 1) == 1
    assert "stopped after 1" in capsys.readouterr().out


def test_every_byte_counts(shards):
    """Padding and headers have no checksum of their own: the hash of the shard finds them."""
    total = (shards / "idx-000002.tar").stat().st_size
    for at in (5, 100, 512 + 300, total - 1):
        change(shards, 2, at)
        assert verify_folder(shards), at
        change(shards, 2, at)
    assert not verify_folder(shards)


def test_a_bad_image_with_good_checksums_is_found(tmp_path, capsys):
    from zigflow.data.writer import ShardWriter

    with ShardWriter(tmp_path) as writer:
        writer.add("a", {"image.png": b"no image"})
    assert run("verify-shards", tmp_path, "--no-decode") == 0
    capsys.readouterr()
    assert run("verify-shards", tmp_path) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in ("shard-000000.tar", "offset 512", "key 'a'", "not a readable image"))


def test_an_index_that_disagrees_with_its_tar_is_found(shards):
    index = json.loads((shards / INDEX_NAME).read_text())
    path = shards / "idx-000000.tar.index.json"
    document = json.loads(path.read_text())
    document["samples"][2][0] = "renamed"
    path.write_text(json.dumps(document))
    index["shards"][0]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (shards / INDEX_NAME).write_text(json.dumps(index))
    errors = verify_folder(shards)
    assert [type(error) for error in errors] == [ShardError]
    assert "'renamed'" in str(errors[0])
    assert errors[0].key == "renamed"


def test_missing_and_truncated_shards_are_named(shards, tmp_path, capsys):
    path = shards / "idx-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    assert run("verify-shards", shards) == 1
    assert "idx-000001.tar, offset 2000, key 'idx-00000009'" in capsys.readouterr().out
    path.unlink()
    assert run("verify-shards", shards) == 1
    assert "idx-000001.tar is missing" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert run("verify-shards", tmp_path / "empty") == 1
    assert run("verify-shards", tmp_path / "nowhere") == 1


def test_every_hostile_archive_is_reported_and_nothing_is_written(tmp_path, capsys):
    from tests.data.hostile import CASES, build

    for name in ("climbing name", "wrong shape", "doubled member", "cut at the end", "missing member", "not finite",
                 "interleaved", "npy of objects", "flipped image", "json too deep"):  # fmt: skip
        folder = build(name, tmp_path / name.replace(" ", "-"))
        assert run("verify-shards", folder) == 1, name
        out = capsys.readouterr().out
        assert f"{folder / 'a.tar'}: 16 members, all sound" in out, name
        assert "shard b.tar" in out, name
        assert {path.name for path in folder.iterdir()} == {"a.tar", "b.tar"}
        assert CASES[name]


def test_all_problems_of_a_folder_are_reported_at_once(tmp_path, capsys):
    from tests.data.hostile import END, good, member, sample

    bad = {"0": good(latent_npy=b"junk"), "1": good(cls=b"x"), "2": good(), "3": good(latent_npy=None)}
    rows = sample("good", good()) + b"".join(sample(key, members) for key, members in bad.items())
    (tmp_path / "a.tar").write_bytes(rows + member("../x.cls", b"0") + sample("2", good()) + END)
    (tmp_path / "b.tar").write_bytes(sample("good", good()))
    (tmp_path / "c.tar").write_bytes(b"")
    assert run("verify-shards", tmp_path) == 1
    out = capsys.readouterr().out
    wanted = (
        "key '0': latent.npy",
        "key '1': cls",
        "key '3': missing latents",
        "'../x.cls'",
        "key '2': the key returns",
        "b.tar, offset 4096: the tar ends",
        "the key is in a.tar as well",
        "c.tar, offset 0",
        "9 errors",
    )
    assert [text for text in wanted if text not in out] == []


@pytest.mark.parametrize(
    "stated, sound", [({"num_classes": 3}, False), ({"num_classes": 4}, True), ({}, True)]
)
def test_labels_are_held_against_the_stated_number_of_classes(tmp_path, capsys, stated, sound):
    from zigflow.data.writer import ShardWriter

    with ShardWriter(tmp_path / "s", meta=stated) as writer:
        for label in range(4):
            writer.add(f"k{label}", {"cls": str(label).encode()})
    assert run("verify-shards", tmp_path / "s") == (0 if sound else 1)
    assert ("key 'k3': cls: label 3 is outside 0..2" in capsys.readouterr().out) != sound
