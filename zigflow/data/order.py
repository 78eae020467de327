"""The order in which training sees the samples, as a function instead of a state."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from zigflow.keyed import keyed_permutation

_VERSION = 1
_CACHED_WINDOWS = 4
# Samples that mix by default: ImageNet three times. A window takes 34 MB and 1.5 s in each process that reads.
WINDOW = 1 << 22


class Location(NamedTuple):
    """Where a position leads: the epoch, and the member of a shard."""

    epoch: int
    shard: int
    member: int


class DataOrder:
    """Which sample stands at global position g = 0, 1, 2, ... over all epochs.

    Epoch ``g // n`` permutes the shards, takes them ``shards_at_once`` at a time, and permutes all blocks of
    ``block_size`` consecutive members of such a window. Every sample comes exactly once per epoch; with
    blocks of one member and all shards in one window, the default up to 4,194,304 samples, the order is a uniform
    permutation, however the shards are sorted. Random access costs one permutation of a window, kept until others
    displace it: memory grows with a window, not with the set.

    Args:
        shard_sizes: samples per shard.
        seed: any integer; another seed is another order.
        shuffle: False keeps the order of the shards in every epoch.
        block_size: members that stay together, for storage on which sequential reads are faster.
        shards_at_once: shards whose samples mix; None for :func:`shards_that_mix`.

    Raises:
        ValueError: no samples at all, a negative size, or a block or window below 1.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        *,
        shuffle: bool = True,
        block_size: int = 1,
        shards_at_once: int | None = None,
    ):
        self.sizes = np.asarray(list(shard_sizes), dtype=np.int64)
        if self.sizes.ndim != 1 or (self.sizes < 0).any() or self.sizes.sum() < 1:
            raise ValueError(
                f"shard sizes must be >= 0 and add up to at least 1, got {list(shard_sizes)[:8]}"
            )
        if shards_at_once is None:
            shards_at_once = shards_that_mix(self.sizes)
        if block_size < 1 or shards_at_once < 1:
            raise ValueError(
                f"block_size and shards_at_once must be at least 1, got {block_size} and {shards_at_once}"
            )
        self.seed, self.shuffle = int(seed), bool(shuffle)
        self.block_size, self.shards_at_once = int(block_size), int(shards_at_once)
        self.num_samples = int(self.sizes.sum())
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict(), "_windows": OrderedDict()}

    def index(self, g: int) -> int:
        """The sample at position ``g``, numbered through the shards: shard 0's members first."""
        return int(self.indices(np.asarray([g], dtype=np.int64))[0])

    def locate(self, g: int) -> Location:
        """The sample at position ``g`` as (epoch, shard, member)."""
        index = self.index(g)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return Location(g // self.num_samples, shard, index - int(self._starts[shard]))

    def indices(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) positions to (n,) sample numbers, int64.

        Raises:
            ValueError: a position is negative.
        """
        g = np.asarray(positions, dtype=np.int64)
        if g.size and g.min() < 0:
            raise ValueError(f"positions must not be negative, got {g.min()}")
        epochs, within = np.divmod(g, self.num_samples)
        if not self.shuffle:
            return within
        out = np.empty_like(g)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            _, window_starts = self._epoch(int(epoch))
            windows = np.searchsorted(window_starts, within[rows], side="right") - 1
            for window in np.unique(windows):
                inside = rows[windows == window]
                out[inside] = self._window(int(epoch), int(window))[within[inside] - window_starts[window]]
        return out

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted shards and the position at which each window of them starts."""
        if epoch not in self._epochs:
            shards = keyed_permutation(len(self.sizes), self.seed, "shards", epoch)
            ends = np.cumsum(self.sizes[shards])
            last = (
                np.minimum(np.arange(self.shards_at_once, len(shards), self.shards_at_once), len(shards)) - 1
            )
            _keep(self._epochs, epoch, (shards, np.concatenate([[0], ends[last]]).astype(np.int64)), 2)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """The sample numbers of one window in their order."""
        key = (epoch, window)
        if key not in self._windows:
            shards = self._epoch(epoch)[0]
            shards = shards[window * self.shards_at_once : (window + 1) * self.shards_at_once]
            starts, lengths = [], []
            for shard in shards:
                begins = np.arange(0, int(self.sizes[shard]), self.block_size, dtype=np.int64)
                starts.append(self._starts[shard] + begins)
                lengths.append(np.minimum(self.block_size, self.sizes[shard] - begins))
            start, length = np.concatenate(starts), np.concatenate(lengths)
            blocks = keyed_permutation(len(start), self.seed, "blocks", epoch, window)
            start, length = start[blocks], length[blocks]
            before = np.cumsum(length) - length
            order = np.repeat(start - before, length) + np.arange(length.sum())
            _keep(self._windows, key, order, _CACHED_WINDOWS)
        self._windows.move_to_end(key)
        return self._windows[key]

    def identity(self) -> dict[str, Any]:
        """What the order depends on, for a checkpoint: plain JSON values."""
        return {
            "version": _VERSION,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "block_size": self.block_size,
            "shards_at_once": self.shards_at_once,
            "num_samples": self.num_samples,
            "shard_sizes": hashlib.sha256(self.sizes.astype("<i8").tobytes()).hexdigest()[:16],
        }


def shards_that_mix(shard_sizes: Sequence[int] | np.ndarray) -> int:
    """How many shards mix by default: all of them, or as many as hold 4,194,304 samples on average, at least 64."""
    shards, samples = len(shard_sizes), int(np.sum(shard_sizes))
    return shards if samples <= WINDOW else min(max(64, WINDOW * shards // samples), shards)


def _keep(cache: OrderedDict, key: Any, value: Any, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
