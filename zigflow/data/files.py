"""File operations that leave either the old state or the new one, never a part of it."""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)


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


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, where the system lets a folder be opened."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        # Some network file systems refuse to sync a folder; the rename itself has happened by then.
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


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


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends well and vanishes otherwise."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
        sync_folder(temporary)
        try:
            os.rename(temporary, final)
        except OSError as error:
            if not (final / marker).is_file():
                raise FileExistsError(
                    f"{final} exists but holds no {marker}: move it away or choose another folder"
                ) from error
        sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
