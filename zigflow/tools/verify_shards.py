"""``verify-shards``: check every byte, offset and sample of folders of shards; nothing is written.

All problems are reported, each by shard, offset and key. Exit code 0: all is well; 1: damage; 2: a wrong command.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zigflow.data.decode import DECODERS, DEFAULT_LIMITS, DecodeError, decode
from zigflow.data.fields import DEFAULT_RENAME
from zigflow.data.shard_index import (
    INDEX_NAME,
    MEMBER_SUFFIX,
    UNFINISHED_NAME,
    FolderIndex,
    Sample,
    Shard,
    load_folder_index,
    load_samples,
    scan_open,
)
from zigflow.data.shards import read_members
from zigflow.data.tar import Budget, BudgetError, ShardError
from zigflow.files import file_digest


def main(argv: list[str]) -> int:
    """Run the command; 0 when nothing is wrong, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="zigflow.tools verify-shards", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of shards, or folders of such folders")
    parser.add_argument("--no-decode", action="store_true", help="check hashes and offsets only")
    parser.add_argument("--max-errors", type=int, default=1000, help="stop after this many (1000)")
    args = parser.parse_args(argv)
    if args.max_errors < 1:
        raise ValueError(f"--max-errors must be at least 1, got {args.max_errors}")
    found = 0
    for folder in _folders(args.folders):
        errors = verify_folder(folder, not args.no_decode, args.max_errors - found)
        found += len(errors)
        for error in errors:
            print(f"DAMAGED {folder}: {error}")
        if found >= args.max_errors:
            print(f"stopped after {found} errors")
            break
    print(f"{found} errors" if found else "all shards are sound")
    return 1 if found else 0


def verify_folder(folder: Path, decode_members: bool = True, max_errors: int = 1000) -> list[ShardError]:
    """Check one folder and print a line per sound shard; at most ``max_errors`` errors are returned."""
    check = _Check(folder, decode_members, max_errors)
    with contextlib.suppress(BudgetError):
        check.run()
    return check.budget.errors


class _Check:
    """The problems of one folder so far."""

    def __init__(self, folder: Path, decode_members: bool, max_errors: int):
        self.folder, self.decode_members = folder, decode_members
        self.budget = Budget(max_errors, quiet=True)
        # What the first sound sample has, all must have: fields, and shapes of arrays.
        self.fields: frozenset[str] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, str] = {}
        # Labels run from 0 to this less 1; 0 where the index does not say it.
        self.num_classes = 0

    def run(self) -> None:
        """Check everything.

        Raises:
            BudgetError: there are more problems than are reported.
        """
        index = self._index()
        stated = index.meta.get("num_classes") if index else None
        self.num_classes = stated if isinstance(stated, int) else 0
        listed = {shard.name: shard for shard in index.shards} if index else {}
        tars = {path.name: path for path in self.folder.glob("*.tar")}
        for name in sorted(listed.keys() | tars.keys()):
            before = len(self.budget.errors)
            members = 0
            if name not in tars or not tars[name].is_file():
                self.budget.report(
                    ShardError(f"{self.folder / name} is missing; {INDEX_NAME} lists it", name)
                )
                continue
            if index and name not in listed:
                self.budget.report(ShardError(f"{INDEX_NAME} does not list this tar", name))
            with tars[name].open("rb") as file:
                for count in self._shard(file.fileno(), name, listed.get(name)):
                    members += count
            if len(self.budget.errors) == before:
                print(f"{tars[name]}: {members} members, all sound")

    def _index(self) -> FolderIndex | None:
        if (self.folder / UNFINISHED_NAME).exists() and not (self.folder / INDEX_NAME).exists():
            self.budget.report(ShardError(f"writing {self.folder} was interrupted: make it again"))
        if not (self.folder / INDEX_NAME).is_file():
            return None
        try:
            index = load_folder_index(self.folder)
        except ShardError as error:
            self.budget.report(error)
            return None
        # The index of a foreign folder is a cache that is renewed: the tars alone count.
        return None if index.meta.get("origin") == "foreign" else index

    def _shard(self, fd: int, name: str, shard: Shard | None) -> Iterator[int]:
        """Yields the number of members of each sample that was looked at."""
        before, listed = len(self.budget.errors), None
        size = (self.folder / name).stat().st_size
        if shard is not None:
            try:
                listed = load_samples(self.folder / (name + MEMBER_SUFFIX), shard)
            except ShardError as error:
                self.budget.report(error)
            if size != shard.size:
                what = (
                    f"the tar has {size} bytes, its index says {shard.size}: it is truncated or was replaced"
                )
                lost = (s.key for s in listed or () if s.entries[-1].offset + s.entries[-1].size > size)
                self.budget.report(ShardError(what, name, min(size, shard.size), next(lost, "")))
        scanned = scan_open(fd, name, False, self.budget)
        if listed is not None and len(self.budget.errors) == before:
            self._compare(listed, scanned, name)
        # The list knows checksums, but a broken tar and its list need not agree.
        trusted = listed if listed is not None else scanned
        for sample in trusted:
            yield self._sample(fd, name, sample)
        # The members that are damaged say more than the hash of the whole: it is the last thing to report.
        whole = shard.sha256 if shard is not None and len(self.budget.errors) == before else None
        if whole and file_digest(self.folder / name) != whole:
            self.budget.report(ShardError("the tar does not have the hash of its index", name))

    def _compare(self, listed: Sequence[Sample], scanned: Sequence[Sample], name: str) -> None:
        """The tar's headers must place every member where the index does."""
        for ours, theirs in zip(listed, scanned, strict=False):
            places = [[(e.suffix, e.offset, e.size) for e in sample.entries] for sample in (ours, theirs)]
            if ours.key != theirs.key or places[0] != places[1]:
                what = f"the index lists {ours.key!r} {places[0]}, the tar has {theirs.key!r} {places[1]}"
                self.budget.report(ShardError(what, name, theirs.entries[0].offset, ours.key))
        if len(listed) != len(scanned):
            what = f"the index lists {len(listed)} samples, the tar has {len(scanned)}"
            self.budget.report(ShardError(what, name))

    def _sample(self, fd: int, name: str, sample: Sample) -> int:
        first = sample.entries[0].offset if sample.entries else None
        other = self.keys.setdefault(sample.key, name)
        if other != name:
            self.budget.report(ShardError(f"the key is in {other} as well", name, first, sample.key))
        fields = frozenset(
            DEFAULT_RENAME[entry.suffix] for entry in sample.entries if entry.suffix in DEFAULT_RENAME
        )
        self.fields = fields if self.fields is None else self.fields
        missing = sorted(self.fields - fields)
        if missing:
            what = f"missing {', '.join(missing)}, which the first sample has"
            self.budget.report(ShardError(what, name, first, sample.key))
        for entry in sample.entries:
            try:
                data = read_members(fd, name, sample, {entry.suffix}, DEFAULT_LIMITS.max_bytes)[entry.suffix]
            except ShardError as error:
                self.budget.report(error)
                continue
            if not self.decode_members or entry.suffix.rsplit(".", 1)[-1] not in DECODERS:
                continue
            try:
                self._value(entry.suffix, decode(entry.suffix, data))
            except DecodeError as error:
                what = f"{entry.suffix}: {error}"
                self.budget.report(ShardError(what, name, entry.offset, sample.key))
        return len(sample.entries)

    def _value(self, suffix: str, value: Any) -> None:
        """Arrays of one suffix have one shape, apart from the number of captions; sizes of images may differ.

        Labels are among the classes that the index states.
        """
        number = isinstance(value, int) and DEFAULT_RENAME.get(suffix) == "labels"
        if number and 0 < self.num_classes <= value:
            raise DecodeError(
                f"label {value} is outside 0..{self.num_classes - 1}: {INDEX_NAME} states {self.num_classes} classes"
            )
        if not suffix.endswith("npy") or not isinstance(value, np.ndarray):
            return
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise DecodeError("values that are not finite")
        shape = value.shape[-2:] if DEFAULT_RENAME.get(suffix) == "tokens" else value.shape
        wanted = self.shapes.setdefault(suffix, shape)
        if shape != wanted:
            raise DecodeError(f"shape {shape}, the first sample has {wanted}")


def _folders(given: list[Path]) -> list[Path]:
    out: list[Path] = []
    for folder in given:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder")
        holds = (folder / INDEX_NAME).is_file() or any(folder.glob("*.tar"))
        inner = [] if holds else sorted({path.parent for path in folder.rglob("*.tar")})
        if not holds and not inner:
            raise FileNotFoundError(f"{folder} holds no shards")
        out += inner or [folder]
    return out
