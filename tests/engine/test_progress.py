"""How far a run is: a bar on a terminal, a line now and then in a log file."""

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zigflow.engine import log as logs
from zigflow.engine.log import Progress, tracked


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines_of(caplog, total, seconds, **options):
    """The lines of a run whose units take so many seconds each, and when they came."""
    caplog.clear()
    clock, times = Clock(), []
    with caplog.at_level(logging.INFO, logger=logs.__name__):
        progress = Progress(total, terminal=False, clock=clock, **options)
        for _ in range(total - options.get("start", 0)):
            clock.now += seconds
            before = len(caplog.records)
            progress.advance("loss 0.5")
            times += [clock.now] * (len(caplog.records) - before)
        progress.close()
    return [record.getMessage() for record in caplog.records], times


@pytest.mark.parametrize(
    "total, seconds", [(2200, 0.05), (8, 0.01), (400_000, 0.5), (50_000, 30.0), (1, 1000)]
)
def test_a_log_file_gets_a_line_now_and_then(total, seconds, caplog):
    if total > 100_000:
        total, seconds = total // 100, seconds * 100
    lines, times = lines_of(caplog, total, seconds)
    assert lines[-1].startswith(f"step {total} of {total}: loss 0.5, ") and lines[-1].endswith(" so far")
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert all(gap >= 10 for gap in gaps[:-1])
    # At most eleven lines, and those of five minutes without one.
    assert len(lines) <= 11 + total * seconds / 300
    # The demo's log held 92 KB of a bar.
    assert total != 2200 or sum(map(len, lines)) < 1000


def test_what_is_left_counts_from_where_this_process_started(caplog):
    lines, _ = lines_of(caplog, 100, 20.0, start=50)
    assert lines[0] == "step 60 of 100: loss 0.5, 3:20 so far, 13:20 left"
    assert lines[-1] == "step 100 of 100: loss 0.5, 16:40 so far"


@given(st.integers(1, 50), st.booleans(), st.booleans())
def test_items_come_as_they_are(count, shown, terminal):
    assert list(tracked(range(count), shown)) == list(range(count))
    progress = Progress(count, shown=False, terminal=terminal)
    progress.advance()
    progress.close()


def test_a_bar_stands_on_a_terminal_only(capsys, caplog):
    with caplog.at_level(logging.INFO, logger=logs.__name__):
        for terminal in (True, False):
            progress = Progress(3, terminal=terminal)
            for _ in range(3):
                progress.advance("loss 0.5")
            progress.close()
            bar = capsys.readouterr().err
            assert ("3/3" in bar) == terminal
            assert bool(caplog.records) != terminal
