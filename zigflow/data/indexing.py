"""Indexing the tars of others, once, however many processes ask for it at the same time."""

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zigflow.files import locked, read_at, replacing

from .contents import Contents, keyed_sample, stretches
from .shard_index import (
    INDEX_NAME,
    MEMBER_SUFFIX,
    FolderIndex,
    Sample,
    Shard,
    dump_samples,
    load_folder_index,
    load_samples,
    scan_shard,
    write_folder_index,
)
from .tar import Budget, ShardError

log = logging.getLogger(__name__)

_CONTENTS, _CHANGES = "contents", "ctime_ns"
_SAMPLES = 4096
_FROM_A_SHARD = 16
_WHOLE, _PIECE = 1 << 16, 1 << 14


def foreign_index(root: Path, folder: Path, budget: Budget) -> FolderIndex:
    """The index of ``root``'s tars that is kept in ``folder``; built when there is none or the tars changed.

    Of several processes that ask at once, one builds it and the others wait for that one and read the result.

    Args:
        budget: problems that may be passed over; the index remembers which.

    Raises:
        FileNotFoundError: ``root`` holds no .tar file.
        PermissionError: ``folder`` cannot be written; give a cache folder.
        ShardError: a tar is damaged, beyond the budget, or changes while it is being indexed.
    """
    ready = _current(root, folder, budget)
    if ready is not None:
        return ready if _CONTENTS in ready.meta else _with_contents(root, folder, ready)
    paths = sorted(path for path in root.glob("*.tar") if path.is_file())
    if not paths:
        raise FileNotFoundError(f"{root} holds no .tar file and no {INDEX_NAME}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except PermissionError:
        writable = False
    if not writable:
        raise PermissionError(f"the index of {root} cannot be written to {folder}: give a cache_dir that can")
    # Two processes that build at once, where there are no locks, write the same bytes by renames.
    with locked(folder):
        ready = _current(root, folder, budget)
        if ready is not None:
            return ready if _CONTENTS in ready.meta else _with_contents(root, folder, ready)
        return _build(root, folder, paths, budget)


def foreign_contents(index: FolderIndex) -> Contents:
    """What tells the tars of a foreign index from others: their listings and a keyed sample of their members' bytes.

    Raises:
        ShardError: the index is damaged.
    """
    former, digest = index.fingerprint, hashlib.sha256(index.fingerprint.encode())
    stamps, hashed, samples, whole = hashlib.sha256(), 0, 0, True
    try:
        for shard in index.shards:
            found, count, complete = index.meta[_CONTENTS][shard.name]
            digest.update(f"\n{shard.name} {found}".encode())
            stamps.update(f"\n{shard.name} {shard.size} {shard.mtime_ns}".encode())
            hashed, samples, whole = hashed + count, samples + shard.samples, whole and complete is True
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{INDEX_NAME} is damaged: {error!r}") from error
    times = None if whole else stamps.hexdigest()[:16]
    return Contents(digest.hexdigest()[:32], former, times, hashed, samples)


def _contents(path: Path, samples: Sequence[Sample], shards: int) -> list[Any]:
    """A hash of the members of some samples of a tar, how many, and whether that is every byte.

    A tar that was touched, or packed anew with other times in its headers, has the same.
    """
    chosen = keyed_sample(len(samples), max(_FROM_A_SHARD, _SAMPLES // shards))
    digest, whole = hashlib.sha256(), len(chosen) == len(samples)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        for row in chosen:
            for entry in samples[row].entries:
                whole = whole and entry.size <= _WHOLE
                for place, length in stretches(entry.size, _WHOLE, _PIECE):
                    digest.update(read_at(fd, length, entry.offset + place))
    finally:
        os.close(fd)
    return [digest.hexdigest()[:32], len(chosen), whole]


def _with_contents(root: Path, folder: Path, index: FolderIndex) -> FolderIndex:
    """An index of version 0.1, which knew names and sizes alone, completed; kept where it can be written."""
    contents = {
        shard.name: _contents(
            root / shard.name, load_samples(folder / (shard.name + MEMBER_SUFFIX), shard), len(index.shards)
        )
        for shard in index.shards
    }
    return _kept(
        root, folder, FolderIndex(index.shards, {**index.meta, _CONTENTS: contents, _CHANGES: _changes(root)})
    )


def _kept(root: Path, folder: Path, index: FolderIndex) -> FolderIndex:
    """``index``, written to ``folder`` where that can be."""
    try:
        write_folder_index(folder, index)
    except OSError as error:
        log.info("the index of %s is completed at every start, since it cannot be kept: %s", root, error)
    return index


def _current(root: Path, folder: Path, budget: Budget) -> FolderIndex | None:
    """The stored index, if it is that of the tars as they are."""
    if not (folder / INDEX_NAME).is_file():
        return None
    index = load_folder_index(folder)
    stored = {shard.name: (shard.size, shard.mtime_ns) for shard in index.shards}
    if index.meta.get("origin") != "foreign" or stored != _stamps(root):
        return None
    index = _held_against_tars(root, folder, index)
    if index is None:
        return None
    try:
        for row in index.meta.get("problems", []):
            shard, offset, key, message = row
            budget.report(ShardError(str(message), str(shard), offset, str(key)))
    except (TypeError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{folder / INDEX_NAME} is damaged: {error!r}") from error
    return index


def _held_against_tars(root: Path, folder: Path, index: FolderIndex) -> FolderIndex | None:
    """An index whose tars have their size and time stamp; None where their members are others all the same.

    Time stamps can be set by whoever copies a file, those of its last change cannot. Tars that were written or copied
    since they were indexed are listed and hashed again; copies of the same are taken as they are.
    """
    changes, known = _changes(root), index.meta.get(_CHANGES)
    contents = index.meta.get(_CONTENTS)
    if changes == known or not isinstance(contents, dict):
        return index
    known = known if isinstance(known, dict) else {}
    for shard in index.shards:
        if changes.get(shard.name) == known.get(shard.name):
            continue
        path = root / shard.name
        # Problems that were passed over once are no change; new ones change the list of samples.
        try:
            samples = scan_shard(path, budget=Budget(sys.maxsize, quiet=True))
        except ShardError:
            return None
        listed = hashlib.sha256(dump_samples(shard.name, samples)).hexdigest() == shard.index_sha256
        if not listed or _contents(path, samples, len(index.shards)) != contents.get(shard.name):
            log.warning(
                "%s was replaced by another of its size and time stamp: %s is indexed anew", path, root
            )
            return None
    return _kept(root, folder, FolderIndex(index.shards, {**index.meta, _CHANGES: changes}))


def _changes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ctime_ns for path in root.glob("*.tar") if path.is_file()}


def _stamps(root: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in root.glob("*.tar") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _build(root: Path, folder: Path, paths: list[Path], budget: Budget) -> FolderIndex:
    log.info("indexing %d shards of %s", len(paths), root)
    before, changes, shards = _stamps(root), _changes(root), []
    contents: dict[str, list[Any]] = {}
    for path in paths:
        samples = scan_shard(path, budget=budget)
        contents[path.name] = _contents(path, samples, len(paths))
        data = dump_samples(path.name, samples)
        with replacing(folder / (path.name + MEMBER_SUFFIX)) as file:
            file.write(data)
        size, stamp = before[path.name]
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(path.name, size, len(samples), digest, mtime_ns=stamp))
    if _stamps(root) != before or _changes(root) != changes:
        raise ShardError(f"the tars of {root} changed while they were indexed: try again when they are final")
    meta: dict[str, Any] = {"origin": "foreign", _CONTENTS: contents, _CHANGES: changes}
    if budget.errors:
        meta["problems"] = [[e.shard, e.offset, e.key, e.what] for e in budget.errors]
    index = FolderIndex(tuple(shards), meta)
    if not sum(shard.samples for shard in shards):
        raise ShardError(f"the tars of {root} have no readable sample")
    write_folder_index(folder, index)
    return index
