"""Whether samples that stand together are of all classes, or sorted by them.

Labels of samples that stand together are held against what as many draws from all of them would show: sorted ones have
fewer classes. Where there are no labels, the class that a key names stands for one (``n01440764_18``, ``cat/17``).
"""

import logging
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .contents import keyed_sample

log = logging.getLogger(__name__)

# Of the classes that draws would show; mixed sets have 0.95 to 1.05, sorted ones rarely more than 0.6.
SORTED = 0.8
_SHARDS, _FROM_A_SHARD = 32, 16
_STRETCH = 64


def class_of_key(key: str) -> str | None:
    """The class that a key names: its folder, or what stands before its last number; None where it names none.

    Folders that are numbers are those of tars as a rule, not of classes.
    """
    folder, slash, base = key.rpartition("/")
    if slash:
        return None if folder.rpartition("/")[2].isdecimal() else folder
    named = re.fullmatch(r"(.*[^\W_].*)[_-]\d+", base)
    return named[1] if named else None


def mixing(groups: Sequence[Sequence[Hashable]]) -> float | None:
    """Classes in each group over those that as many draws from all groups would show; None for a single class.

    Args:
        groups: labels of samples that stand together.
    """
    pool = Counter(label for group in groups for label in group)
    if len(pool) < 2:
        return None
    counts = np.array(list(pool.values()), dtype=np.float64)
    total, seen, expected = counts.sum(), 0.0, 0.0
    for group in groups:
        # A class of n is not among m draws of N with probability C(N - n, m) / C(N, m), a product of m factors.
        left = total - counts[:, None] - np.arange(len(group))
        missing = np.prod(np.maximum(left, 0) / (total - np.arange(len(group))), axis=1)
        expected += float((1 - missing).sum())
        seen += len(set(group))
    return seen / expected


def tell_sorted_shards(source: Any, shards_at_once: int, name: str) -> float | None:
    """Log one line where the shards of a source are sorted by class, with what to do if too few of them mix.

    Args:
        source: read only if it has ``class_of(index)``; up to 512 labels in 32 shards are.

    Returns:
        See :func:`mixing`; None where there is nothing to compare.
    """
    sizes = source.shard_sizes
    if len(sizes) < 2 or not hasattr(source, "class_of"):
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])
    groups = []
    for shard in keyed_sample(len(sizes), _SHARDS):
        labels = [
            source.class_of(int(starts[shard]) + row) for row in keyed_sample(sizes[shard], _FROM_A_SHARD)
        ]
        groups.append([label for label in labels if label is not None])
    found = mixing(groups)
    if found is None or found >= SORTED:
        return found
    shown = f"{name} is sorted by class: a shard shows {found:.0%} of the classes that a mixed one would"
    if shards_at_once >= len(sizes):
        log.info("%s; all %d shards mix, so training sees them mixed", shown, len(sizes))
    else:
        log.warning(
            "%s, and %d of %d shards mix: set data.shards_at_once=%d in a new run_dir, or write the set anew with "
            "make-shards", shown, shards_at_once, len(sizes), len(sizes),
        )  # fmt: skip
    return found


class StreamMixing:
    """Looks at the first samples of a stream, and says once where its buffer does not mix them.

    Args:
        buffer: samples that it mixes; after 2, 4, 8 and 16 times so many the labels so far are compared.
    """

    def __init__(self, buffer: int):
        self.buffer = buffer
        self._labels: list[Hashable] = []
        first = max(2 * buffer, 4 * _STRETCH)
        self._looks = [first << i for i in range(4)]

    def see(self, sample: dict[str, Any]) -> None:
        """Count a sample, in the order of the stream."""
        if not self._looks:
            return
        label = sample.get("labels")
        label = class_of_key(str(sample.get("key", ""))) if label is None else int(label)
        if label is None:
            self._looks = []
            return
        self._labels.append(label)
        if len(self._labels) < self._looks[0]:
            return
        self._looks.pop(0)
        starts = range(0, len(self._labels) - _STRETCH + 1, _STRETCH)
        found = mixing([self._labels[start : start + _STRETCH] for start in starts])
        if found is not None and found < SORTED:
            log.warning(
                "the stream is sorted by class: %d samples in a row show %.0f%% of the classes that mixed ones would; "
                "raise shuffle_buffer of data.source.stream (%d), write the shards in mixed order (make-shards), or "
                "read them from a local folder with data.order=indexed",
                _STRETCH, 100 * found, self.buffer,
            )  # fmt: skip
            self._looks = []
