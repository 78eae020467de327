"""Experiment trackers: what a run logs, sent on to wandb, TensorBoard or whoever adapts their interface.

Only the main process tracks. A tracker that fails is told of once and switched off; it never stops a run. What a
tracker has to know when the run resumes (the id of its charts, the last step it got) stands in our checkpoint.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from zigflow.registry import Registry

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "TrackerKind", "Trackers", "flat_numbers", "register_tracker"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when it starts.

    Attributes:
        folder: the run directory.
        run_id: of the run, the same after a resume.
        config: the resolved configuration; it holds no secrets.
        step: optimizer steps done so far.
        stored: what this tracker's ``state()`` was in the checkpoint that the run continues, or empty.
    """

    folder: Path
    run_id: str
    config: Mapping[str, Any]
    step: int
    stored: Mapping[str, Any]


class Tracker(Protocol):
    """One service."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name."""
        ...

    def image(self, name: str, path: Path, step: int) -> None:
        """Take a picture, a PNG file."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain JSON values for our checkpoint."""
        ...

    def finish(self) -> None:
        """Send what is left."""
        ...


@dataclass(frozen=True)
class TrackerKind:
    """How a tracker is made.

    Attributes:
        make: makes it when the run starts.
        check: raises ImportError where a package that it needs is missing; asked before the first step.
    """

    make: Callable[[TrackedRun], Tracker]
    check: Callable[[], object]


def _needs_nothing() -> None:
    """The check of a tracker without a package of its own."""


TRACKERS: Registry[TrackerKind] = Registry("tracker")
"""What ``loop.trackers`` names."""


def register_tracker(
    name: str, check: Callable[[], object] = _needs_nothing
) -> Callable[[Callable[[TrackedRun], Tracker]], Callable[[TrackedRun], Tracker]]:
    """A decorator that registers a class or function of a :class:`TrackedRun` as ``loop.trackers=[NAME]``.

    Args:
        check: raises ImportError where a package that it needs is missing; asked before the first step.

    Raises:
        ValueError: the name is taken.
    """

    def add(make: Callable[[TrackedRun], Tracker]) -> Callable[[TrackedRun], Tracker]:
        TRACKERS.register(name, TrackerKind(make, check))
        return make

    return add


class Trackers:
    """All trackers of a run, as one.

    Args:
        makers: by name, each makes the tracker from the run when it starts.
    """

    def __init__(self, makers: Mapping[str, Callable[[TrackedRun], Tracker]] | None = None):
        self._makers = dict(makers or {})
        self._running: dict[str, Tracker] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._steps: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def start(
        self, folder: Path, run_id: str, config: Mapping[str, Any], step: int, states: Mapping[str, Any]
    ) -> None:
        """Start every tracker; ``states`` are those of the checkpoint that the run continues."""
        self._states = {name: dict(state) for name, state in states.items()}
        for name, make in self._makers.items():
            stored = self._states.get(name, {})
            self._steps[name] = int(stored.get("step", 0))

            def begin(make=make, stored=stored, name=name) -> None:
                self._running[name] = make(TrackedRun(folder, run_id, config, step, stored))

            self._guarded(name, begin)

    def log(self, values: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Send the numbers in ``values``; a nested mapping's names are joined by "/"."""
        numbers = flat_numbers(values, prefix)
        for name, tracker in list(self._running.items()):
            if self._guarded(name, lambda t=tracker: t.log(numbers, step)):
                self._steps[name] = max(self._steps[name], step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Send a picture."""
        for own, tracker in list(self._running.items()):
            self._guarded(own, lambda t=tracker: t.image(name, path, step))

    def states(self) -> dict[str, dict[str, Any]]:
        """By tracker, what has to stand in the checkpoint; a tracker that was switched off keeps its last."""
        for name, tracker in list(self._running.items()):
            self._guarded(
                name,
                lambda n=name, t=tracker: self._states.update({n: {**t.state(), "step": self._steps[n]}}),
            )
        return dict(self._states)

    def finish(self) -> None:
        """Send what is left; nothing is tracked afterwards."""
        for name, tracker in list(self._running.items()):
            self._guarded(name, tracker.finish)
        self._running = {}

    def _guarded(self, name: str, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as error:
            self._running.pop(name, None)
            log.warning("%s failed and is switched off, the run goes on: %s", name, _without_secrets(error))
            return False
        return True


def flat_numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among ``values`` (booleans as 0 and 1), nested names joined by "/"."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = float(value)
    return found


def _without_secrets(error: Exception, names: Sequence[str] = ("WANDB_API_KEY",)) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    for name in names:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, "***")
    return text
