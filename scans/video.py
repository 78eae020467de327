"""Factorized video schedules: words of ``s`` (within each frame) and ``t`` (along time at each pixel)."""

import itertools
from collections.abc import Sequence

from scans.path import ScanPath
from scans.schedule import ScanStep


def factorized_steps(
    word: str, depth: int, spatial: Sequence[ScanPath], t: int, official_temporal_reversal: bool = False
) -> tuple[ScanStep, ...]:
    """Steps of ``depth`` layers that repeat the letters of ``word``.

    The n-th ``s`` layer walks ``spatial[n mod len(spatial)]`` in every frame; the ``t`` layers go
    forwards and backwards in time by turns.

    Args:
        word: letters s and t, such as "sst".
        spatial: paths over a frame's h*w tokens.
        t: number of frames.
        official_temporal_reversal: undo the temporal layers as published by ZigMa, where the two lists
            are swapped, so that a layer's result is added to the residual reversed in time.

    Raises:
        ValueError: the word is empty or has other letters.
    """
    if not word or set(word) - {"s", "t"}:
        raise ValueError(f"a video word has the letters s (space) and t (time), such as 'sst'; got {word!r}")
    forwards = ScanPath.identity(t, shape=(t,), name="time")
    backwards = forwards.reversed()
    temporal = (forwards, backwards)
    # Both are their own inverse: swapping the two undo lists is giving each the other path.
    undone_by = temporal[::-1] if official_temporal_reversal else temporal
    space, time = itertools.count(), itertools.count()
    steps = []
    for letter in itertools.islice(itertools.cycle(word), depth):
        if letter == "s":
            steps.append(ScanStep(spatial[next(space) % len(spatial)], "frames"))
        else:
            turn = next(time) % 2
            steps.append(ScanStep(temporal[turn], "pixels", undone_by[turn]))
    return tuple(steps)
