"""The generator and the normal transform against published answers and an independent implementation."""

import numpy as np
import pytest
import scipy.special
import torch

from zigflow import keyed
from zigflow.keyed import philox4x32

ONES = 0xFFFFFFFF
# Random123's known answers for philox4x32, 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, want", KNOWN)
@pytest.mark.parametrize(
    "make", [lambda n: torch.tensor([n]), lambda n: np.array([n])], ids=["torch", "numpy"]
)
def test_known_answers(make, counter, key, want):
    got = philox4x32(tuple(make(word) for word in counter), key)
    assert tuple(int(word[0]) for word in got) == want


def python_philox(counter, key):
    """The definition in Python integers of any size."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & ONES, (p0 >> 32) ^ c[3] ^ k1, p0 & ONES]
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return tuple(c)


def test_against_python_integers():
    words = np.random.default_rng(0).integers(0, 2**32, size=(200, 6), dtype=np.int64)
    for row in words:
        counter, key = tuple(map(int, row[:4])), tuple(map(int, row[4:]))
        got = philox4x32(tuple(torch.tensor([n]) for n in counter), key)
        assert tuple(int(word[0]) for word in got) == python_philox(counter, key)


def test_normal_transform_is_the_quantile_function():
    rng = np.random.default_rng(1)
    edge = round(0.075 * 2**32)
    words = np.concatenate(
        [
            [0, 1, 2, ONES, ONES - 1, 2**31, 2**31 - 1],
            np.arange(edge - 500, edge + 500),
            ONES - np.arange(edge - 500, edge + 500),
            rng.integers(0, 2**32, 50_000),
            rng.integers(0, 2**12, 5_000),
            ONES - rng.integers(0, 2**12, 5_000),
        ]
    )
    got = keyed._inverse_normal_cdf(torch.from_numpy(words)).numpy()
    want = scipy.special.ndtri((words + 0.5) / 2.0**32)
    assert np.max(np.abs(got - want) / np.abs(want)) < 4e-15
    assert np.array_equal(got[:1], -keyed._inverse_normal_cdf(torch.tensor([ONES])).numpy())


def test_logarithm():
    x = np.concatenate([2.0 ** -np.arange(1, 34), np.random.default_rng(0).uniform(1e-9, 1, 10_000)])
    got = keyed._log(torch.from_numpy(x)).numpy()
    assert np.max(np.abs(got - np.log(x)) / np.abs(np.log(x))) < 4e-16 * 4


@pytest.mark.gpu
def test_gpu_returns_the_same_bits():
    ids = torch.arange(64) * 7919 + 2**40
    here = keyed.KeyedDraws(5, ids)
    there = here.to("cuda")
    for make in (
        lambda draws: draws.uniform("u", (33,)),
        lambda draws: draws.normal("n", (1000,)),
        lambda draws: draws.integers("i", 1000, (33,)),
    ):
        assert torch.equal(make(here), make(there).cpu())
