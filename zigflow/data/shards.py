"""Reading samples out of indexed tar shards, any one directly."""

import os
import zlib
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_at
from .shard_index import (
    INDEX_NAME,
    MEMBER_SUFFIX,
    UNFINISHED_NAME,
    FolderIndex,
    Sample,
    build_index,
    load_folder_index,
    load_samples,
)
from .tar import ShardError

_OPEN_FILES = 80
_LOADED_INDEXES = 256


class ShardReader:
    """Random access to the samples of a folder of tars; nothing is written beside the index.

    A folder without an index (made by webdataset or tar) is indexed once; when its tars change it is indexed
    again. A folder that ``zigflow`` wrote is only read: whatever does not fit its index is an error.

    Args:
        root: the folder.
        cache_dir: where the index of a foreign folder is kept; beside the tars when None.

    Raises:
        NotADirectoryError: ``root`` is no local folder.
        ShardError: a shard is missing, has another size than its index says, or is damaged.
    """

    def __init__(self, root: str | Path, cache_dir: str | Path | None = None):
        self.root = Path(root)
        if not self.root.is_dir():
            raise NotADirectoryError(
                f"{str(root)!r} is no local folder; shards are read from local folders only, "
                "neither from URLs nor from commands"
            )
        self.folder = self.root
        if not (self.root / INDEX_NAME).is_file() and cache_dir is not None:
            self.folder = Path(cache_dir)
        self.index = self._open_index()
        self.sizes = tuple(shard.samples for shard in self.index.shards)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._files: OrderedDict[int, int] = OrderedDict()
        self._samples: OrderedDict[int, list[Sample]] = OrderedDict()

    def _open_index(self) -> FolderIndex:
        if not (self.folder / INDEX_NAME).is_file():
            if (self.root / UNFINISHED_NAME).exists():
                raise ShardError(f"writing {self.root} was interrupted: delete the folder and make it again")
            return build_index(self.root, self.folder)
        index = load_folder_index(self.folder)
        if index.meta.get("origin") == "foreign" and self._changed(index):
            return build_index(self.root, self.folder)
        for shard in index.shards:
            path = self.root / shard.name
            if not path.is_file():
                raise ShardError(f"{path} is missing; {INDEX_NAME} lists it", shard.name)
            size = path.stat().st_size
            if size != shard.size:
                # The first sample that the file no longer holds tells more than two numbers.
                raise ShardError(
                    f"the tar has {size} bytes, its index says {shard.size}: it is truncated or was replaced",
                    shard.name,
                    min(size, shard.size),
                    self._first_lost(index, shard.name, size),
                )
        return index

    def _changed(self, index: FolderIndex) -> bool:
        now = {
            path.name: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in self.root.glob("*.tar")
            if path.is_file()
        }
        return now != {shard.name: (shard.size, shard.mtime_ns) for shard in index.shards}

    def _first_lost(self, index: FolderIndex, name: str, size: int) -> str:
        shard = next(shard for shard in index.shards if shard.name == name)
        for sample in load_samples(self.folder / (name + MEMBER_SUFFIX), shard):
            if any(entry.offset + entry.size > size for entry in sample.entries):
                return sample.key
        return ""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_samples": OrderedDict()}

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

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
            while len(self._samples) > _LOADED_INDEXES:
                self._samples.popitem(last=False)
        return self._samples[shard][member]

    def read(
        self, shard: int, member: int, suffixes: Collection[str] | None = None
    ) -> tuple[str, dict[str, bytes]]:
        """Key and bytes of a sample's members, of those in ``suffixes`` alone when given.

        Raises:
            ShardError: bytes are missing or do not have their checksum; shard, offset and key are named.
        """
        sample, name = self.sample(shard, member), self.index.shards[shard].name
        out: dict[str, bytes] = {}
        for entry in sample.entries:
            if suffixes is not None and entry.suffix not in suffixes:
                continue
            data = read_at(self._file(shard), entry.size, entry.offset)
            if len(data) != entry.size:
                raise ShardError(
                    f"{entry.suffix!r} has {entry.size} bytes, {len(data)} are left: the tar is truncated",
                    name,
                    entry.offset,
                    sample.key,
                )
            if entry.crc32 is not None and zlib.crc32(data) != entry.crc32:
                raise ShardError(
                    f"the bytes of {entry.suffix!r} do not have their checksum: the tar is damaged",
                    name,
                    entry.offset,
                    sample.key,
                )
            out[entry.suffix] = data
        return sample.key, out

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
            while len(self._files) > _OPEN_FILES:
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
