"""What every result says about the machine and the moment it was taken."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def circumstances(device: torch.device | str = "cpu", note: str = "") -> dict:
    """Command, commit (``+`` when files differ from it), hardware, threads, load, versions.

    Args:
        device: what was timed.
        note: what else the machine was doing.
    """
    return {
        "command": "python " + " ".join(sys.argv),
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "hardware": _hardware(torch.device(device)),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "note": note,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


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
