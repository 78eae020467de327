"""Every module of the library is imported without the packages that only a part of it needs, and without POSIX."""

import subprocess
import sys

import pytest

from tests.architecture.test_layers import MODULES, OPTIONAL, ROOT

# Declared dependencies that a part alone needs, and modules of Python that Windows lacks.
AT_USE = {"torchdiffeq", "sklearn", "matplotlib", "psutil", "braceexpand", "s3fs"}
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt"}
WITHOUT_WINDOWS = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGKILL")

BLOCKED = """
import builtins, importlib, os, signal, sys

ours, blocked, modules = sys.argv[1].split(","), set(sys.argv[2].split(",")), sys.argv[3].split(",")
import accelerate, hydra, numpy, torch  # what they need themselves is theirs
for name in sys.argv[4].split(","):
    delattr(signal, name)
for name in ("register_at_fork", "fork", "O_CLOEXEC", "pwrite", "pread"):
    delattr(os, name)
real = builtins.__import__

def refusing(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if not level and importer.partition(".")[0] in ours and name.partition(".")[0] in blocked:
        raise ImportError(f"{importer} imports {name} when it is itself imported")
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = refusing
try:
    exec("import fcntl", {"__name__": "zigflow.mine"})
except ImportError as error:
    print(error)
for module in modules:
    importlib.import_module(module)
"""


@pytest.mark.slow
def test_every_module_is_imported_without_optional_packages_and_posix():
    ours = sorted({module.partition(".")[0] for module in MODULES})
    # Kernels in Triton's language are modules of their own, imported at use.
    modules = [m for m in sorted(MODULES) if not m.endswith((".triton_kernels", ".triton_backward"))]
    lists = [",".join(names) for names in (ours, sorted(OPTIONAL | AT_USE | POSIX), modules, WITHOUT_WINDOWS)]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *lists], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout == "zigflow.mine imports fcntl when it is itself imported\n"
