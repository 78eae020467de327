"""What the sources of published feature files share: files named by numbers, and the moments of latents in them."""

import hashlib
import os
import re
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .decode import DecodeError, Limits

# The largest published file, moments of 512 x 512 pixels, has 131,072 bytes and a header.
FEATURE_LIMITS = Limits(max_bytes=1 << 26)
_HASHED = 16


def read_bytes(path: Path, limits: Limits = FEATURE_LIMITS) -> bytes:
    """A file as it is.

    Raises:
        DecodeError: it is over budget, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise DecodeError(f"{path} cannot be read: {error}") from error
    if len(data) > limits.max_bytes:
        raise DecodeError(
            f"{path} has more than {limits.max_bytes} bytes, which is the budget of a feature file"
        )
    return data


def numbers_of(folder: Path, pattern: str) -> np.ndarray:
    """The numbers in the names that ``pattern`` matches whole, one column per group, sorted; (N, groups) int64.

    Raises:
        NotADirectoryError: ``folder`` is none.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    compiled, found = re.compile(pattern), array("q")
    with os.scandir(folder) as entries:
        for entry in entries:
            # A pipe or a folder of that name would not be read but waited for.
            if (match := compiled.fullmatch(entry.name)) and entry.is_file():
                found.extend(map(int, match.groups()))
    numbers = np.array(found, dtype=np.int64).reshape(-1, compiled.groups)
    return numbers[np.lexsort(numbers.T[::-1])]


def check_complete(numbers: np.ndarray, folder: Path, name: str) -> int:
    """How many there are, if they are 0, 1, 2, ... without a gap.

    Args:
        numbers: (N,) sorted, each once.
        name: what a file is called, with {} for its number.

    Raises:
        ValueError: there is none, or one is missing; it is named.
    """
    gaps = np.flatnonzero(numbers != np.arange(len(numbers)))
    if len(gaps) or not len(numbers):
        first = int(gaps[0]) if len(gaps) else 0
        raise ValueError(
            f"{folder} has no {name.format(first)}"
            + (
                f", but {len(numbers) - first} files of higher numbers: extraction or copying was cut"
                if len(gaps)
                else ""
            )
        )
    return len(numbers)


def fingerprint(paths: Iterable[Path], *facts: object) -> str:
    """A hash of the names and contents of some files and of plain facts."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in paths:
        digest.update(f"\n{path.name} ".encode() + hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()[:32]


def spread(count: int) -> list[int]:
    """Up to 16 of 0..count-1, the first and the last among them: whose files stand for all in a fingerprint.

    Files of one set have one size, and there are millions: neither names and sizes nor all contents would do.
    """
    return sorted({step * (count - 1) // (_HASHED - 1) for step in range(_HASHED)})


def to_moments(array: np.ndarray, shape: tuple[int, ...] | None = None) -> Tensor:
    """(2 C, h, w) float32, mean and log variance one behind the other.

    Args:
        shape: what it must be; None takes any.

    Raises:
        DecodeError: another rank, type or shape, or values that are not finite.
    """
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size or array.shape[0] % 2:
        raise DecodeError(
            "moments are floating-point numbers (2 C, h, w), mean and log variance, these are "
            f"{array.dtype} {array.shape}"
        )
    if shape is not None and array.shape != shape:
        raise DecodeError(f"moments of shape {array.shape}, those of the first sample have {shape}")
    return _finite("moments", array)


def to_tokens(array: np.ndarray, shape: tuple[int, ...] | None = None) -> Tensor:
    """(L, D) float32 text features.

    Raises:
        DecodeError: as :func:`to_moments`.
    """
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise DecodeError(
            f"text features are floating-point numbers (L, D), these are {array.dtype} {array.shape}"
        )
    if shape is not None and array.shape != shape:
        raise DecodeError(
            f"text features of shape {array.shape}, those of the empty text or the first one have {shape}"
        )
    return _finite("text features", array)


def _finite(name: str, array: np.ndarray) -> Tensor:
    numbers = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(numbers).all():
        raise DecodeError(f"{name} hold values that are not finite")
    return torch.from_numpy(numbers)
