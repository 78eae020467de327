"""C++ sources of the project, compiled on first use by the system's compiler, kept in a cache, bound with ctypes.

The name of a binary is a hash of everything that shapes it: sources, flags, the compiler and its version, the host,
its processor and its features. Another machine that shares the folder, an update of the compiler or of the project
therefore never meets a binary that is not its own. A binary is written under a temporary name and renamed, so that
processes that compile at once do not meet half a file.

Environment: ``CXX`` names the compiler, ``ZIGFLOW_CXXFLAGS`` adds flags, ``ZIGFLOW_CACHE`` names the cache folder
(else ``XDG_CACHE_HOME``/zigflow, else ~/.cache/zigflow).
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

HEADERS = Path(__file__).parent / "csrc"
# Not -ffast-math: it would break the compensated sums, and make inf and NaN undefined.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
)
# The first set that the compiler knows: ARM compilers say -mcpu, and some know neither.
_TARGETS = (("-march=native",), ("-mcpu=native",), ())
_ARGUMENTS = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
_log = logging.getLogger(__name__)
_logged: set[str] = set()


class NativeError(RuntimeError):
    """Why a source cannot be compiled or loaded on this machine."""


class NativeLibrary:
    """One C++ source as a shared library, compiled and loaded at the first ``load``.

    Args:
        source: the .cpp file; it may include the headers of ``dis_kernels/csrc``.
        defines: preprocessor constants.
    """

    def __init__(self, source: Path, defines: Mapping[str, int] | None = None):
        self.source = source
        self.defines = dict(defines or {})
        self._lock = threading.Lock()
        self._library: ctypes.CDLL | None = None
        self._reason: str | None = None

    def reason(self) -> str | None:
        """Why the library cannot be had here, or None once it is loaded. The first failure is logged and kept."""
        with self._lock:
            if self._library is None and self._reason is None:
                try:
                    self._library = self._obtain()
                except NativeError as error:
                    self._reason = str(error)
                    if self._reason not in _logged:
                        _logged.add(self._reason)
                        _log.warning("the compiled CPU kernels cannot run, 'torch' takes over: %s", error)
        return self._reason

    def load(self) -> ctypes.CDLL:
        """The library.

        Raises:
            NativeError: see ``reason``.
        """
        reason = self.reason()
        if self._library is None:
            raise NativeError(reason)
        return self._library

    def function(self, name: str) -> Callable[[bytes, bool, bool], int]:
        """``int64_t name(const void*, int64_t, int64_t)``; left to itself, ctypes would cut the result to 32 bits.

        Raises:
            NativeError: see ``reason``.
        """
        function = getattr(self.load(), name)
        if function.argtypes is None:
            function.restype, function.argtypes = ctypes.c_int64, _ARGUMENTS
        return function

    def plan(self) -> tuple[list[str], Path]:
        """The command that compiles the library, without its output, and the binary's path in the cache.

        Raises:
            NativeError: there is no compiler that runs.
        """
        command = compiler()
        flags = [
            *_FLAGS,
            *_target(tuple(command)),
            *shlex.split(os.environ.get("ZIGFLOW_CXXFLAGS", "")),
            *(f"-D{name}={value}" for name, value in self.defines.items()),
        ]
        path = cache_folder() / f"{self.source.stem}-{self._key(command, flags)}.so"
        return [*command, *flags, f"-I{HEADERS}", str(self.source)], path

    def _obtain(self) -> ctypes.CDLL:
        command, path = self.plan()
        try:
            if path.exists():
                _check_owner(path)
                try:
                    return ctypes.CDLL(str(path))
                except OSError:  # a damaged file is made anew
                    _log.info("%s cannot be loaded, compiling it again", path)
            _compile(command, path)
            return ctypes.CDLL(str(path))
        except OSError as error:
            # Without the file's name, which differs from kernel to kernel: one reason is logged once.
            reason = error.strerror or error
            raise NativeError(f"the kernel cache {path.parent} cannot be used: {reason}") from error

    def _key(self, command: Sequence[str], flags: Sequence[str]) -> str:
        digest = hashlib.sha256()
        sources = [self.source, *sorted(HEADERS.glob("*.h"))]
        words = [*command, compiler_version(tuple(command)), *flags, *host()]
        for word in (*words, *(path.read_text() for path in sources)):
            digest.update(word.encode() + b"\0")
        return digest.hexdigest()[:24]


def compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX``, else the first of c++, g++, clang++.

    Raises:
        NativeError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise NativeError(f"no C++ compiler: CXX = {' '.join(named)!r} is not found")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise NativeError("no C++ compiler: install g++ or clang++, or name one by CXX")


@cache
def compiler_version(command: tuple[str, ...]) -> str:
    """What the compiler says of itself.

    Raises:
        NativeError: it does not run.
    """
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the C++ compiler {' '.join(command)!r} does not run: {error}") from error
    if done.returncode != 0:
        raise NativeError(f"the C++ compiler {' '.join(command)!r} does not run: {done.stderr.strip()[:300]}")
    return done.stdout.strip()


@cache
def host() -> tuple[str, ...]:
    """What a binary depends on: host, architecture, C library, processor and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    processor = sorted({" ".join(line.split()) for line in lines if line.startswith(names)})
    return (platform.node(), platform.platform(), platform.processor(), *platform.libc_ver(), *processor)


def cache_folder() -> Path:
    """Where the binaries lie; the folder need not exist."""
    named = os.environ.get("ZIGFLOW_CACHE")
    if named:
        return Path(named).expanduser() / "native"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "zigflow" / "native"


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's data, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_in_one_piece(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension lies in one piece, else a contiguous copy."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


@cache
def parallel_address() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch uses, or 0: then kernels run on one thread.

    The kernels share torch's pool of threads instead of bringing a second one.
    """
    loaded_only = getattr(os, "RTLD_NOLOAD", 0) | os.RTLD_LAZY
    for name in ("libgomp.so.1", "libiomp5.so", "libomp.so.5", "libomp.so"):
        try:
            return _address(ctypes.CDLL(name, mode=loaded_only))
        except (OSError, AttributeError):
            continue
    return 0


def _address(library: ctypes.CDLL) -> int:
    return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0


@cache
def _target(command: tuple[str, ...]) -> tuple[str, ...]:
    for flags in _TARGETS:
        done = _run([*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull])
        if done.returncode == 0:
            return flags
    return ()


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(handle)
    try:
        done = _run([*command, "-o", temporary])
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NativeError(f"{command[0]} cannot compile {path.stem}: {' '.join(lines[:1])[:300]}")
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # Whatever mask the linker wrote it under: what others can write is refused when it is loaded.
        os.chmod(temporary, 0o700)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the C++ compiler {command[0]!r} does not run: {error}") from error


def _check_owner(path: Path) -> None:
    status = path.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise NativeError(f"{path} belongs to another user or can be written by one: remove it")
