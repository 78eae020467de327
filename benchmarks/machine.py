"""What every result says about the machine and the moment it was taken, and how it is stored."""

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

# The profiler's library tells every start and stop on the standard error otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
ROOT = Path(__file__).resolve().parents[1]


class Report(dict):
    """A result that is stored as it comes, so that a run that stops keeps what it had measured.

        with Report(circumstances(), path) as report:
            report["rows"] = []
            for ...:
                report["rows"].append(...)
                report.save()

    The file is replaced as a whole, from the first ``save`` on, or when the block ends; a run that fails before leaves
    an older file alone. ``complete`` says whether the run came to its end, else ``stopped`` says why it did not.

    Args:
        start: what is known before anything is measured.
        path: the file, in a folder that is made; None prints only.
    """

    def __init__(self, start: dict, path: Path | None):
        super().__init__(start)
        self.path = path
        self.saved = False
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Report":
        return self

    def save(self) -> None:
        """Store what there is, marked as incomplete until the block ends."""
        self.saved = True
        self._write(complete=False, stopped="still running, or ended without a word")

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            print(self._write(complete=True))
        elif self.saved:
            self._write(complete=False, stopped=str(error) or kind.__name__)

    def _write(self, **state) -> str:
        text = json.dumps({**self, **state}, indent=2)
        if self.path:
            publish(self.path, text + "\n")
        return text


def publish(path: Path, text: str) -> None:
    """Write a file as a whole, or leave the one that is there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)


def chosen_device(asked: str | None) -> torch.device:
    """The device that ``--device`` names; without one, a GPU where there is one, else the CPU.

    Raises:
        SystemExit: this machine has no such device, or it is of a kind that the benchmarks do not time.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *["cuda"][:gpus], *(f"cuda:{index}" for index in range(gpus))]
    if asked is None:
        return torch.device("cuda" if gpus else "cpu")
    if asked not in there:
        lacking = "" if gpus else f", and torch {torch.__version__} finds no CUDA GPU with a driver"
        raise SystemExit(
            f"--device {asked}: there is {', '.join(there)}{lacking}; name one of these, or none"
        )
    return torch.device(asked)


def circumstances(device: torch.device | str = "cpu", note: str = "") -> dict:
    """Command, commit (``+`` when files differ from it), hardware, threads, load, versions.

    Args:
        device: what was timed.
        note: what else the machine was doing.
    """
    return {
        "command": shlex.join(["python", *map(_without_machine, sys.argv)]),
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "hardware": _hardware(torch.device(device)),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "note": note,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _without_machine(word: str) -> str:
    """A path of this machine as one of the project, or as its last part."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _git(*words):
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    model = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{(model or [platform.machine()])[0]}, {os.cpu_count()} cores visible"
