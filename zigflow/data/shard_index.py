"""The index of a folder of shards: which sample has which members, and where.

``index.json`` lists the shards; beside each ``x.tar`` lies ``x.tar.index.json`` with its samples. Both are
plain JSON and are treated as untrusted: every number is checked against the tar before it is used.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from zigflow.files import read_at, replacing

from .tar import Budget, ShardError, check_name, scan_members, split_name

log = logging.getLogger(__name__)

INDEX_NAME = "index.json"
MEMBER_SUFFIX = ".index.json"
UNFINISHED_NAME = "unfinished"
FORMAT, VERSION = "zigflow-shards", 1
_MAX_INDEX = 1 << 27
_MAX_SUFFIXES = 256
_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a sample: its suffix, its place, and the CRC-32 of its bytes where it is known."""

    suffix: str
    offset: int
    size: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A key and its members."""

    key: str
    entries: tuple[Entry, ...]


_ROW = np.dtype([("suffix", "u2"), ("offset", "i8"), ("size", "i8"), ("crc32", "u4"), ("checked", "?")])


class Listing(Sequence[Sample]):
    """The samples of a shard, packed: 70 bytes for a key and two members, a tenth of what objects take.

    A reader whose shards all mix keeps the listings of all of them.
    """

    def __init__(self, samples: Sequence[Sample]):
        keys = [sample.key.encode() for sample in samples]
        names: dict[str, int] = {}
        rows = [
            (names.setdefault(e.suffix, len(names)), e.offset, e.size, e.crc32 or 0, e.crc32 is not None)
            for sample in samples
            for e in sample.entries
        ]
        self._keys, self._suffixes = b"".join(keys), tuple(names)
        self._rows = np.array(rows, dtype=_ROW)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        self._row_ends = np.cumsum([0, *(len(sample.entries) for sample in samples)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._key_ends) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        key = self._keys[self._key_ends[index] : self._key_ends[index + 1]].decode()
        rows = self._rows[self._row_ends[index] : self._row_ends[index + 1]].tolist()
        return Sample(
            key,
            tuple(Entry(self._suffixes[s], o, n, crc if checked else None) for s, o, n, crc, checked in rows),
        )


@dataclass(frozen=True)
class Shard:
    """A line of ``index.json``.

    Attributes:
        name: file name of the tar.
        size: bytes of the tar.
        samples: number of samples.
        index_sha256: hash of the file with the samples.
        sha256: hash of the tar, None for one that we indexed but did not write.
        mtime_ns: time stamp of a foreign tar when it was indexed.
    """

    name: str
    size: int
    samples: int
    index_sha256: str
    sha256: str | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class FolderIndex:
    """Contents of ``index.json``; ``meta`` is the maker's (class names, image shape, ...)."""

    shards: tuple[Shard, ...]
    meta: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' names and of all keys, offsets, sizes and checksums."""
        lines = [f"{shard.name} {shard.samples} {shard.index_sha256}\n" for shard in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def group_members(
    members: Iterable[tuple[str, Entry]], shard: str, budget: Budget | None = None
) -> list[Sample]:
    """Consecutive members of one key make a sample.

    Args:
        members: (key, entry) in the order of the tar.
        shard: its name, for errors.
        budget: problems that may be passed over, none by default; their samples are left out.

    Raises:
        ShardError: two members of a sample have one suffix, or a key returns after another one (interleaved).
    """
    budget = budget or Budget()
    groups: list[Sample] = []
    seen: set[str] = set()
    spoiled: set[str] = set()
    key, entries = "", []
    for name, entry in members:
        if name != key:
            if entries:
                groups.append(Sample(key, tuple(entries)))
            if name in seen and name not in spoiled:
                what = "the key returns after another one: its members are interleaved or doubled"
                budget.report(ShardError(what, shard, entry.offset, name))
                spoiled.add(name)
            seen.add(name)
            key, entries = name, []
        if name in spoiled:
            continue
        what = ""
        if any(other.suffix == entry.suffix for other in entries):
            what = f"the sample has two members {entry.suffix!r}"
        elif len(entries) == _MAX_SUFFIXES:
            what = f"more than {_MAX_SUFFIXES} members of one key"
        if what:
            budget.report(ShardError(what, shard, entry.offset, name))
            spoiled.add(name)
            continue
        entries.append(entry)
    if entries:
        groups.append(Sample(key, tuple(entries)))
    for error in budget.errors:
        if error.shard == shard:
            # A refused or truncated member: what is left of its sample is no sample.
            spoiled.add((split_name(error.key) or (error.key,))[0])
    return [sample for sample in groups if sample.key not in spoiled] if spoiled else groups


def scan_shard(path: Path, checksums: bool = False, budget: Budget | None = None) -> list[Sample]:
    """The samples of a tar, read from its headers (and its bytes, when ``checksums``).

    Args:
        budget: problems that may be passed over, none by default; their samples are left out.

    Raises:
        ShardError: see :func:`zigflow.data.tar.scan_members` and :func:`group_members`; or no samples.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        return scan_open(fd, path.name, checksums, budget or Budget())
    finally:
        os.close(fd)


def scan_open(fd: int, name: str, checksums: bool, budget: Budget) -> list[Sample]:
    """As :func:`scan_shard`, of a file that is open."""
    members, passed_over = [], 0
    for member in scan_members(fd, name, os.fstat(fd).st_size, budget):
        parts = split_name(member.name)
        if parts is None:
            passed_over += 1
            continue
        crc = checksum(fd, member.offset, member.size) if checksums else None
        members.append((parts[0], Entry(parts[1], member.offset, member.size, crc)))
    samples = group_members(members, name, budget)
    if passed_over:
        log.info("%s: %d members without a key or suffix were passed over", name, passed_over)
    if not samples:
        budget.report(ShardError("the tar has no samples", name))
    return samples


def checksum(fd: int, offset: int, size: int) -> int:
    """CRC-32 of a stretch of an open file, in bounded memory; of what there is when the file ends early."""
    crc, end = 0, offset + size
    while offset < end and (piece := read_at(fd, min(_PIECE, end - offset), offset)):
        crc = zlib.crc32(piece, crc)
        offset += len(piece)
    return crc


def dump_samples(shard: str, samples: Iterable[Sample]) -> bytes:
    rows = [[s.key, [[e.suffix, e.offset, e.size, e.crc32] for e in s.entries]] for s in samples]
    document = {"format": FORMAT, "version": VERSION, "shard": shard, "samples": rows}
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def load_samples(path: Path, shard: Shard) -> Listing:
    """Read and check the samples of one shard.

    Raises:
        ShardError: the file is missing, is not the one that ``index.json`` was written with, or points
            outside the tar.
    """
    data = _read(path, shard.name)
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ShardError(f"{path.name} is not the file that {INDEX_NAME} was written with", shard.name)
    document = _parse(data, path)
    try:
        samples = Listing([_sample(row, shard) for row in document["samples"]])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path.name} is damaged: {error!r}", shard.name) from error
    if len(samples) != shard.samples:
        raise ShardError(f"{path.name} lists {len(samples)} samples, not {shard.samples}", shard.name)
    return samples


def _sample(row: Any, shard: Shard) -> Sample:
    key, rows = row
    check_name(key)
    entries = []
    for suffix, offset, size, crc in rows:
        # Spelled out, and by type rather than isinstance (a bool is no number): millions of members pass here.
        whole = type(offset) is int and type(size) is int and (crc is None or type(crc) is int)
        if not whole or type(suffix) is not str or offset < 0 or size < 0 or (crc or 0) < 0:
            raise ShardError(f"the index holds a malformed member {suffix!r}", shard.name, None, key)
        if offset < 512 or offset % 512 or offset + size > shard.size:
            raise ShardError(
                f"the index places {suffix!r} ({size} bytes) outside the {shard.size} bytes of the tar",
                shard.name,
                offset,
                key,
            )
        entries.append(Entry(suffix, offset, size, crc))
    return Sample(key, tuple(entries))


def write_folder_index(folder: Path, index: FolderIndex) -> None:
    """Write ``index.json`` last: a folder that has it is complete."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "meta": index.meta,
        "shards": [{k: v for k, v in vars(shard).items() if v is not None} for shard in index.shards],
    }
    with replacing(folder / INDEX_NAME) as file:
        file.write(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode())


def is_folder_index(path: Path) -> bool:
    """Whether this is an index of ours, of whatever version; other tools have an ``index.json``, too."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT


def load_folder_index(folder: Path) -> FolderIndex:
    """Read and check ``index.json``.

    Raises:
        ShardError: it is damaged, of another version, or names a shard that is no plain file name.
    """
    path = folder / INDEX_NAME
    document = _parse(_read(path, INDEX_NAME), path)
    shards = []
    try:
        for row in document["shards"]:
            shard = Shard(**row)
            if shard.name != Path(check_name(shard.name)).name or not shard.name.endswith(".tar"):
                raise ShardError("a shard is a plain file name ending in .tar", shard.name)
            for number in (shard.size, shard.samples):
                if not isinstance(number, int) or number < 0:
                    raise ShardError(f"{INDEX_NAME} holds the number {number!r}", shard.name)
            shards.append(shard)
        meta = dict(document.get("meta", {}))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} is damaged: {error!r}") from error
    names = [shard.name for shard in shards]
    if not names or len(set(names)) != len(names):
        raise ShardError(f"{path} lists no shards, or one of them twice")
    return FolderIndex(tuple(shards), meta)


def _read(path: Path, shard: str) -> bytes:
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise ShardError(f"{path.name} is larger than {_MAX_INDEX} bytes", shard)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing", shard) from error


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} is no readable JSON: {type(error).__name__}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ShardError(f"{path} is no index of {FORMAT}")
    if document.get("version") != VERSION:
        raise ShardError(f"{path} has version {document.get('version')!r}, this release reads {VERSION}")
    return document
