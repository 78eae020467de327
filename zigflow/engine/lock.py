"""One writer per run directory. Nothing heavy is imported here: a command asks before it loads torch."""

import errno
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from zigflow import files
from zigflow.errors import ZigflowError

if TYPE_CHECKING:
    from .ranks import Ranks

__all__ = ["Lock", "RunDirError", "refuse_second_writer", "remove_unused", "sole_writer"]

_held: "set[Lock]" = set()


class RunDirError(ZigflowError, RuntimeError):
    """The run directory cannot be used as asked; the message says why and what to do."""


class Lock:
    """An advisory lock on ``<folder>/lock``, freed by the system when the process dies.

    Args:
        another: what to choose in place of a folder that is taken.

    Raises:
        RunDirError: another process holds it (its pid is named), or the system has no locks of files.
        files.StorageError: the file cannot be made.
    """

    def __init__(self, folder: Path, another: str = "another run_dir"):
        fcntl, file = _fcntl(), folder / "lock"
        with files.operation("open", file):
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunDirError(f"{file} cannot be locked: {error}") from error
            raise _taken(folder, holder, another) from error
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            os.close(handle)
            raise files.StorageError("write", file, error) from error
        self._handle: int | None = handle
        _held.add(self)

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        _held.discard(self)


def _fcntl() -> ModuleType:
    try:
        import fcntl
    except ImportError:
        raise RunDirError(
            f"runs are guarded by the file locks of POSIX, which {sys.platform} does not have: "
            "use Linux, macOS, or the Windows Subsystem for Linux"
        ) from None
    return fcntl


def _holder(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"


def _taken(folder: Path, holder: str, another: str = "another run_dir") -> RunDirError:
    return RunDirError(
        f"{folder} is being written by another process ({holder}); stop it, or choose {another}"
    )


def _forget_locks() -> None:
    # A forked data worker that outlives its killed parent would hold the lock and block the resume.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def sole_writer(folder: Path, ranks: "Ranks", another: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made, for as long as the ``with`` block; all processes together.

    Raises:
        RunDirError: another process holds it.
        files.StorageError: the folder or the lock cannot be made.
    """
    lock = None
    try:
        with ranks.together(f"opening {folder}"):
            if ranks.is_main:
                with files.operation("mkdir", folder):
                    folder.mkdir(parents=True, exist_ok=True)
                lock = Lock(folder, another)
        yield
    finally:
        if lock is not None:
            # The file stays: one that is removed while another process opens it would be locked twice. It says nothing
            # of its writer any more, so that two runs of the same samples leave the same files.
            with suppress(OSError):
                os.truncate(folder / "lock", 0)
            lock.release()


def refuse_second_writer(folder: Path) -> None:
    """Look whether a run writes to ``folder`` now, changing nothing there.

    Raises:
        RunDirError: one does (its pid is named), or the system has no locks of files.
    """
    fcntl = _fcntl()
    try:
        handle = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        raise _taken(folder, _holder(handle)) from None
    finally:
        os.close(handle)


def remove_unused(folder: Path) -> bool:
    """Remove a directory that holds nothing but what Hydra writes when a command starts."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    hydra = folder / ".hydra"
    found = [path for path in folder.iterdir() if path != hydra]
    if hydra.is_dir():
        found += hydra.iterdir()
    known = r"(train|sample)(-\d+)?\.log|(config|hydra|overrides)\.yaml"
    if any(path.is_symlink() or not path.is_file() or not re.fullmatch(known, path.name) for path in found):
        return False
    files.remove_tree(folder)
    return True
