"""How a process of a run left: its exit code, and the same in the run directory.

Launchers answer with codes of their own, so each rank writes ``exit/rank_0000.json`` with ``code``, ``reason``,
``step``, ``pid`` and ``time``. Nothing heavy is imported here: a process may leave before it has torch.
"""

import logging
import os
import time
from pathlib import Path

from zigflow import files

__all__ = ["DONE", "FAILED", "INTERRUPTED", "MISTAKE", "STOPPED", "ExitNote", "note"]

log = logging.getLogger(__name__)

DONE = 0
FAILED = 1
MISTAKE = 2
STOPPED = 75
"""Stopped by a signal, what was done is saved: EX_TEMPFAIL of sysexits.h, at which schedulers requeue a job."""
INTERRUPTED = 130
"""Stopped by Ctrl-C, what was done is saved; a second Ctrl-C leaves at once. As shells say it: 128 + SIGINT."""


class ExitNote:
    """Where this process writes how it left, once it may.

    Attributes:
        step: optimizer steps that the run has taken.
    """

    def __init__(self):
        self._run_dir: Path | None = None
        self._rank = 0
        self.step = 0

    @property
    def claimed(self) -> bool:
        return self._run_dir is not None

    def claim(self, run_dir: Path, rank: int) -> None:
        """The run directory is this run's: notes may be written there. Each rank removes its own earlier one."""
        self._run_dir, self._rank, self.step = Path(run_dir), rank, 0
        folder = self._run_dir / "exit"
        size = int(os.environ.get("WORLD_SIZE") or 1)
        for old in folder.glob("rank_*.json"):
            number = old.stem.removeprefix("rank_")
            # Never another rank's of this launch, which may have ended before this one began.
            if number.isdigit() and (int(number) == rank or (rank == 0 and int(number) >= size)):
                files.unlink(old)

    def release(self) -> None:
        self._run_dir = None

    def write(self, code: int, reason: str) -> None:
        """Write the note; a disk that is full must not hide why the run ends, so failing to is only logged."""
        if self._run_dir is None:
            return
        value = {
            "rank": self._rank,
            "code": code,
            "reason": reason,
            "step": self.step,
            "pid": os.getpid(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        folder = self._run_dir / "exit"
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            folder.mkdir(exist_ok=True)
            files.replace_json(folder / f"rank_{self._rank:04d}.json", value)
        except OSError as error:
            log.warning("the exit code %d of rank %d is not in %s: %s", code, self._rank, folder, error)


note = ExitNote()
