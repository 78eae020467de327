"""Reading samples out of indexed tar shards, any one directly."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from zigflow.files import read_at

from .contents import Contents
from .indexing import foreign_contents, foreign_index
from .shard_index import (
    INDEX_NAME,
    MEMBER_SUFFIX,
    UNFINISHED_NAME,
    FolderIndex,
    Listing,
    Sample,
    Shard,
    load_folder_index,
    load_samples,
)
from .tar import Budget, ShardError

# All shards may mix: what is read next lies in any of them.
_OPEN_FILES = 256
_LOADED_SAMPLES = 1 << 22


def read_members(
    fd: int, shard: str, sample: Sample, suffixes: Collection[str] | None, max_bytes: int
) -> dict[str, bytes]:
    """The bytes of a sample's members out of an open tar.

    Raises:
        ShardError: a member is over budget, cut off, or does not have its checksum.
    """
    out: dict[str, bytes] = {}
    for entry in sample.entries:
        if suffixes is not None and entry.suffix not in suffixes:
            continue

        def refuse(message: str, offset: int = entry.offset) -> ShardError:
            return ShardError(message, shard, offset, sample.key)

        if entry.size > max_bytes:
            raise refuse(f"{entry.suffix!r} has {entry.size} bytes, the budget of a member is {max_bytes}")
        data = read_at(fd, entry.size, entry.offset)
        if len(data) != entry.size:
            raise refuse(
                f"{entry.suffix!r} has {entry.size} bytes, {len(data)} are left: the tar is truncated"
            )
        if entry.crc32 is not None and zlib.crc32(data) != entry.crc32:
            raise refuse(f"the bytes of {entry.suffix!r} do not have their checksum: the tar is damaged")
        out[entry.suffix] = data
    return out


def _open_files() -> int:
    """How many shards may be open at once: a part of what the system grants this process."""
    try:
        import resource

        granted = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except (ImportError, OSError):
        return 64
    return _OPEN_FILES if granted < 0 else min(_OPEN_FILES, max(granted // 4, 8))


class ShardReader:
    """Random access to the samples of a folder of tars; nothing is written beside the index.

    A folder without an index (made by webdataset or tar) is indexed once; when its tars change it is indexed
    again. A folder that ``zigflow`` wrote is only read: whatever does not fit its index is an error.

    Args:
        root: the folder.
        cache_dir: where the index of a foreign folder is kept; beside the tars when None.
        max_skipped: problems of the tars that may be passed over; their samples are left out of the index of a
            foreign folder, and are errors when they are read from one of ours.

    Attributes:
        problems: those that were passed over.

    Raises:
        NotADirectoryError: ``root`` is no local folder.
        ShardError: a shard is missing, has another size than its index says, or is damaged.
    """

    def __init__(self, root: str | Path, cache_dir: str | Path | None = None, max_skipped: int = 0):
        self.root = Path(root)
        if not self.root.is_dir():
            raise NotADirectoryError(
                f"{str(root)!r} is no local folder; indexed shards are read from local folders only, "
                "neither from URLs (data.order=streaming reads those) nor from commands; make one with "
                "`python -m zigflow.tools make-shards`"
            )
        self.folder = self.root
        if not (self.root / INDEX_NAME).is_file() and cache_dir is not None:
            self.folder = Path(cache_dir)
        self.problems = Budget(max_skipped)
        self.index = self._open_index()
        self.sizes = tuple(shard.samples for shard in self.index.shards)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._files: OrderedDict[int, int] = OrderedDict()
        self._samples: OrderedDict[int, Listing] = OrderedDict()
        self._loaded = 0

    def _open_index(self) -> FolderIndex:
        if not (self.folder / INDEX_NAME).is_file():
            if (self.root / UNFINISHED_NAME).exists():
                raise ShardError(f"writing {self.root} was interrupted: delete the folder and make it again")
            return foreign_index(self.root, self.folder, self.problems)
        index = load_folder_index(self.folder)
        if index.meta.get("origin") == "foreign":
            return foreign_index(self.root, self.folder, self.problems)
        for shard in index.shards:
            problem = self._shard_problem(index, shard)
            if problem is not None:
                self.problems.report(problem)
        return index

    def _shard_problem(self, index: FolderIndex, shard: Shard) -> ShardError | None:
        path = self.root / shard.name
        if not path.is_file():
            return ShardError(f"{path} is missing; {INDEX_NAME} lists it", shard.name)
        size = path.stat().st_size
        if size == shard.size:
            return None
        # The first sample that the file no longer holds tells more than two numbers.
        return ShardError(
            f"the tar has {size} bytes, its index says {shard.size}: it is truncated or was replaced",
            shard.name,
            min(size, shard.size),
            self._first_lost(index, shard.name, size),
        )

    def _first_lost(self, index: FolderIndex, name: str, size: int) -> str:
        shard = next(shard for shard in index.shards if shard.name == name)
        for sample in load_samples(self.folder / (name + MEMBER_SUFFIX), shard):
            if any(entry.offset + entry.size > size for entry in sample.entries):
                return sample.key
        return ""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_samples": OrderedDict(), "_loaded": 0}

    @property
    def fingerprint(self) -> str:
        return self.contents.fingerprint

    @property
    def contents(self) -> Contents:
        """What tells these tars from others; those that we wrote have a checksum of every member."""
        foreign = self.index.meta.get("origin") == "foreign"
        return foreign_contents(self.index) if foreign else Contents(self.index.fingerprint)

    def split_index(self, index: int) -> tuple[int, int]:
        """(shard, member) of a sample number.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} among {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def sample(self, shard: int, member: int) -> Sample:
        """Key and members of a sample, without reading them."""
        if shard not in self._samples:
            line = self.index.shards[shard]
            self._samples[shard] = load_samples(self.folder / (line.name + MEMBER_SUFFIX), line)
            self._loaded += line.samples
            while self._loaded > _LOADED_SAMPLES and len(self._samples) > 1:
                self._loaded -= len(self._samples.popitem(last=False)[1])
        return self._samples[shard][member]

    def read(
        self, shard: int, member: int, suffixes: Collection[str] | None = None, max_bytes: int = 1 << 29
    ) -> tuple[str, dict[str, bytes]]:
        """Key and bytes of a sample's members, of those in ``suffixes`` alone when given.

        Nothing of a member larger than ``max_bytes`` is read.

        Raises:
            ShardError: bytes are missing or do not have their checksum; shard, offset and key are named.
        """
        sample, name = self.sample(shard, member), self.index.shards[shard].name
        return sample.key, read_members(self._file(shard), name, sample, suffixes, max_bytes)

    def error(self, shard: int, member: int, suffix: str, message: str) -> ShardError:
        """An error about a member that was read well but does not mean what it should."""
        sample = self.sample(shard, member)
        offsets = [entry.offset for entry in sample.entries if entry.suffix == suffix]
        offset = offsets[0] if offsets else min(entry.offset for entry in sample.entries)
        return ShardError(f"{suffix}: {message}", self.index.shards[shard].name, offset, sample.key)

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            path = self.root / self.index.shards[shard].name
            try:
                self._files[shard] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise ShardError(f"{path} cannot be opened: {error}", path.name) from error
            while len(self._files) > _open_files():
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
