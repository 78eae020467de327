"""What a set of files holds, told by contents and not by names and sizes alone.

Files of one size are replaced without a trace in a list of names and sizes. Modification times show that something was
written, but a copied or touched file is the same data. So what identifies a set is hashes of contents: of every file
where there are few, of a keyed sample where there are many. Times stand beside them: while they are equal nothing was
replaced; where they differ, and only a sample was read, equal data is likely and not certain.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from zigflow.keyed import keyed_seed

SAMPLED = 1024
_WHOLE = 1 << 20
_PIECE = 1 << 18


@dataclass(frozen=True)
class Contents:
    """What tells one set from another.

    Attributes:
        fingerprint: a hash of names, sizes and contents; a copy has the same.
        former: the fingerprint as version 0.1 made it, from names and sizes alone.
        times: a hash of all modification times; None where all contents are in the fingerprint.
        hashed: files (or samples of tars) whose contents are. files: how many there are.
    """

    fingerprint: str
    former: str | None = None
    times: str | None = None
    hashed: int = 0
    files: int = 0

    def each(self, function: Callable[[str], str]) -> "Contents":
        """The same of a source that reads these files in its way: ``function`` of either fingerprint."""
        former = None if self.former is None else function(self.former)
        return replace(self, fingerprint=function(self.fingerprint), former=former)

    def identity(self) -> dict[str, Any]:
        """For a checkpoint, plain JSON values."""
        facts: dict[str, Any] = {"fingerprint": self.fingerprint}
        if self.former is not None:
            facts["former"] = self.former
        if self.times is not None:
            facts["times"] = {"sha256": self.times, "hashed": self.hashed, "files": self.files}
        return facts


def contents_of(source: Any) -> Contents:
    """What a data source says of its contents; its fingerprint, where it says no more."""
    known = getattr(source, "contents", None)
    return known if isinstance(known, Contents) else Contents(str(getattr(source, "fingerprint", "")))


def exact_fingerprint(source: Any) -> str:
    """Equal only for data that is surely the same: what results that are kept are told apart by."""
    contents = contents_of(source)
    return contents.fingerprint if contents.times is None else f"{contents.fingerprint}-{contents.times}"


def folder_contents(root: Path, files: Sequence[Path], *facts: object) -> Contents:
    """The contents of ``files``, relative to ``root``, in their order.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256("".join(map(str, facts)).encode())
    stamps = np.empty((len(files), 2), dtype="<i8")
    base = f"{root}{os.sep}"
    for row, path in enumerate(files):
        found = os.stat(base + str(path))
        stamps[row] = found.st_size, found.st_mtime_ns
        digest.update(f"\n{path.as_posix()} {found.st_size}".encode())
    former = digest.hexdigest()[:32]
    chosen = keyed_sample(len(files))
    whole = len(chosen) == len(files)
    for row in chosen:
        size, time = stamps[row].tolist()
        digest.update(_file_hash(str(root / files[row]), size, time))
        whole = whole and size <= _WHOLE
    times = None if whole else hashlib.sha256(stamps.tobytes()).hexdigest()[:16]
    return Contents(digest.hexdigest()[:32], former, times, len(chosen), len(files))


def keyed_sample(count: int, size: int = SAMPLED) -> list[int]:
    """Up to ``size`` of 0..count-1 in ascending order, one at a keyed place in each of as many equal stretches."""
    if count <= size:
        return list(range(count))
    edges = [i * count // size for i in range(size + 1)]
    return [edges[i] + keyed_seed(0, "contents", count, i) % (edges[i + 1] - edges[i]) for i in range(size)]


def stretches(size: int, whole: int, piece: int) -> list[tuple[int, int]]:
    """(place, length) of what is hashed of ``size`` bytes: all of up to ``whole``, else the ends and the middle."""
    if size <= whole:
        return [(0, size)]
    return [(place, piece) for place in (0, (size - piece) // 2, size - piece)]


# Several sources of one process may read one folder; a file that was not written since is hashed once.
@lru_cache(maxsize=16 * SAMPLED)
def _file_hash(path: str, size: int, mtime_ns: int) -> bytes:
    del mtime_ns
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for place, length in stretches(size, _WHOLE, _PIECE):
            file.seek(place)
            digest.update(file.read(length))
    return digest.digest()
