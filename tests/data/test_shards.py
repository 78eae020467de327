"""Writing shards, reading them back, and naming every kind of damage."""

import hashlib
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

from zigflow.data.shard_index import INDEX_NAME, MEMBER_SUFFIX
from zigflow.data.shards import ShardReader
from zigflow.data.tar import ShardError
from zigflow.data.writer import ShardWriter, encode_npy, encode_png


def members(index):
    image = np.full((4, 5), index, dtype=np.uint8)
    return {
        "image.png": encode_png(image),
        "latent.npy": encode_npy(np.arange(6.0).reshape(1, 2, 3) + index),
        "cls": str(index % 3).encode(),
    }


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "set", samples_per_shard=4, meta={"num_classes": 3}) as writer:
        for index in range(10):
            writer.add(f"sample-{index:03d}", members(index))
    return tmp_path / "set"


def read_all(reader):
    return [reader.read(*reader.split_index(index)) for index in range(len(reader))]


def test_round_trip(folder):
    reader = ShardReader(folder)
    assert (len(reader), reader.sizes) == (10, (4, 4, 2))
    assert reader.index.meta == {"num_classes": 3}
    assert read_all(reader) == [(f"sample-{i:03d}", members(i)) for i in range(10)]
    assert reader.read(1, 2, {"cls"}) == ("sample-006", {"cls": b"0"})
    for bad in (-1, 10):
        with pytest.raises(IndexError):
            reader.split_index(bad)


def test_tarfile_reads_our_shards_and_sees_no_trace_of_the_machine(folder):
    with tarfile.open(folder / "shard-000002.tar") as tar:
        infos = tar.getmembers()
        names = [info.name for info in infos]
        assert names[:3] == ["sample-008.cls", "sample-008.image.png", "sample-008.latent.npy"]
        assert tar.extractfile(names[2]).read() == members(8)["latent.npy"]
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}


def test_the_same_samples_give_the_same_bytes(folder, tmp_path):
    with ShardWriter(tmp_path / "again", samples_per_shard=4, meta={"num_classes": 3}) as writer:
        for index in range(10):
            writer.add(f"sample-{index:03d}", dict(reversed(members(index).items())))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    assert ShardReader(folder).fingerprint == ShardReader(tmp_path / "again").fingerprint
    for line in json.loads((folder / INDEX_NAME).read_text())["shards"]:
        assert hashlib.sha256((folder / line["name"]).read_bytes()).hexdigest() == line["sha256"]


def test_an_interrupted_writer_leaves_no_index_and_no_temporary_files(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for index in range(5):
            writer.add(str(index), members(index))
        raise RuntimeError
    assert not (tmp_path / INDEX_NAME).exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    with pytest.raises(FileExistsError, match="holds shards already"):
        ShardWriter(tmp_path)
    with pytest.raises(ShardError, match="interrupted"):
        ShardReader(tmp_path)


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    from zigflow.files import replacing

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(OSError, match="no space"), replacing(tmp_path / "a") as file:
        file.write(b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.parametrize(
    "key, suffixes, match",
    [
        ("../a", ["cls"], "climbs"),
        ("/a", ["cls"], "absolute"),
        ("a/../../b", ["cls"], "climbs"),
        ("a.b", ["cls"], "no dot"),
        ("", ["cls"], "empty"),
        ("a/", ["cls"], "no dot"),
        ("a", [], "no members"),
        ("a", ["../x"], "suffix"),
        ("a", ["PNG"], "suffix"),
        ("x" * 300, ["cls"], "ustar"),
    ],
)
def test_the_writer_refuses_what_it_could_not_read(tmp_path, key, suffixes, match):
    with pytest.raises(ValueError, match=match), ShardWriter(tmp_path) as writer:
        writer.add(key, dict.fromkeys(suffixes, b"0"))


def test_a_key_twice_and_no_sample_at_all(tmp_path):
    with pytest.raises(ValueError, match="'a' was added before"), ShardWriter(tmp_path / "1") as writer:
        writer.add("a", {"cls": b"0"})
        writer.add("a", {"cls": b"0"})
    with pytest.raises(ValueError, match="no sample"), ShardWriter(tmp_path / "2"):
        pass
    with pytest.raises(ValueError, match="samples_per_shard"):
        ShardWriter(tmp_path / "3", samples_per_shard=0)
    with pytest.raises(ValueError, match="prefix"):
        ShardWriter(tmp_path / "3", prefix="../x")


def test_readers_travel_to_other_processes(folder):
    reader = ShardReader(folder)
    reader.read(0, 0)
    copy = pickle.loads(pickle.dumps(reader))
    assert read_all(copy) == read_all(reader)
    reader.close()
    assert reader.read(0, 0)[0] == "sample-000"


def test_files_stay_closed_beyond_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr("zigflow.data.shards._OPEN_FILES", 3)
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for index in range(9):
            writer.add(str(index), {"cls": b"0"})
    reader = ShardReader(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    read_all(reader)
    assert len(reader._files) == 3
    reader.close()
    assert before == 0 or len(os.listdir("/proc/self/fd")) == before


def entry(folder, shard, member, suffix):
    sample = ShardReader(folder).sample(shard, member)
    return next(entry for entry in sample.entries if entry.suffix == suffix)


def test_a_flipped_bit_is_named(folder):
    place = entry(folder, 1, 2, "latent.npy")
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[place.offset + place.size - 1] ^= 1
    path.write_bytes(data)
    reader = ShardReader(folder)
    assert reader.read(1, 1)[0] == "sample-005"
    with pytest.raises(ShardError, match="checksum") as error:
        reader.read(1, 2)
    assert (error.value.shard, error.value.offset, error.value.key) == (
        "shard-000001.tar",
        place.offset,
        "sample-006",
    )
    assert all(text in str(error.value) for text in ("shard-000001.tar", str(place.offset), "sample-006"))


@pytest.mark.parametrize("keep", [0, 700, 3000])
def test_truncation_is_named_when_the_folder_opens(folder, keep):
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match="truncated") as error:
        ShardReader(folder)
    assert (error.value.shard, error.value.offset) == ("shard-000001.tar", keep)
    assert error.value.key.startswith("sample-00")


def test_truncation_while_reading_is_named(folder):
    reader = ShardReader(folder)
    place = entry(folder, 1, 3, "cls")
    os.truncate(folder / "shard-000001.tar", place.offset)
    with pytest.raises(ShardError, match="truncated") as error:
        reader.read(1, 3)
    assert (error.value.shard, error.value.offset, error.value.key) == (
        "shard-000001.tar",
        place.offset,
        "sample-007",
    )


def test_a_deleted_shard_or_list_is_named(folder):
    reader = ShardReader(folder)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001\.tar is missing"):
        ShardReader(folder)
    with pytest.raises(ShardError, match="cannot be opened"):
        reader.read(1, 0)
    (folder / ("shard-000000.tar" + MEMBER_SUFFIX)).unlink()
    with pytest.raises(ShardError, match="missing"):
        reader.read(0, 0)


def reindex(folder, change, shard=0):
    """Apply ``change`` to the list of samples of a shard and make the folder's index agree with it."""
    index = json.loads((folder / INDEX_NAME).read_text())
    path = folder / (index["shards"][shard]["name"] + MEMBER_SUFFIX)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    index["shards"][shard]["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / INDEX_NAME).write_text(json.dumps(index))


def set_entry(position, value):
    def change(document):
        document["samples"][1][1][0][position] = value

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (set_entry(1, 1 << 40), "outside"),
        (set_entry(1, 0), "outside"),
        (set_entry(1, 513), "outside"),
        (set_entry(2, 1 << 40), "outside"),
        (set_entry(1, -512), "malformed"),
        (set_entry(2, 1.5), "malformed"),
        (set_entry(0, 7), "malformed"),
        (lambda document: document["samples"].pop(), "lists 3 samples, not 4"),
        (lambda document: document.pop("samples"), "damaged"),
        (lambda document: document["samples"].__setitem__(0, ["../../etc/passwd", []]), "damaged"),
        (lambda document: document["samples"].__setitem__(0, 5), "damaged"),
        (lambda document: document.update(version=99), "version 99"),
        (lambda document: document.update(format="x"), "no index"),
    ],
)
def test_a_hostile_list_of_samples_is_refused(folder, change, match):
    reindex(folder, change)
    with pytest.raises(ShardError, match=match):
        ShardReader(folder).read(0, 0)


def test_a_changed_list_of_samples_is_noticed(folder):
    path = folder / ("shard-000000.tar" + MEMBER_SUFFIX)
    path.write_text(path.read_text().replace("sample-000", "sample-xxx"))
    with pytest.raises(ShardError, match="not the file"):
        ShardReader(folder).read(0, 0)


def line(**values):
    return lambda index: index["shards"][0].update(values)


@pytest.mark.parametrize(
    "change, match",
    [
        (line(name="../shard-000000.tar"), "damaged"),
        (line(name="/etc/passwd.tar"), "damaged"),
        (line(name="a/b.tar"), "plain file name"),
        (line(name="pipe:touch x"), "plain file name"),
        (line(samples=-1), "number -1"),
        (line(samples="4"), "number '4'"),
        (line(extra=1), "damaged"),
        (lambda index: index["shards"].append(index["shards"][0]), "twice"),
        (lambda index: index.update(shards=[]), "no shards"),
        (lambda index: index.update(shards=3), "damaged"),
        (lambda index: index.update(version=None), "version None"),
    ],
)
def test_a_hostile_folder_index_is_refused(folder, change, match):
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ShardError, match=match):
        ShardReader(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff", "null"])
def test_an_unreadable_folder_index_is_refused(folder, text):
    (folder / INDEX_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ShardError, match=r"index\.json"):
        ShardReader(folder)


@pytest.mark.parametrize("root", ["pipe:touch owned", "https://example.com/a.tar", "missing"])
def test_only_local_folders_are_opened(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotADirectoryError, match="no local folder"):
        ShardReader(root)
    assert not list(tmp_path.iterdir())
