"""The numbers of a results file as a short table, those with a threshold first."""

from collections.abc import Mapping
from typing import Any

__all__ = ["table"]

_LONGEST = 14  # lines of numbers without a threshold


def table(metrics: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[str]:
    """Lines ``name  value  at least BOUND  passed``.

    Args:
        metrics: numbers by name, with ``passed_<name>`` for each that has a threshold, and ``passed``.
        protocol: with ``thresholds`` where there are any.

    Returns:
        A line for every threshold, and the verdict; without thresholds a line for every number, or for the first few.
    """
    bounds = protocol.get("thresholds") or {}
    judged = [name for name in bounds if name in metrics]
    numbers = [name for name, value in metrics.items() if _is_number(value)]
    width = max((len(name) for name in judged or numbers[:_LONGEST]), default=0)
    if not judged:
        lines = [f"{name.ljust(width)} {_text(metrics[name])}" for name in numbers[:_LONGEST]]
        more = len(numbers) - _LONGEST
        return [*lines, f"and {more} more"] if more > 0 else lines
    lines = []
    for name in judged:
        value, bound, passed = metrics[name], bounds[name], metrics.get(f"passed_{name}")
        least = (value >= bound) == bool(passed)
        verdict = "" if passed is None else "passed" if passed else "MISSED"
        lines.append(
            f"{name.ljust(width)} {_text(value)}  {'at least' if least else 'at most '} {bound:<8g} {verdict}"
        )
    missed = [name for name in judged if metrics.get(f"passed_{name}") is False]
    lines.append(
        f"passed: no, {len(missed)} of {len(judged)} thresholds are missed (metrics.thresholds sets others)"
        if missed
        else "passed: yes, every threshold is reached"
    )
    return [line.rstrip() for line in lines]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: float) -> str:
    return f"{value:10d}" if isinstance(value, int) else f"{value:10.4g}"
