"""Memory that a step gives back and the next one takes again."""

import ctypes
import logging
import os
import sys
from collections.abc import Mapping

__all__ = ["keep_freed_memory"]

log = logging.getLogger(__name__)

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Of one block. Larger ones go back, or a heap of mixed sizes could hold much more than was ever in use. The second is
# the most that some versions of glibc accept.
_LARGEST_KEPT = (1 << 28, 1 << 25)


def keep_freed_memory(environ: Mapping[str, str] | None = None) -> bool:
    """Let the C library keep what is freed, for the rest of the process.

    By default glibc hands every freed block of more than 32 MiB back to the kernel, smaller ones at the heap's end
    too, and the kernel clears each page again at its first use in the next step: a few percent of a training step on
    a CPU. With this, blocks up to 256 MiB stay: the process holds its peak, which a training comes back to in every
    step anyway.

    Args:
        environ: by default the process's own. Whoever set ``MALLOC_*`` or glibc's malloc tunables there has chosen.

    Returns:
        Whether anything was changed: with another C library nothing is.
    """
    environ = os.environ if environ is None else environ
    chosen = [name for name in environ if name.startswith("MALLOC_")]
    if chosen or "glibc.malloc." in environ.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    kept = next((size for size in _LARGEST_KEPT if library.mallopt(_MMAP_THRESHOLD, size)), None)
    if kept is None or not library.mallopt(_TRIM_THRESHOLD, -1):
        log.debug("the C library's malloc takes no thresholds: freed memory goes back to the kernel")
        return False
    return True
