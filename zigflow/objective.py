"""The one number of a run, for a sweeper that looks for better ones.

A job of ``--multirun`` returns it: ``loop.objective``, or by default what the evaluation's metric tells better sets by
(``frechet``, ``fid``), or the training loss of a run that is not evaluated.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zigflow.registry import near_names
from zigflow.settings import Settings, SettingsError

__all__ = ["LOGGED", "check_objective", "objective_of"]

log = logging.getLogger(__name__)

# Numbers of metrics.jsonl that every training run has.
LOGGED = ("loss", "grad_norm", "images_per_second", "memory_gib")


def check_objective(settings: Settings) -> None:
    """Before training: a number that only an evaluation makes needs one.

    Raises:
        SettingsError: there is none.
    """
    name = settings.loop.objective
    if name is None or name in LOGGED or settings.data.sample_fid_every:
        return
    raise SettingsError(
        f"loop.objective={name} is not one of {', '.join(LOGGED)}{_hint(name, LOGGED)}, and a number of the evaluation "
        "needs one: set data.sample_fid_every, or drop loop.objective"
    )


def objective_of(folder: Path, name: str | None) -> tuple[str, float] | None:
    """Name and value of the objective of a finished run (its directory) or of a folder of samples.

    Args:
        name: ``loop.objective``; None takes the default, which a folder without numbers does not have.

    Raises:
        SettingsError: there is no such number; near matches are named.
    """
    from zigflow.engine.log import read_metrics
    from zigflow.metrics.results import read_results

    numbers: dict[str, Any] = {}
    first: str | None = None
    lines = folder / "metrics.jsonl"
    if lines.is_file():
        rows = [row for row in read_metrics(lines) if "loss" in row]
        numbers |= {key: rows[-1][key] for key in LOGGED if rows and key in rows[-1]}
        first = "loss" if "loss" in numbers else None
    judged = [*sorted((folder / "eval").glob("step-*.json"))[-1:], *folder.glob("results.json")]
    for file in judged:
        metrics, protocol = read_results(file)
        numbers |= {key: value for key, value in metrics.items() if _is_number(value)}
        best_by = protocol.get("best_by")
        first = best_by[0] if best_by else first
    chosen = first if name is None else name
    if chosen is None:
        return None
    if chosen not in numbers:
        raise SettingsError(
            f"loop.objective={chosen} is no number of {folder}{_hint(chosen, numbers)}; known: "
            f"{', '.join(sorted(numbers)) or 'none'}"
        )
    # Of metrics.jsonl, where a number that JSON does not know stands as text.
    value = float(numbers[chosen])
    log.info("objective of this run: %s = %.6g", chosen, value)
    return chosen, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _hint(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = near_names(name, known, n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
