"""Seeded random orders, the same on every machine and under every numpy version."""

import operator

import numpy as np

from scans.path import Order
from scans.registry import register_scan

_WORD = (1 << 64) - 1
_STRIDE = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014) on uint64 arrays, wrapping modulo 2**64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _shuffled(length: int, seed: int, index: int) -> Order:
    """A permutation that follows from (length, seed, index) alone: tokens sorted by a keyed hash.

    The hash is a bijection of 64-bit words at fixed key, so there are no ties.
    """
    key = _mix(np.array([seed & _WORD], dtype=np.uint64))
    key = _mix(key + np.array([index + 1], dtype=np.uint64) * _STRIDE)
    counters = np.arange(length, dtype=np.uint64) * _STRIDE
    return np.argsort(_mix(counters + key), kind="stable")


def _orders(length: int, seed: int, count: int) -> list[Order]:
    seed, count = operator.index(seed), operator.index(count)
    if count < 1:
        raise ValueError(f"random scans: count must be at least 1, got {count}")
    return [_shuffled(length, seed, index) for index in range(count)]


@register_scan("random")
def random(h: int, w: int, seed: int = 0, count: int = 8) -> list[Order]:
    """``count`` random permutations; path i follows from (seed, i, number of tokens) alone."""
    return _orders(h * w, seed, count)


@register_scan("random")
def joint_random(t: int, h: int, w: int, seed: int = 0, count: int = 8) -> list[Order]:
    """``count`` random permutations of all tokens of all frames."""
    return _orders(t * h * w, seed, count)
