"""Loaders: torch's DataLoader over a data source, in an order that is ours."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .batch import Batch, collate
from .global_batch import GlobalBatch, GlobalBatchSampler
from .order import DataOrder
from .source import DataSource


class PositionDataset(Dataset):
    """Samples by global position; ``order=None`` takes a position as the index itself."""

    def __init__(self, source: DataSource, order: DataOrder | None = None):
        if order is not None and order.num_samples != len(source):
            raise ValueError(f"the order is over {order.num_samples} samples, the source has {len(source)}")
        self.source, self.order = source, order

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        indices = positions if self.order is None else self.order.indices(positions).tolist()
        return [
            {**self.source[index], "id": position} for position, index in zip(positions, indices, strict=True)
        ]


def training_loader(
    source: DataSource,
    order: DataOrder,
    batch: GlobalBatch,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
) -> DataLoader[Batch]:
    """Batches of this rank, one per micro-step, from optimizer step ``start_step`` on.

    Order and content are the same for every number of workers, and the samples of step s the same for every
    world size and grad_accum. Starting at a step costs the same as starting at 0. Torch's global random state
    is not touched.
    """
    sampler = GlobalBatchSampler(batch, start_step, stop_step)
    return _loader(PositionDataset(source, order), sampler, num_workers, pin_memory, prefetch_factor)


class OncePerSample(Sampler[list[int]]):
    """Every index of 0..num_samples-1 on exactly one rank; the last batch may be smaller, a rank without."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if min(num_samples, batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"no part {rank} of {world_size} of {num_samples} samples in batches of {batch_size}"
            )
        self.num_samples, self.batch_size, self.rank, self.world_size = (
            num_samples,
            batch_size,
            rank,
            world_size,
        )

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.num_samples, self.world_size * self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.num_samples)))

    def __len__(self) -> int:
        return len(self._starts())


def evaluation_loader(
    source: DataSource,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_samples: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Each of the first ``num_samples`` samples exactly once over all ranks, in the order of the source.

    ``ids`` of the batches are the indices in the source.
    """
    count = len(source) if num_samples is None else num_samples
    if count > len(source):
        raise ValueError(f"{count} samples were asked for, the source has {len(source)}")
    sampler = OncePerSample(count, batch_size, rank, world_size)
    return _loader(PositionDataset(source), sampler, num_workers, pin_memory, 2)


def _loader(
    dataset: PositionDataset,
    sampler: Sampler[list[int]],
    num_workers: int,
    pin_memory: bool,
    prefetch_factor: int,
) -> DataLoader[Batch]:
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        # The loader draws a seed for its workers: from here instead of torch's global generator, whose state
        # must not depend on how often a run was resumed.
        generator=torch.Generator().manual_seed(0),
    )
