"""Where the members of a tar lie, read from its headers alone.

Nothing is extracted. Names that leave the folder, links, devices and sparse files are refused, and every
error says which shard, at which offset, and which member. Formats: ustar, GNU long names, pax (POSIX.1-2001).
"""

import logging
import re
from collections.abc import Iterator
from typing import NamedTuple

from zigflow.errors import ZigflowError
from zigflow.files import read_at

log = logging.getLogger(__name__)

BLOCK = 512
_MAX_EXTENSION = 1 << 20
_MAX_NAME = 4096
_MAX_MEMBERS = 1_000_000
_TAIL_PIECE = 1 << 20
_SURROGATES = re.compile("[\ud800-\udfff]")
_UNWANTED = re.compile(r"[\\\x00-\x1f]")
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


class ShardError(ZigflowError, ValueError):
    """A shard, its index or one of its members is damaged, missing or refused.

    Attributes:
        shard: name of the tar.
        offset: byte in the tar, None where there is none.
        key: the sample, or the member's name, "" where unknown.
        what: the message without the place.
    """

    def __init__(self, message: str, shard: str = "", offset: int | None = None, key: str = ""):
        # Torch's DataLoader rebuilds an exception of a worker from its message alone.
        place = [f"shard {shard}"] if shard else []
        place += [f"offset {offset}"] if offset is not None else []
        place += [f"key {key!r}"] if key else []
        super().__init__(f"{', '.join(place)}: {message}" if place else message)
        self.shard, self.offset, self.key, self.what = shard, offset, key, message


class BudgetError(ShardError):
    """More problems than were allowed; never skipped."""


class Budget:
    """How many problems may be passed over: ``report`` logs and keeps so many and raises the next.

    Attributes:
        limit: problems allowed; 0 makes every problem an error.
        quiet: do not log.
        errors: those passed over so far.
    """

    def __init__(self, limit: int = 0, quiet: bool = False):
        self.limit, self.quiet = limit, quiet
        self.errors: list[ShardError] = []

    def report(self, error: ShardError) -> None:
        """Count a problem.

        Raises:
            ShardError: it itself, when none is allowed.
            BudgetError: it is one too many.
        """
        if self.limit == 0:
            raise error
        if len(self.errors) >= self.limit:
            raise BudgetError(f"{error}; {self.limit} problems were passed over before, no more are allowed")
        self.errors.append(error)
        if not self.quiet:
            log.warning("passed over: %s", error)


class Member(NamedTuple):
    """A regular file of a tar: its bytes are at ``offset`` .. ``offset + size``."""

    name: str
    offset: int
    size: int


def check_name(name: str) -> str:
    """A member's name without a leading "./".

    Raises:
        ValueError: the name is absolute, climbs with "..", or has characters that no data file needs.
    """
    while name.startswith("./"):
        name = name[2:]
    if len(name) > _MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters")
    if not name.isascii() and _SURROGATES.search(name):
        raise ValueError("a name that is not UTF-8")
    if not name or name.startswith("/") or (name[1:2] == ":" and name[0].isascii() and name[0].isalpha()):
        raise ValueError("an empty or absolute name")
    if _UNWANTED.search(name):
        raise ValueError("a name with a backslash or control characters")
    if ".." in name.split("/"):
        raise ValueError("a name that climbs out of its folder")
    return name


def split_name(name: str) -> tuple[str, str] | None:
    """(key, suffix) of a member: the base name is split at its first dot; the suffix is lower case.

    This is how webdataset groups members into samples. None for files without a suffix, for hidden ones and
    for anything called ``__name__``, which belong to no sample.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix or any(re.fullmatch("__.*__", part) for part in (stem, *folder.split("/"))):
        return None
    return f"{folder}{slash}{stem}", suffix.lower()


def scan_members(fd: int, shard: str, total: int, budget: Budget | None = None) -> Iterator[Member]:
    """The regular files of an open tar of ``total`` bytes, in their order; folders are passed over.

    Args:
        budget: problems that may be passed over, none by default. A refused member is left out; behind damage
            nothing more is read, since any bytes could be taken for a header there.

    Raises:
        ShardError: damage, a truncated end, or a member of a kind or name that is refused.
    """
    budget = budget or Budget()
    try:
        yield from _walk(fd, shard, total, budget)
    except BudgetError:
        raise
    except ShardError as error:
        budget.report(error)


def _walk(fd: int, shard: str, total: int, budget: Budget) -> Iterator[Member]:
    offset, long_name, pax = 0, "", {}
    members = 0
    while True:
        header = read_at(fd, BLOCK, offset)
        if len(header) < BLOCK:
            raise ShardError("the tar ends without its closing blocks: it is truncated", shard, offset)
        if not any(header):
            _check_tail(fd, shard, offset)
            return
        name, kind, size = _parse_header(header, shard, offset)
        begin = offset + BLOCK
        if kind in b"xgLK" and size > _MAX_EXTENSION:
            raise ShardError(f"an extended header of {size} bytes is refused", shard, offset, name)
        if kind == b"x":
            pax = _parse_pax(read_at(fd, size, begin), shard, offset)
        elif kind == b"L":
            long_name = read_at(fd, size, begin).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind not in b"gK":
            name = pax.get("path", long_name or name)
            if "size" in pax:
                if not re.fullmatch(r"[0-9]{1,18}", pax["size"]):
                    raise ShardError(
                        f"an extended header gives the size {pax['size'][:40]!r}", shard, offset, name
                    )
                size = int(pax["size"])
            pax, long_name = {}, ""
            members += 1
            if members > _MAX_MEMBERS:
                raise ShardError(f"more than {_MAX_MEMBERS} members are refused", shard, offset, _short(name))
            reason = _refusal(name, kind)
            if reason:
                budget.report(ShardError(f"{reason} is refused", shard, offset, _short(name)))
            if kind in b"12346" and kind:
                size = 0
            if begin + size > total:
                raise ShardError(
                    f"the member has {size} bytes, the tar ends after {max(total - begin, 0)} of them: "
                    "it is truncated",
                    shard,
                    begin,
                    name,
                )
            if not reason and kind != b"5":
                yield Member(check_name(name), begin, size)
        offset = begin + -(-size // BLOCK) * BLOCK


def _refusal(name: str, kind: bytes) -> str | None:
    """Why a member is refused; links and devices have no bytes, whatever size they state."""
    if kind in _REFUSED:
        return _REFUSED[kind]
    if kind not in (b"0", b"5", b"\0"):
        return f"a member of type {kind!r}"
    if kind == b"5":
        return None
    try:
        check_name(name)
    except ValueError as error:
        return str(error)
    return None


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."


def _parse_header(header: bytes, shard: str, offset: int) -> tuple[str, bytes, int]:
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    stored = header[148:156].strip(b" \0")
    computed = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if not re.fullmatch(rb"[0-7]+", stored) or int(stored, 8) != computed:
        raise ShardError("no tar header is here (wrong checksum): the shard is damaged", shard, offset)
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        name = f"{prefix}/{name}" if prefix else name
    field = header[124:136]
    if field[0] == 0x80:
        size = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0") or b"0"
        if not re.fullmatch(rb"[0-7]+", digits):
            raise ShardError(f"the size {field!r} is not octal", shard, offset, name)
        size = int(digits, 8)
    return name, header[156:157], size


def _parse_pax(data: bytes, shard: str, offset: int) -> dict[str, str]:
    """Records "length key=value newline" of an extended header."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = data[at:space] if space > 0 else b""
        if not re.fullmatch(rb"[0-9]{1,18}", length) or not space - at + 2 < int(length) <= len(data) - at:
            raise ShardError("a damaged extended header", shard, offset)
        body = data[space + 1 : at + int(length) - 1].decode("utf-8", "surrogateescape")
        name, equals, value = body.partition("=")
        if not equals or name.startswith("GNU.sparse"):
            raise ShardError(f"the extended header {name!r} is refused", shard, offset)
        records[name] = value
        at += int(length)
    return records


def _check_tail(fd: int, shard: str, offset: int) -> None:
    """Past the closing block there may be nothing but zeros: other bytes would be members nobody sees."""
    while piece := read_at(fd, _TAIL_PIECE, offset):
        if piece.count(0) != len(piece):
            raise ShardError("bytes follow the end of the archive: concatenated or damaged", shard, offset)
        offset += len(piece)
