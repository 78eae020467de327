"""A bounded cache of whole shards on disk, filled by retries that continue where the last one stopped."""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zigflow.files import locked, rename

from .remote import PermanentError, TransientError, open_part, scheme_of, shown, unsigned
from .tar import ShardError

log = logging.getLogger(__name__)

_LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class FetchOptions:
    """How shards are fetched.

    Attributes:
        folder: the cache, shared by all processes and workers of a machine.
        cache_bytes: what it may hold, shards on their way included; the least recently used go first.
        max_shard_bytes: of one shard.
        timeout: seconds without a byte after which a connection has stalled.
        attempts: failures in a row, without a byte between them, after which a shard is given up.
        backoff: seconds before the second attempt, doubled from one to the next, at most 30.
        deadline: seconds for one shard, all attempts together.
        allow_pipe: run the command of a ``pipe:`` URL.
    """

    folder: Path
    cache_bytes: int = 32 << 30
    max_shard_bytes: int = 4 << 30
    timeout: float = 30.0
    attempts: int = 6
    backoff: float = 0.5
    deadline: float = 1500.0
    allow_pipe: bool = False

    def __post_init__(self):
        for name in ("cache_bytes", "max_shard_bytes", "timeout", "attempts", "deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(f"stream.{name} must be greater than 0, got {getattr(self, name)}")
        if self.backoff < 0:
            raise ValueError(f"stream.backoff must not be negative, got {self.backoff}")


class ShardCache:
    """Opens shards by URL; those that are not local files are fetched first."""

    def __init__(self, options: FetchOptions):
        self.options = options

    def open(self, url: str) -> int:
        """A file descriptor of the shard; it stays readable when the cache drops the file.

        Raises:
            ShardError: it cannot be fetched, or exceeds a limit.
            MissingPackageError: s3 without its package.
        """
        if scheme_of(url) == "file":
            try:
                return os.open(url.removeprefix("file://"), os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise ShardError(f"it cannot be opened: {error}", url) from error
        path = self._path(url)
        for _ in range(3):
            try:
                fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except FileNotFoundError:
                self._fetch(url, path)
                continue
            with contextlib.suppress(OSError):
                os.utime(path)
            return fd
        raise ShardError(
            "the cache loses it as soon as it is fetched: raise stream.cache_bytes "
            f"({self.options.cache_bytes})",
            shown(url),
        )

    def forget(self, url: str) -> bool:
        """Drop a shard that turned out damaged; whether it was one of the cache."""
        if scheme_of(url) == "file":
            return False
        self._path(url).unlink(missing_ok=True)
        return True

    def _path(self, url: str) -> Path:
        return self.options.folder / f"{hashlib.sha256(unsigned(url).encode()).hexdigest()[:40]}.tar"

    def _fetch(self, url: str, path: Path) -> None:
        self.options.folder.mkdir(parents=True, exist_ok=True)
        download = _Download(url, self)
        try:
            download.run()
            rename(Path(download.name), path, durable=False)
        except (PermanentError, TransientError) as error:
            raise ShardError(f"it cannot be fetched: {error}", shown(url), download.got or None) from error
        finally:
            download.close()

    def reserve(self, size: int) -> tuple[BinaryIO, str]:
        """A file of ``size`` bytes to download into, after making room for it.

        Raises:
            PermanentError: what is on its way already leaves no room.
        """
        options = self.options
        with locked(options.folder):
            parts = [path for path in options.folder.glob("*.part") if not _drop_stale(path)]
            used = sum(_size(path) for path in parts)
            shards = sorted(options.folder.glob("*.tar"), key=_last_use)
            sizes = {path: _size(path) for path in shards}
            used += sum(sizes.values())
            for path in shards:
                if used + size <= options.cache_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= sizes[path]
            if used + size > options.cache_bytes:
                raise PermanentError(
                    f"it needs {size} bytes beside {used} that others are fetching; the cache may hold "
                    f"stream.cache_bytes={options.cache_bytes}: raise it, or lower data.num_workers"
                )
            fd, name = tempfile.mkstemp(suffix=".part", dir=options.folder)
            _lock(fd)
            os.ftruncate(fd, size)
        return os.fdopen(fd, "wb"), name


class _Download:
    """One shard on its way."""

    def __init__(self, url: str, cache: ShardCache):
        self.url, self.cache, self.options = url, cache, cache.options
        self.file: BinaryIO | None = None
        self.name = ""
        self.got, self.total, self.tag = 0, None, ""
        self.end = time.monotonic() + self.options.deadline

    def run(self) -> None:
        failures = 0
        while True:
            before = self.got
            try:
                self._attempt()
                break
            except TransientError as error:
                failures = 1 if self.got > before else failures + 1
                if failures >= self.options.attempts:
                    raise TransientError(f"{error}; {failures} attempts in a row brought nothing") from None
                wait = min(self.options.backoff * 2 ** (failures - 1), _LONGEST_WAIT)
                log.info("%s: %s after %d bytes, again in %.1f s", shown(self.url), error, self.got, wait)
                self._check_time(wait)
                time.sleep(wait)
        assert self.file is not None
        self.file.flush()
        os.ftruncate(self.file.fileno(), self.got)

    def _attempt(self) -> None:
        options = self.options
        with open_part(self.url, self.got, self.tag, options.timeout, options.allow_pipe) as part:
            if part.total is not None and part.total > options.max_shard_bytes:
                raise PermanentError(
                    f"it has {part.total} bytes, stream.max_shard_bytes={options.max_shard_bytes}"
                )
            if self.file is None:
                self.file, self.name = self.cache.reserve(part.total or options.max_shard_bytes)
            elif part.total is not None and self.total is not None and part.total > self.total:
                raise PermanentError(f"it grew from {self.total} to {part.total} bytes while it was fetched")
            if part.start != self.got or (self.got and part.total != self.total):
                if part.start:
                    raise PermanentError("it changed while it was fetched")
                self.got = 0
                self.file.seek(0)
            self.total, self.tag = part.total, part.tag
            while piece := part.read():
                self._check_time(0)
                if self.got + len(piece) > (self.total or options.max_shard_bytes):
                    raise PermanentError(
                        f"it sends more than {self.total or options.max_shard_bytes} bytes"
                        + ("" if self.total else " (stream.max_shard_bytes)")
                    )
                try:
                    self.file.write(piece)
                except OSError as error:
                    raise PermanentError(f"the cache cannot be written: {error}") from error
                self.got += len(piece)
        if self.total is not None and self.got < self.total:
            raise TransientError(f"the connection ended after {self.got} of {self.total} bytes")

    def _check_time(self, wait: float) -> None:
        if time.monotonic() + wait > self.end:
            raise PermanentError(
                f"{self.got} bytes came within stream.deadline={self.options.deadline} s, not the whole"
            )

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            Path(self.name).unlink(missing_ok=True)


def _lock(fd: int) -> bool | None:
    """Mark a partial file as in use while it is open; False when it is elsewhere, None without locks."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _drop_stale(path: Path) -> bool:
    """Remove a partial file whose process is gone; whether it is gone now."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return True
    try:
        if not _lock(fd):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _last_use(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
