"""SIGTERM, SIGUSR1 and SIGINT (Ctrl-C): save and leave.

A signal may come in any of these windows:

=========  =======================================================================================================
building   before the processes have met: :class:`Stopped` is raised on the spot, there is nothing to save
waiting    until the first step of this process has ended (data, compilation, warm-up): a flag is set. The state is
           still that of the newest checkpoint, so when the step does not end within ``patience`` seconds, the
           process leaves at once; at Ctrl-C without that patience
holding    from then on: a flag is set, which all ranks read together after each step, between hooks, and inside a
           hook that asks; they save and leave. A save in progress ends first
=========  =======================================================================================================

Only the first signal counts: a second one does not disturb what the first one started. A second Ctrl-C is a person
who does not want to wait: the process leaves at once, whatever it does. Nothing heavy is imported here, so that the
handlers stand before torch is loaded.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from . import exits

__all__ = ["SIGNALS", "StopSignals", "Stopped", "stop"]

log = logging.getLogger(__name__)

# Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
_HANDLED = (*SIGNALS, signal.SIGINT)
# A launcher passes on the Ctrl-C that its processes may have from the terminal as well: one press, not two.
_SAME_PRESS = 2.0


class Stopped(BaseException):
    """The run left because a signal asked it to. No ``Exception``: nothing that handles errors may swallow it."""


def _leave_now(reason: str) -> None:
    exits.note.write(stop.code, reason)
    # No buffer: a handler may have come in the middle of a write to one.
    os.write(2, f"{reason}\n".encode())
    os._exit(stop.code)


class StopSignals:
    """The handlers of this process and what they have received.

    Args:
        patience: seconds that a first step, which may compile, has to end after a signal.
        leave: what ends the process then.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self, patience: float = 10.0, leave: Callable[[str], None] = _leave_now):
        self.patience, self._leave = patience, leave
        self.received: str | None = None
        self._window = "building"
        self._interrupted: float | None = None
        self._timer: threading.Timer | None = None

    @property
    def code(self) -> int:
        """The exit code of a process that leaves because of what it received."""
        return exits.INTERRUPTED if self.received == "SIGINT" else exits.STOPPED

    def install(self) -> None:
        """Take over the signals; does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                signal.signal(number, self._handle)

    def ignore(self) -> None:
        """From here on the process is leaving; a launcher that signals the rest must not change its exit code.

        A second Ctrl-C still ends it at once.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS if self.received == "SIGINT" else _HANDLED:
                signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """The handlers inside a ``with`` block, what was there before after it."""
        before = {number: signal.getsignal(number) for number in _HANDLED}
        self.install()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.reset()

    def reset(self) -> None:
        """Forget what was received; the window is ``building`` again."""
        self._cancel()
        self.received, self._window, self._interrupted = None, "building", None

    def build(self) -> None:
        """Begin the window in which a job is built; a sweep has several jobs in one process.

        Raises:
            Stopped: a signal came in an earlier job, and no later one begins.
        """
        self._cancel()
        self._window = "building"
        if self.received:
            raise Stopped(f"stopped by {self.received} before training began; there was nothing to save")

    def wait(self) -> None:
        """Begin the window in which a signal waits for the first step, but not for long."""
        self._window = "waiting"
        if self.received:
            self._wait_for_step()

    def hold(self) -> None:
        """Begin the window in which a signal waits for the next save."""
        self._window = "holding"
        self._cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self._is_pressed_again()
        if self.received is not None:
            if again:
                self.received = "SIGINT"
                self._leave(
                    "stopped by a second SIGINT: what was done since the newest checkpoint is not saved"
                )
            return
        self.received = signal.Signals(number).name
        if self._window == "building":
            raise Stopped(f"stopped by {self.received} before training began; there was nothing to save")
        if self._window == "waiting":
            self._wait_for_step()

    def _is_pressed_again(self) -> bool:
        now, before = time.monotonic(), self._interrupted
        if before is None:
            self._interrupted = now
            return False
        return "RANK" not in os.environ or now - before > _SAME_PRESS

    def _wait_for_step(self) -> None:
        if self.received == "SIGINT":
            self._leave("stopped by SIGINT before the first step had ended; there was nothing to save")
        else:
            self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(self.patience, self._out_of_patience)
            self._timer.daemon = True
            self._timer.start()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _out_of_patience(self) -> None:
        if self._window == "waiting":
            self._leave(
                f"stopped by {self.received}: the first step had not ended {self.patience:g} s later; "
                "nothing was trained since the newest checkpoint"
            )


stop = StopSignals()


def _default_handlers() -> None:
    # A forked data worker that kept the handlers could not be ended by its loader; one that died of the Ctrl-C that the
    # terminal sends to all would take the step with it that is still to be saved.
    for number in _HANDLED:
        if signal.getsignal(number) == stop._handle:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_default_handlers)
