"""Writing shards: same samples, same bytes; an interrupted run leaves no folder that looks whole."""

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zigflow.files import replacing
from zigflow.keyed import keyed_permutation
from zigflow.registry import unknown_name

from .shard_index import (
    INDEX_NAME,
    MEMBER_SUFFIX,
    UNFINISHED_NAME,
    Entry,
    FolderIndex,
    Sample,
    Shard,
    dump_samples,
    write_folder_index,
)
from .tar import BLOCK, check_name

_RECORD = 20 * BLOCK
ORDERS = ("mixed", "given")


def writing_order(
    part: np.ndarray, order: str, seed: int, name: str = ""
) -> tuple[np.ndarray, dict[str, Any]]:
    """The order in which samples are written, and what the set's ``meta`` says about it.

    Readers of a few shards at a time see what stands together: sorted by class, one class after another.

    Args:
        part: (n,) the samples' numbers.
        order: "mixed", a permutation keyed by ``seed`` and ``name``, or "given".
        name: of the part; parts of one set are mixed apart.

    Raises:
        UnknownNameError: another order.
    """
    if order not in ORDERS:
        raise unknown_name("order of writing", order, list(ORDERS))
    if order == "given":
        return part, {}
    mixed = part[keyed_permutation(len(part), seed, "shards.written", name)]
    return mixed, {"order": {"kind": "mixed", "seed": seed}}


class ShardWriter:
    """Packs samples into tars of ``samples_per_shard``; a ``with`` block that ends well writes the index.

    Members carry no time, owner or mode of their own. Each tar is written under a temporary name, synced and
    renamed; ``index.json`` comes last, and until then a file ``unfinished`` keeps readers away.

    Args:
        folder: made when absent; must not hold an index yet.
        samples_per_shard: samples of every shard but the last.
        prefix: shards are called ``<prefix>-000000.tar`` and so on.
        meta: JSON values that describe the set (class names, image shape, ...).

    Raises:
        FileExistsError: the folder holds shards already.
        ValueError: ``samples_per_shard`` is below 1 or the prefix is no plain name.
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 1000,
        prefix: str = "shard",
        meta: Mapping[str, Any] | None = None,
    ):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
            raise ValueError(f"the prefix is made of letters, digits, - and _, got {prefix!r}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX_NAME).exists() or any(self.folder.glob("*.tar")):
            raise FileExistsError(f"{self.folder} holds shards already: choose an empty folder")
        self.samples_per_shard, self.prefix, self.meta = samples_per_shard, prefix, dict(meta or {})
        (self.folder / UNFINISHED_NAME).touch()
        self._pending: list[tuple[str, dict[str, bytes]]] = []
        self._shards: list[Shard] = []
        self._keys: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample; members are written in the order of their suffixes.

        Raises:
            ValueError: the key was used, or it or a suffix cannot be the name of a member.
        """
        check_name(key)
        if "." in key.rpartition("/")[2] or not key.rpartition("/")[2]:
            raise ValueError(f"a key has no dot in its last part (the suffix starts there), got {key!r}")
        if key in self._keys:
            raise ValueError(f"the key {key!r} was added before")
        if not members:
            raise ValueError(f"the sample {key!r} has no members")
        for suffix in members:
            if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", suffix):
                raise ValueError(f"a suffix is made of a-z, 0-9, - and _ between dots, got {suffix!r}")
        self._keys.add(key)
        self._pending.append((key, dict(members)))
        if len(self._pending) == self.samples_per_shard:
            self._write_shard()

    def close(self) -> FolderIndex:
        """Write the last shard and the index.

        Raises:
            ValueError: no sample was added.
        """
        if self._pending:
            self._write_shard()
        if not self._shards:
            raise ValueError(f"no sample was added to {self.folder}")
        index = FolderIndex(tuple(self._shards), self.meta)
        write_folder_index(self.folder, index)
        (self.folder / UNFINISHED_NAME).unlink()
        return index

    def _write_shard(self) -> None:
        name = f"{self.prefix}-{len(self._shards):06d}.tar"
        digest, offset, samples = hashlib.sha256(), 0, []
        with replacing(self.folder / name) as file:

            def put(data: bytes) -> None:
                nonlocal offset
                file.write(data)
                digest.update(data)
                offset += len(data)

            for key, members in self._pending:
                entries = []
                for suffix in sorted(members):
                    data = members[suffix]
                    put(_header(f"{key}.{suffix}", len(data)))
                    entries.append(Entry(suffix, offset, len(data), zlib.crc32(data)))
                    put(data)
                    put(bytes(-len(data) % BLOCK))
                samples.append(Sample(key, tuple(entries)))
            put(bytes(2 * BLOCK))
            put(bytes(-offset % _RECORD))
        listing = dump_samples(name, samples)
        with replacing(self.folder / (name + MEMBER_SUFFIX)) as file:
            file.write(listing)
        self._shards.append(
            Shard(name, offset, len(samples), hashlib.sha256(listing).hexdigest(), digest.hexdigest())
        )
        self._pending = []


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    try:
        return info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise ValueError(
            f"the member {name!r} ({size} bytes) does not fit a ustar header: {error}"
        ) from error


def encode_npy(array: np.ndarray) -> bytes:
    """A numeric array as npy bytes, little-endian, in C order."""
    if array.dtype.kind not in "fiub":
        raise ValueError(f"arrays of numbers are stored, got {array.dtype}")
    stream = io.BytesIO()
    np.lib.format.write_array(
        stream, np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))), allow_pickle=False
    )
    return stream.getvalue()


def encode_png(image: np.ndarray, compress_level: int = 6) -> bytes:
    """(H, W) or (H, W, 3) uint8 as a PNG without metadata."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=compress_level)
    return stream.getvalue()
