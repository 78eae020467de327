"""Indexing the tars of others, once, however many processes ask for it at the same time."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from .files import locked, replacing
from .shard_index import (
    INDEX_NAME,
    MEMBER_SUFFIX,
    FolderIndex,
    Shard,
    dump_samples,
    load_folder_index,
    scan_shard,
    write_folder_index,
)
from .tar import Budget, ShardError

log = logging.getLogger(__name__)


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
        return ready
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
        return _current(root, folder, budget) or _build(root, folder, paths, budget)


def _current(root: Path, folder: Path, budget: Budget) -> FolderIndex | None:
    """The stored index, if it is that of the tars as they are."""
    if not (folder / INDEX_NAME).is_file():
        return None
    index = load_folder_index(folder)
    stored = {shard.name: (shard.size, shard.mtime_ns) for shard in index.shards}
    if index.meta.get("origin") != "foreign" or stored != _stamps(root):
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


def _stamps(root: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in root.glob("*.tar") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _build(root: Path, folder: Path, paths: list[Path], budget: Budget) -> FolderIndex:
    log.info("indexing %d shards of %s", len(paths), root)
    before, shards = _stamps(root), []
    for path in paths:
        samples = scan_shard(path, budget=budget)
        data = dump_samples(path.name, samples)
        with replacing(folder / (path.name + MEMBER_SUFFIX)) as file:
            file.write(data)
        size, stamp = before[path.name]
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(path.name, size, len(samples), digest, mtime_ns=stamp))
    if _stamps(root) != before:
        raise ShardError(f"the tars of {root} changed while they were indexed: try again when they are final")
    meta: dict[str, Any] = {"origin": "foreign"}
    if budget.errors:
        meta["problems"] = [[e.shard, e.offset, e.key, e.what] for e in budget.errors]
    index = FolderIndex(tuple(shards), meta)
    if not sum(shard.samples for shard in shards):
        raise ShardError(f"the tars of {root} have no readable sample")
    write_folder_index(folder, index)
    return index
