"""Files that leave either the old state or the new one, never a part of it; the one place that publishes them.

A file is durable once it *and* the directory that names it are synced; a rename inside one directory is
atomic. Each operation announces itself through :func:`observed` before it happens, so that a test can stop
the world at any one of them.

A file with one writer is replaced under a fixed temporary name (:func:`replace_bytes`): a run that was cut leaves one
leftover at most, which the next write takes. Several processes may write the same file or folder through
:func:`replacing` and :func:`publishing_folder`.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zigflow.errors import ZigflowError

__all__ = [
    "DurableFile",
    "StorageError",
    "append_line",
    "file_digest",
    "locked",
    "make_dir",
    "observed",
    "operation",
    "publishing_folder",
    "read_at",
    "remove_tree",
    "rename",
    "replace_bytes",
    "replace_json",
    "replacing",
    "sync_dir",
    "truncate",
    "unlink",
    "write_bytes",
    "write_json",
]

OPERATIONS = ("mkdir", "open", "write", "fsync", "fsync_dir", "rename", "unlink", "rmdir", "truncate")
_CHUNK = 1 << 24
# How some network file systems answer that they sync no folders; a rename has happened by then.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

log = logging.getLogger(__name__)

_observers: list[Callable[[str, Path], None]] = []


@contextmanager
def observed(callback: Callable[[str, Path], None]) -> Iterator[None]:
    """Inside the ``with`` block, call ``callback(operation, path)`` before every operation of this process.

    ``operation`` is one of :data:`OPERATIONS`. What the callback raises is raised in place of the operation; an
    ``OSError`` as the system's would be.
    """
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


_AGAIN = "then give the same command again: it continues from what is complete"
_REMEDIES = {
    errno.ENOSPC: f"free space there, {_AGAIN}",
    errno.EDQUOT: f"free space there or raise the quota, {_AGAIN}",
    errno.EFBIG: f"raise the limit on file sizes (ulimit -f), {_AGAIN}",
    errno.EIO: f"check the disk or the connection to it, {_AGAIN}",
    errno.EROFS: "the file system is read-only: mount it writable, or choose another folder",
    errno.EACCES: "give yourself the right to write there, or choose another folder",
    errno.EPERM: "give yourself the right to write there, or choose another folder",
}


class StorageError(ZigflowError, OSError):
    """The system refused a file operation; says which file, why and what to do. Earlier checkpoints are intact."""

    def __init__(self, operation: str, path: Path, cause: OSError):
        super().__init__(cause.errno, cause.strerror or str(cause), str(path))
        remedy = _REMEDIES.get(cause.errno or 0, f"remove the cause, {_AGAIN}")
        self._made_of = (operation, path, OSError(self.errno, self.strerror))
        self._line = f"{operation} of {path} failed: {self.strerror}; {remedy}"

    def __reduce__(self) -> tuple:
        return type(self), self._made_of

    def __str__(self) -> str:
        return self._line


@contextmanager
def operation(name: str, path: Path) -> Iterator[None]:
    """Announce one operation on ``path``, then do it in the ``with`` block.

    Raises:
        StorageError: in place of an ``OSError`` of the block.
    """
    try:
        for callback in tuple(_observers):
            callback(name, path)
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(name, path, error) from error


class DurableFile:
    """A new file that counts and hashes what is written to it and is synced when the ``with`` block ends.

    Attributes:
        size: bytes written so far.
        sha256: hexadecimal digest of them.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.size = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "DurableFile":
        with operation("open", self.path):
            self._file = open(self.path, "wb", buffering=0)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``; a write that the system cuts short is continued."""
        if self._file is None:
            raise ValueError(f"{self.path} is not open; use DurableFile in a with block")
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(view):
            with operation("write", self.path):
                written = self._file.write(view[:_CHUNK]) or 0
            self._hash.update(view[:written])
            self.size += written
            view = view[written:]

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __exit__(self, kind: type | None, *_: object) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if kind is None:
                with operation("fsync", self.path):
                    os.fsync(file.fileno())
        finally:
            file.close()


def make_dir(path: Path) -> None:
    """Create one directory (its parent exists) and sync the parent; an existing directory is fine."""
    if path.is_dir():
        return
    with operation("mkdir", path):
        path.mkdir(exist_ok=True)
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Make the names inside a directory durable, where the system can."""
    with operation("fsync_dir", path):
        if os.name == "nt":
            return  # Windows opens no directories.
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
            log.debug("%s cannot be synced: %s", path, error)
        finally:
            os.close(handle)


def rename(source: Path, target: Path, *, durable: bool = True) -> None:
    """Atomically give ``source`` the name ``target`` (same directory).

    Args:
        durable: also wait until the name is on the disk.
    """
    with operation("rename", target):
        os.replace(source, target)
    if durable:
        sync_dir(target.parent)


def unlink(path: Path) -> None:
    """Remove one file; a missing one is fine."""
    with operation("unlink", path):
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it. Links are removed, never followed."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
        else:
            unlink(entry)
    with operation("rmdir", path):
        path.rmdir()


def write_bytes(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a new file piece by piece and sync it; return ``{"size": bytes, "sha256": digest}``."""
    with DurableFile(path) as file:
        for piece in pieces:
            file.write(piece)
    return {"size": file.size, "sha256": file.sha256}


def _json_bytes(value: object) -> bytes:
    # NaN is not JSON: a reader elsewhere would refuse the whole file.
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: object) -> dict[str, int | str]:
    """Write a new JSON file and sync it; return its size and digest."""
    return write_bytes(path, [_json_bytes(value)])


def replace_bytes(path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Give ``path`` new contents atomically: a reader sees the old file or the new one, never a part.

    Args:
        durable: also wait until both the contents and the name are on the disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    if durable:
        write_bytes(temporary, pieces)
        rename(temporary, path)
        return
    with operation("open", temporary):
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    with operation("write", temporary), open(handle, "wb") as file:
        for piece in pieces:
            file.write(piece)
    rename(temporary, path, durable=False)


def replace_json(path: Path, value: object) -> None:
    """:func:`replace_bytes` for a JSON value."""
    replace_bytes(path, [_json_bytes(value)])


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends well and vanishes otherwise."""
    with operation("open", path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            with operation("fsync", path):
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def publishing_folder(final: Path, marker: str) -> Iterator[Path]:
    """A new folder that becomes ``final`` in one rename when the block ends well.

    When another process has published ``final`` meanwhile (it holds ``marker``), the new folder is dropped:
    whoever comes first wins.

    Raises:
        FileExistsError: ``final`` is there without ``marker``: something else lives at that place.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        sync_dir(temporary)
        try:
            with operation("rename", final):
                os.rename(temporary, final)
        except OSError as error:
            if not (final / marker).is_file():
                raise FileExistsError(
                    f"{final} exists but holds no {marker}: move it away or choose another folder"
                ) from error
        sync_dir(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, line: str) -> None:
    """Append one line and hand it to the system; a torn last line is possible after a power cut."""
    with operation("open", path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    with operation("write", path), open(handle, "ab") as file:
        file.write(line.encode() + b"\n")


def truncate(path: Path, size: int) -> None:
    """Cut a file to its first ``size`` bytes."""
    with operation("truncate", path):
        os.truncate(path, size)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Up to ``size`` bytes at ``offset``; fewer only where the file ends."""
    pieces: list[bytes] = []
    while size > 0:
        if hasattr(os, "pread"):
            piece = os.pread(fd, size, offset)
        else:
            os.lseek(fd, offset, os.SEEK_SET)
            piece = os.read(fd, size)
        if not piece:
            break
        pieces.append(piece)
        size -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when its holder dies; without locks, go on unlocked.

    Whoever uses it must stay right without it (some network file systems have none): it saves work only.
    """
    fd = None
    try:
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except (ImportError, OSError):
        log.debug("%s cannot be locked", folder)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)
