"""What a run says while it runs: a progress bar, and one JSON line per logged step."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import durable

__all__ = ["MetricsFile", "Progress", "read_metrics"]

log = logging.getLogger(__name__)

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
                durable.truncate(self.path, end)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line; a number that JSON cannot hold is written as its name in quotes."""
        durable.append_line(self.path, json.dumps({key: _plain(value) for key, value in values.items()}))


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


class Progress:
    """A progress bar over optimizer steps with loss, images per second and time left.

    Args:
        total, start: steps of the whole run, and those that are done.
        shown: None shows the bar on a terminal only.
    """

    def __init__(self, total: int, start: int, shown: bool | None):
        hidden = None if shown is None else not shown
        self._bar = tqdm(total=total, initial=start, disable=hidden, unit="step", dynamic_ncols=True)

    def advance(self, loss: float, images_per_second: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
