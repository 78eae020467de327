"""What a run says while it runs: a progress bar, and one JSON line per logged step."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import durable

__all__ = ["MetricsFile", "Progress", "read_metrics"]

log = logging.getLogger(__name__)


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with its ``step``.

    Args:
        path: appended to; created with its first line.
    """

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, and any torn line: a resumed run writes them again."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line.get("step", 0) <= step]
        durable.replace_bytes(self.path, [(json.dumps(line) + "\n").encode() for line in kept])

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
