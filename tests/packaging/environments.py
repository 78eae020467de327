"""Empty virtual environments that see this environment's dependencies, but not this project."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command, cwd, env=None, check=True):
    """Run a command and return its result; a failure shows what it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**clean, **(env or {})}, capture_output=True, text=True
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def build_wheel(source: Path, target: Path) -> Path:
    """Build a wheel from a copy of ``source``, so that no build folder is left behind."""
    copy = target / "source"
    if source == ROOT:
        copy.mkdir(parents=True)
        for name in run(
            "git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=source
        ).stdout.splitlines():
            if not name.startswith("tests/") and (source / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, copy / name)
    else:
        shutil.copytree(source, copy)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, copy, cwd=target)
    return next(target.glob("*.whl"))


def empty_environment(folder: Path) -> Path:
    """A new virtual environment; a path file lends it our dependencies, whose own path files stay inert."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, wheel: Path) -> None:
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        wheel,
        cwd=wheel.parent,
    )
