"""A cycle of paths that goes up to the middle layer and back down, and layers walked with one gather between them.

A network with long skip connections that leaves its tokens in the order of the latest layer needs the layer that
saves and the layer that joins to have the same order: DiM's cycle is therefore mirrored over depth.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from scans.layout import TokenLayout
from scans.path import Order, ScanPath
from scans.schedule import ScanSchedule, ScanStep


def mirrored_schedule(
    layout: TokenLayout, paths: Sequence[ScanPath], depth: int, plain: int = 1
) -> ScanSchedule:
    """Layer i takes path min(i - plain + 1, depth - 1 - i) of the cycle ``paths``, at least 0; over all L' tokens.

    The first ``plain`` layers and the last one take path 0; with one, layers i and depth - 1 - i the same path.

    Args:
        layout: tokens before the body keep their place.
        paths: over the body.
        depth: layers, at least 1.
        plain: layers before the cycle begins to go up.

    Raises:
        ValueError: no paths, no layers, or a path that is not over the layout's body.
    """
    if not paths:
        raise ValueError("a mirrored schedule needs at least one path")
    steps = [ScanStep(layout.lift(path)) for path in paths]
    places = (max(min(i - plain + 1, depth - 1 - i), 0) for i in range(depth))
    chosen = tuple(steps[place % len(steps)] for place in places)
    return ScanSchedule(chosen, (1, 1, len(layout)))


class ComposedWalk(NamedTuple):
    """All gathers of a network whose tokens stay in the order of the layer that they have reached.

    With the raster tokens x (B, n, D) and the layout's table of learned tokens (E, D):
    ``y = torch.cat([x, table.expand(B, -1, -1)], 1)[:, enter]`` is what layer 0 reads,
    ``y[:, moves[i].order]`` what layer i + 1 reads of layer i's result, and ``y[:, leave]`` brings the raster tokens
    of the last layer's result back. ``homes[i]`` brings layer i's result to the order of the layout.
    """

    enter: Order
    moves: tuple[ScanPath, ...]
    leave: Order
    homes: tuple[ScanPath, ...]


def composed_walk(layout: TokenLayout, schedule: ScanSchedule) -> ComposedWalk:
    """The inverse of each layer's path and the path of the next one as one gather.

    Raises:
        ValueError: the schedule folds tokens into the batch, has branches, or is not over the L' tokens of the layout.
    """
    if schedule.branches or any(step.fold != "none" or len(step.path) != len(layout) for step in schedule):
        raise ValueError(
            f"layers compose when each walks all {len(layout)} tokens of the layout along one path; this schedule "
            "folds some of them, has parallel branches, or is over another number of tokens"
        )
    made: dict[tuple[ScanPath, ScanPath], ScanPath] = {}
    paths = [step.path for step in schedule]
    moves = []
    for pair in itertools.pairwise(paths):
        if pair not in made:
            made[pair] = pair[0].inverted().then(pair[1])
        moves.append(made[pair])
    homes = {step: step.path.inverted() for step in dict.fromkeys(schedule)}
    return ComposedWalk(
        enter=layout.source[paths[0].order],
        moves=tuple(moves),
        leave=paths[-1].inverse[layout.positions],
        homes=tuple(homes[step] for step in schedule),
    )
