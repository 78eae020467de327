"""What a run says while it runs: how far it is, and one JSON line per logged step."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from zigflow import files

__all__ = ["MetricsFile", "Progress", "read_metrics", "tracked"]

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
_BLOCK = 1 << 16


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with its ``step``.

    Args:
        path: appended to; created with its first line.
    """

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, and a torn last one: a resumed run writes them again.

        Reads from the end, so that its cost is what it drops and not the length of the run.
        """
        if self.path.exists():
            end = _end_of_step(self.path, step)
            if end != self.path.stat().st_size:
                files.truncate(self.path, end)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; a number that JSON cannot hold is written as its name in quotes."""
        files.append_line(self.path, json.dumps({key: _plain(value) for key, value in values.items()}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            log.warning("%s: skipped a torn line", path)
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _end_of_step(path: Path, step: int) -> int:
    """The byte after the last whole line of a step up to ``step``."""
    with open(path, "rb") as file:
        position, tail = file.seek(0, os.SEEK_END), b""
        while position:
            size = min(_BLOCK, position)
            position -= size
            file.seek(position)
            tail = file.read(size) + tail
            # What stands before the first newline may begin in the block before.
            first = tail.find(b"\n") + 1 if position else 0
            if position and not first:
                continue
            stop = len(tail)
            while stop > first:
                start = tail.rfind(b"\n", first, stop - 1) + 1 or first
                if _is_kept(tail[start:stop], step):
                    return position + stop
                stop = start
            tail = tail[:stop]
    return 0


def _is_kept(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return json.loads(line).get("step", 0) <= step
    except (ValueError, AttributeError, TypeError):
        return False


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_QUIET_SECONDS = 10.0
_LONG_SECONDS = 300.0


class Progress:
    """How far something is: a bar on a terminal, a line of the log now and then elsewhere.

    A line stands at the end, at every tenth of the way unless the last line is younger than ten seconds, and after
    five minutes without one.

    Args:
        total, start: units of the whole, and those that are done.
        shown: False shows nothing.
        unit: what is counted.
        terminal: whether there is one; by default whether stderr is.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        shown: bool | None = True,
        unit: str = "step",
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        shown = shown is None or shown
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar = (
            tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True) if shown and terminal else None
        )
        self._lines = shown and not terminal
        self._done, self._start, self._total, self._unit = start, start, total, unit
        self._clock, self._began = clock, clock()
        self._told = self._began

    def advance(self, text: str = "") -> None:
        """One unit more; ``text`` says how it stands."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._lines:
            self._tell(text)

    def _tell(self, text: str) -> None:
        now = self._clock()
        since, tenths = now - self._told, 10 * self._done // max(self._total, 1)
        crossed = tenths > 10 * (self._done - 1) // max(self._total, 1)
        last = self._done >= self._total
        if not last and since < (_QUIET_SECONDS if crossed else _LONG_SECONDS):
            return
        self._told, spent = now, now - self._began
        left = spent / (self._done - self._start) * (self._total - self._done)
        times = f"{_clock_time(spent)} so far" + ("" if last else f", {_clock_time(left)} left")
        log.info(
            "%s %d of %d: %s", self._unit, self._done, self._total, f"{text}, {times}" if text else times
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def tracked(items: Sequence[ItemT], shown: bool | None = True, unit: str = "batch") -> Iterator[ItemT]:
    """The items one after another, with a :class:`Progress`."""
    progress = Progress(len(items), shown=shown, unit=unit)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.close()


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
