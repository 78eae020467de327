"""Loaders: torch's DataLoader over a data source, in an order that is ours."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from zigflow import plugin_files
from zigflow.keyed import KeyedDraws

from .batch import Batch, collate
from .decode import DecodeError
from .global_batch import GlobalBatch, GlobalBatchSampler
from .order import DataOrder
from .source import DataSource
from .tar import BudgetError, ShardError

DEFAULT_TIMEOUT = 1800


class PositionDataset(Dataset):
    """Samples by global position; ``order=None`` takes a position as the index itself.

    Args:
        max_skipped: unreadable samples that may follow each other. One at position g is replaced by the sample at
            position g + 1, g + 2, ... of the order, but keeps g as its id: what is read stays a function of the
            position, whoever reads it.
        caption_seed: pick one caption of each sample, by a draw keyed by this seed and the position; None leaves
            all of them.
    """

    def __init__(
        self,
        source: DataSource,
        order: DataOrder | None = None,
        max_skipped: int = 0,
        caption_seed: int | None = None,
    ):
        if order is not None and order.num_samples != len(source):
            raise ValueError(f"the order is over {order.num_samples} samples, the source has {len(source)}")
        self.source, self.order = source, order
        self.max_skipped, self.caption_seed = max_skipped, caption_seed

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        indices = positions if self.order is None else self.order.indices(positions).tolist()
        return [self._sample(*pair) for pair in zip(positions, indices, strict=True)]

    def _sample(self, position: int, index: int) -> Mapping[str, Any]:
        skipped: list[str] = []
        while True:
            try:
                sample = {**self.source[index], "id": position}
                break
            except BudgetError:
                raise
            except (ShardError, DecodeError) as error:
                if self.order is None or self.max_skipped == 0:
                    raise
                skipped.append(str(error))
                if len(skipped) > self.max_skipped:
                    raise BudgetError(
                        f"{len(skipped)} unreadable samples in a row, data.max_skipped is {self.max_skipped}; "
                        f"the last: {error}"
                    ) from error
                index = self.order.index(position + len(skipped))
        if self.caption_seed is not None:
            sample = pick_caption(sample, self.caption_seed)
        return {**sample, "skipped": skipped} if skipped else sample


def pick_caption(sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The sample with one of its captions: the draw that training makes of a batch that brings them all."""
    tokens, captions = sample.get("tokens"), sample.get("captions", ())
    out = dict(sample)
    if tokens is None or tokens.ndim != 3:
        return out
    draws = KeyedDraws(seed, torch.tensor([sample["id"]]))
    choice = int(draws.integers("train.caption", tokens.shape[0]))
    out["tokens"] = tokens[choice]
    if len(captions) == tokens.shape[0]:
        out["captions"] = (captions[choice],)
    return out


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
    max_skipped: int = 0,
    caption_seed: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> DataLoader[Batch]:
    """Batches of this rank, one per micro-step, from optimizer step ``start_step`` on.

    Order and content are the same for every number of workers, and the samples of step s the same for every
    world size and grad_accum. Starting at a step costs the same as starting at 0. Torch's global random state
    is not touched. A worker that dies, or delivers nothing for ``timeout`` seconds, is a RuntimeError.

    Args:
        max_skipped, caption_seed: see :class:`PositionDataset`.
    """
    sampler = GlobalBatchSampler(batch, start_step, stop_step)
    dataset = PositionDataset(source, order, max_skipped, caption_seed)
    return make_loader(dataset, sampler, num_workers, pin_memory, prefetch_factor, timeout)


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
    caption_seed: int | None = None,
) -> DataLoader[Batch]:
    """Each of the first ``num_samples`` samples exactly once over all ranks, in the order of the source.

    ``ids`` of the batches are the indices in the source.

    Args:
        caption_seed: see :class:`PositionDataset`; samples with different numbers of captions need one.
    """
    count = len(source) if num_samples is None else num_samples
    if count > len(source):
        raise ValueError(f"{count} samples were asked for, the source has {len(source)}")
    sampler = OncePerSample(count, batch_size, rank, world_size)
    dataset = PositionDataset(source, caption_seed=caption_seed)
    return make_loader(dataset, sampler, num_workers, pin_memory)


class _Loader(DataLoader):
    """Torch's loader; a worker that dies while it hands a batch over is said to have died."""

    def __iter__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        # At once, not at the first batch: a loader draws a seed when it starts.
        return _handed_over(super().__iter__())


def _handed_over(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except (EOFError, ConnectionError) as error:
        # Tensors come through a connection to the worker's own process, which torch does not watch.
        raise RuntimeError(
            "a data worker was killed or exited while it handed over a batch; a machine short of memory kills "
            "workers: lower data.num_workers"
        ) from error


def make_loader(
    dataset: Dataset,
    sampler: Sampler[list[int]] | None,
    num_workers: int,
    pin_memory: bool = False,
    prefetch_factor: int = 2,
    timeout: float = DEFAULT_TIMEOUT,
) -> DataLoader[Batch]:
    """Torch's loader with our choices; without a sampler, over a dataset that yields lists of samples."""
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    return _Loader(
        dataset,
        batch_sampler=sampler,
        batch_size=1 if sampler is not None else None,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        timeout=timeout if num_workers else 0,
        worker_init_fn=plugin_files.in_workers(),
        # The loader draws a seed for its workers: from here instead of torch's global generator, whose state
        # must not depend on how often a run was resumed.
        generator=torch.Generator().manual_seed(0),
    )
