"""Tars of others: webdataset's layout, the formats of tarfile, and what is refused."""

import contextlib
import io
import os
import pickle
import shutil
import struct
import tarfile

import pytest

from zigflow.data import tar
from zigflow.data.shard_index import INDEX_NAME, scan_shard
from zigflow.data.shards import ShardReader
from zigflow.data.tar import ShardError


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """members: (name, bytes) or a ready TarInfo."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def keys(path):
    return [(s.key, [e.suffix for e in s.entries]) for s in scan_shard(path)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_and_suffixes_as_webdataset_groups_them(tmp_path, format):
    long = "n" * 90 + "/" + "ü" * 60
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("dir.v1/000.image.PNG", b"p"),
            ("dir.v1/000.cls", b"1"),
            ("./001.image.png", b"pp"),
            ("__index__.json", b"{}"),
            ("__meta__/002.cls", b"2"),
            (".hidden", b"x"),
            ("noextension", b"x"),
            (f"{long}.cls" if format != tarfile.USTAR_FORMAT else "002.cls", b"3"),
        ],
        format,
    )
    assert keys(path) == [
        ("dir.v1/000", ["image.png", "cls"]),
        ("001", ["image.png"]),
        (long if format != tarfile.USTAR_FORMAT else "002", ["cls"]),
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_bytes_of_a_foreign_tar(tmp_path, format):
    """webdataset writes its tars with tarfile; members of one sample stand together."""
    samples = [
        (f"k{index}", {"latent.npy": bytes([index]) * (500 + 7 * index), "cls": str(index).encode()})
        for index in range(7)
    ]
    members = [(f"{key}.{suffix}", data) for key, parts in samples for suffix, data in parts.items()]
    write_tar(tmp_path / "a.tar", members, format)
    reader = ShardReader(tmp_path)
    assert [reader.read(0, index) for index in range(len(reader))] == samples


def test_an_index_is_built_once_and_again_when_a_tar_changes(tmp_path, monkeypatch):
    root = tmp_path / "set"
    root.mkdir()
    write_tar(root / "b.tar", [("1.cls", b"1")])
    write_tar(root / "a.tar", [("0.cls", b"0")])
    reader = ShardReader(root)
    assert [reader.read(shard, 0) for shard in range(2)] == [("0", {"cls": b"0"}), ("1", {"cls": b"1"})]
    stamp = (root / INDEX_NAME).stat().st_mtime_ns
    again = ShardReader(root)
    assert (root / INDEX_NAME).stat().st_mtime_ns == stamp
    assert again.fingerprint == reader.fingerprint
    os.utime(root / "a.tar", ns=(1, 1))
    assert ShardReader(root).fingerprint == reader.fingerprint
    write_tar(root / "c.tar", [("2.cls", b"2"), ("3.cls", b"3")])
    changed = ShardReader(root)
    assert (len(changed), changed.sizes) == (4, (1, 1, 2))
    assert changed.fingerprint != reader.fingerprint


@pytest.mark.parametrize("members", [[("0.cls", b"7"), ("1.cls", b"1")], [("0.cls", b"0"), ("2.cls", b"1")]])
def test_a_tar_that_is_replaced_under_its_size_and_time_stamp_is_noticed(tmp_path, members):
    first, copy = tmp_path / "set", tmp_path / "copy"
    first.mkdir()
    write_tar(first / "a.tar", [("0.cls", b"0"), ("1.cls", b"1")])
    before = ShardReader(first)
    shutil.copytree(first, copy)
    index = (copy / INDEX_NAME).read_bytes()
    assert ShardReader(copy).fingerprint == before.fingerprint
    # The times of the copy are kept: it is not hashed at every start.
    assert (kept := (copy / INDEX_NAME).read_bytes()) != index
    assert ShardReader(copy).fingerprint == before.fingerprint and (copy / INDEX_NAME).read_bytes() == kept
    stat = (first / "a.tar").stat()
    write_tar(first / "a.tar", members)
    os.utime(first / "a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (first / "a.tar").stat().st_size == stat.st_size
    after = ShardReader(first)
    assert after.fingerprint != before.fingerprint
    assert [f"{after.read(0, i)[0]}.cls" for i in range(2)] == [name for name, _ in members]


def test_the_index_can_lie_in_a_cache(tmp_path):
    root, cache = tmp_path / "set", tmp_path / "cache" / "deep"
    root.mkdir()
    write_tar(root / "a.tar", [("0.cls", b"0")])
    assert ShardReader(root, cache).read(0, 0) == ("0", {"cls": b"0"})
    assert [path.name for path in root.iterdir()] == ["a.tar"]
    assert len(ShardReader(root, cache)) == 1


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.tar file"):
        ShardReader(tmp_path)


def expect(path, match, offset=None, key=None):
    with pytest.raises(ShardError, match=match) as error:
        scan_shard(path)
    assert error.value.shard == path.name
    assert str(path.name) in str(error.value)
    if offset is not None:
        assert error.value.offset == offset
    if key is not None:
        assert error.value.key == key


def test_doubled_and_interleaved_members_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.cls", b"0"), ("0.CLS", b"1")])
    expect(path, "two members 'cls'", 512 * 3, "0")
    path = write_tar(tmp_path / "b.tar", [("0.cls", b"0"), ("1.cls", b"1"), ("0.png", b"1")])
    expect(path, "returns after another one", 512 * 5, "0")
    path = write_tar(tmp_path / "c.tar", [("readme", b"0")])
    expect(path, "no samples")


def test_every_truncation_is_an_error(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.cls", b"x" * 600) for i in range(3)]).read_bytes()
    end = 3 * (512 + 1024)
    for cut in [0, 1, 511, 512, 513, 1100, 1535, 1536, 1537, end - 1, end, end + 511]:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(ShardError, match="truncated") as error:
            scan_shard(path)
        assert error.value.offset is not None, cut
    # The payload of member 1 begins at 1536 + 512; it is cut inside.
    path.write_bytes(whole[:2100])
    expect(path, "has 600 bytes, the tar ends after 52 of them", 2048, "1.cls")


def test_every_damaged_header_byte_is_an_error_or_harmless(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [("0.cls", b"0"), ("1.cls", b"1")]).read_bytes()
    path = tmp_path / "flip.tar"
    for at in {*range(1024, 1536, 5), *range(1024 + 120, 1024 + 160)}:
        data = bytearray(whole)
        data[at] ^= 0x04
        path.write_bytes(data)
        # Blanks around the stored checksum may change without a change of meaning.
        with contextlib.suppress(ShardError):
            assert [s.key for s in scan_shard(path)] == ["0", "1"], at


def test_bytes_behind_the_end_are_refused(tmp_path):
    one = write_tar(tmp_path / "a.tar", [("0.cls", b"0")])
    two = write_tar(tmp_path / "b.tar", [("1.cls", b"1")])
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    expect(both, "bytes follow the end")
    both.write_bytes(one.read_bytes() + pickle.dumps(os.system))
    expect(both, "bytes follow the end")


@pytest.mark.parametrize(
    "name",
    [
        "../out.cls",
        "a/../../out.cls",
        "/etc/out.cls",
        "a\\..\\out.cls",
        "C:/out.cls",
        "a/\n.cls",
        "..",
        ".//x.cls",
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    expect(write_tar(tmp_path / "a.tar", [("0.cls", b"0"), (name, b"x")]), "refused", 1024, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("0.cls")
    info.type, info.linkname = kind, "/etc/passwd"
    expect(write_tar(tmp_path / "a.tar", [info]), "refused", 0, "0.cls")
    info.linkname = "l" * 200
    expect(write_tar(tmp_path / "b.tar", [info], tarfile.GNU_FORMAT), "refused")


def test_folders_are_passed_over(tmp_path):
    info = tarfile.TarInfo("images")
    info.type = tarfile.DIRTYPE
    assert keys(write_tar(tmp_path / "a.tar", [info, ("images/0.cls", b"0")])) == [("images/0", ["cls"])]


def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_bombs_are_refused_from_their_headers(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    reads = []
    read_at = tar.read_at
    monkeypatch.setattr(tar, "read_at", lambda fd, size, at: reads.append(size) or read_at(fd, size, at))
    for data, match in [
        (header("0.cls", 8 << 40), "truncated"),
        (header("x", 1 << 34, b"x"), "extended header of"),
        (header("x", 1 << 34, b"L"), "extended header of"),
        (header("x", 40, b"x") + b"99999999999 path=a\n".ljust(512, b"\0"), "damaged extended header"),
        (header("x", 19, b"x") + b"19 GNU.sparse.a=1\n".ljust(512, b"\0"), "damaged extended header|sparse"),
        (header("x", 18, b"x") + b"18 GNU.sparse.a=1\n".ljust(512, b"\0"), "sparse"),
        (struct.pack("512s", b"\x80" * 512), "no tar header"),
        (b"PK\x03\x04" + bytes(508), "no tar header"),
        (pickle.dumps(print).ljust(512, b"."), "no tar header"),
    ]:
        path.write_bytes(data)
        expect(path, match)
    assert max(reads) <= 512, "what a header declares is not read before it is believed"


def test_a_pax_size_beyond_the_file_is_a_truncation(tmp_path):
    record = b"23 size=99999999999999\n"
    path = tmp_path / "a.tar"
    path.write_bytes(header("x", len(record), b"x") + record.ljust(512, b"\0") + header("0.cls", 1))
    expect(path, "truncated", 1536, "0.cls")


def test_checksums_of_a_foreign_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("0.cls", b"0")])
    assert scan_shard(path)[0].entries[0].crc32 is None
    assert scan_shard(path, checksums=True)[0].entries[0].crc32 == 0xF4DBDF21
