"""The fixed global batch and each process's part of it."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GlobalBatch:
    """Optimizer step s trains on the positions s * size .. (s + 1) * size - 1, whoever computes them.

    Micro-step m of rank r takes the (m * world_size + r)-th of ``grad_accum * world_size`` equal slices.

    Raises:
        ValueError: the sizes do not divide, with the numbers that would.
    """

    size: int
    world_size: int = 1
    rank: int = 0
    grad_accum: int = 1

    def __post_init__(self):
        if min(self.size, self.world_size, self.grad_accum) < 1:
            raise ValueError(
                f"global batch, world size and grad_accum must be at least 1, got {self.size}, "
                f"{self.world_size} and {self.grad_accum}"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in 0..{self.world_size - 1}, got {self.rank}")
        parts = self.world_size * self.grad_accum
        if self.size % parts:
            below = self.size // parts * parts
            near = " or ".join(str(n) for n in (below, below + parts) if n)
            raise ValueError(
                f"a global batch of {self.size} does not divide into {self.world_size} processes x "
                f"{self.grad_accum} micro-steps = {parts} parts; {near} would"
            )

    @classmethod
    def of(cls, local_size: int, grad_accum: int, world_size: int = 1, rank: int = 0) -> "GlobalBatch":
        """The batch of ``grad_accum`` micro-steps of ``local_size`` samples on every process."""
        return cls(local_size * grad_accum * world_size, world_size, rank, grad_accum)

    @property
    def local_size(self) -> int:
        """Samples of one micro-step on one process."""
        return self.size // (self.world_size * self.grad_accum)

    def positions(self, step: int, micro: int) -> range:
        """Global positions of this rank's micro-step."""
        if step < 0 or not 0 <= micro < self.grad_accum:
            raise ValueError(f"no micro-step {micro} of {self.grad_accum} in step {step}")
        start = step * self.size + (micro * self.world_size + self.rank) * self.local_size
        return range(start, start + self.local_size)


def split_global_batch(size: int, world_size: int, local_limit: int) -> tuple[int, int]:
    """Derive (local batch, grad_accum) for another world size, the local batch at most ``local_limit``.

    Raises:
        ValueError: ``size`` does not divide by ``world_size``, with the world sizes that work.
    """
    if min(size, world_size, local_limit) < 1:
        raise ValueError(f"sizes must be at least 1, got {size}, {world_size} and {local_limit}")
    if size % world_size:
        divisors = [n for n in range(1, min(size, 4096) + 1) if size % n == 0]
        near = sorted(divisors, key=lambda n: (abs(n - world_size), n))[:4]
        raise ValueError(
            f"the global batch of {size} does not divide by {world_size} processes; "
            f"world sizes that work: {', '.join(map(str, sorted(near)))}"
        )
    share = size // world_size
    local = max(n for n in range(1, min(share, local_limit) + 1) if share % n == 0)
    log.info(
        "global batch %d = %d processes x %d micro-steps x %d samples",
        size,
        world_size,
        share // local,
        local,
    )
    return local, share // local


class GlobalBatchSampler(Sampler[list[int]]):
    """This rank's positions, micro-step by micro-step, from ``start_step`` on, for ever or to ``stop_step``.

    Raises:
        ValueError: a step is negative or the range runs backwards.
    """

    def __init__(self, batch: GlobalBatch, start_step: int = 0, stop_step: int | None = None):
        if start_step < 0 or (stop_step is not None and stop_step < start_step):
            raise ValueError(f"steps must run from 0 upwards, got {start_step} to {stop_step}")
        self.batch, self.start_step, self.stop_step = batch, start_step, stop_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            for micro in range(self.batch.grad_accum):
                yield list(self.batch.positions(step, micro))
            step += 1

    def __len__(self) -> int:
        if self.stop_step is None:
            raise TypeError("a sampler without stop_step has no length")
        return (self.stop_step - self.start_step) * self.batch.grad_accum
