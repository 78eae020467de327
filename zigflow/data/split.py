"""Splitting a labelled set in two, the same way on every machine."""

import numpy as np

from zigflow.keyed import keyed_permutation


def stratified_split(labels: np.ndarray, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Put ``fraction`` of every class into the first part and the rest into the second.

    The first part has round(n * fraction) samples; classes whose share is no whole number get the odd sample by
    the largest remainder, the lower class first.

    Args:
        labels: (n,) integers.
        fraction: 0..1.
        seed: any integer; which samples of a class go where.

    Returns:
        Two ascending index arrays, int64, that together hold 0..n-1.

    Raises:
        ValueError: ``fraction`` is outside 0..1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the fraction must lie in 0..1, got {fraction}")
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    wanted = counts * fraction
    takes = np.floor(wanted).astype(np.int64)
    missing = int(np.floor(len(labels) * fraction + 0.5)) - int(takes.sum())
    for row in np.argsort(-(wanted - takes), kind="stable")[: max(missing, 0)]:
        takes[row] += 1
    first = np.zeros(len(labels), dtype=bool)
    for label, take in zip(classes, takes, strict=True):
        members = np.flatnonzero(labels == label)
        first[members[keyed_permutation(len(members), seed, "split", int(label))[:take]]] = True
    return np.flatnonzero(first), np.flatnonzero(~first)
