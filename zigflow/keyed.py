"""Random numbers that are looked up, not streamed.

A draw follows from what it is for: ``(seed, purpose, id of the sample, step, element)``. Nothing else
enters, so a sample keeps its noise whatever batch, process, worker or restart it meets. The generator is
Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011); normals
come from the inverse normal distribution function (Wichura, algorithm AS 241 PPND16, Applied Statistics 37,
1988), written with operations whose rounding IEEE 754 fixes, so that every CPU and GPU returns the same bits.

Legend: B samples of a batch; a draw of shape S is (B, *S).
"""

import hashlib
import math
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "KeyedDraws",
    "checkpoint_contexts",
    "current_draws",
    "keyed_permutation",
    "keyed_seed",
    "philox4x32",
]

_WORD = 0xFFFFFFFF
_PIECE = 1 << 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# The normal transform touches every value about a hundred times: pieces of this size stay in a CPU's cache.
_CPU_PIECE = 1 << 15

_ambient: ContextVar["KeyedDraws | None"] = ContextVar("zigflow_draws", default=None)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """The ten-round Philox bijection on four 32-bit words.

    Args:
        counter: four words 0..2**32-1, as int64 tensors or int64 numpy arrays that broadcast together
            (words 1 and 3 may be plain integers).
        key: two words 0..2**32-1.

    Returns:
        Four int64 tensors (arrays) of words 0..2**32-1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap; shift and mask still yield the upper half of the unsigned product.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) & _WORD) ^ (c1 ^ k0)
        c2 = ((p0 >> 32) & _WORD) ^ (c3 ^ k1)
        c1 = p1 & _WORD
        c3 = p0 & _WORD
        k0 = (k0 + _KEY_INCREMENTS[0]) & _WORD
        k1 = (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def _hash(seed: int, *parts: object) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        if isinstance(part, bool) or not isinstance(part, (int, str, np.integer)):
            raise TypeError(f"a key is made of integers and strings, got {part!r} ({type(part).__name__})")
        tag = "s" if isinstance(part, str) else "i"
        text = f"{tag}{part}".encode()
        # The length before each part keeps ("ab", "c") apart from ("a", "bc").
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def _key_words(seed: int, *parts: object) -> tuple[int, int]:
    value = _hash(seed, *parts)
    return value & _WORD, value >> 32


def keyed_seed(seed: int, *keys: int | str) -> int:
    """A seed 0..2**63-1 for a generator that is not ours, a function of ``seed`` and ``keys`` alone."""
    return _hash(seed, "seed", *keys) >> 1


def keyed_permutation(n: int, seed: int, purpose: str, *keys: int | str) -> np.ndarray:
    """A permutation of 0..n-1, the same on every machine.

    Indices are sorted by 64-bit Philox words; the lower index goes first among equals.

    Returns:
        (n,) int64.

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"a permutation needs n >= 0, got {n}")
    key = _key_words(seed, "permutation", purpose, *keys)
    words = np.empty(n, dtype=np.uint64)
    # In pieces: the words in between would be several times the result.
    for first in range(0, n, _PIECE):
        index = np.arange(first, min(first + _PIECE, n), dtype=np.int64)
        w0, w1, _, _ = philox4x32((index & _WORD, 0, index >> 32, np.zeros_like(index)), key)
        words[first : first + len(index)] = w0.astype(np.uint64) | (w1.astype(np.uint64) << np.uint64(32))
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class KeyedDraws:
    """The random numbers of a batch of samples.

    Row b of every draw is a function of ``(seed, kind of draw, purpose, ids[b], step, element)``: it does not
    change with the batch size, the other rows, the device, or the trailing elements asked for. The elements
    of a draw are numbered in row-major order of its shape.

    Args:
        seed: any integer.
        ids: (B,) int64, 0 <= id < 2**63: a global sample position in training, the sample's number in
            sampling.
        step: 0..2**32-1, for draws that differ over the steps of a solver or of training.

    Raises:
        TypeError: ``ids`` is no (B,) int64 tensor, or ``step`` no integer.
        ValueError: an id is negative or ``step`` is out of range.
    """

    def __init__(self, seed: int, ids: Tensor, step: int = 0):
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
            given = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids must be an int64 tensor of shape (B,), got {given}")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        if ids.numel() and int(ids.min()) < 0:
            raise ValueError(f"ids must not be negative, got {int(ids.min())}")
        self._set(int(seed), ids, step)

    def _set(self, seed: int, ids: Tensor, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
            raise TypeError(f"step must be an integer, got {step!r}")
        if not 0 <= step <= _WORD:
            raise ValueError(f"step must lie in 0..2**32-1, got {step}")
        self.seed, self.ids, self.step = seed, ids, int(step)

    def _like(self, ids: Tensor, step: int) -> "KeyedDraws":
        # Checked once: looking at ids again would make the host wait for the device.
        other = object.__new__(KeyedDraws)
        other._set(self.seed, ids, step)
        return other

    def select(self, index: Any) -> "KeyedDraws":
        """A subset of the rows: ``index`` is whatever indexes a (B,) tensor and keeps it one-dimensional."""
        ids = self.ids[index]
        if ids.ndim != 1:
            raise ValueError(
                f"select needs an index that keeps rows (a slice, a mask, a list), got {index!r}"
            )
        return self._like(ids, self.step)

    def to(self, device: torch.device | str) -> "KeyedDraws":
        """The same draws made on ``device``; ids checked on the CPU before cost no wait there."""
        return self._like(self.ids.to(device, non_blocking=True), self.step)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __repr__(self) -> str:
        return f"KeyedDraws(seed={self.seed}, rows={len(self)}, step={self.step}, device={self.ids.device})"

    def active(self) -> AbstractContextManager["KeyedDraws"]:
        """Make these the draws that :func:`current_draws` returns inside the ``with`` block.

        The setting is local to the thread: a checkpointed block that autograd recomputes on a thread of its
        own needs :func:`checkpoint_contexts`.
        """
        return _Active(self)

    def uniform(self, purpose: str, shape: tuple[int, ...] = (), *, step: int | None = None) -> Tensor:
        """(B, *shape) float32 in [0, 1): multiples of 2**-24, one 32-bit word each."""
        words = self._words("uniform", purpose, math.prod(shape), step)
        values = (words >> 8).to(torch.float32) * 2.0**-24
        return values.reshape(len(self), *shape)

    def normal(self, purpose: str, shape: tuple[int, ...] = (), *, step: int | None = None) -> Tensor:
        """(B, *shape) float32 standard normals in (-6.4, 6.4), one 32-bit word each."""
        device = self.ids.device
        # Metal knows no float64: the transform runs on the CPU there and the values travel.
        source = self.to("cpu") if device.type == "mps" else self
        words = source._words("normal", purpose, math.prod(shape), step).reshape(-1)
        if words.device.type == "cpu" and words.numel() > _CPU_PIECE:
            values = torch.cat([_normal_from_words(piece) for piece in words.split(_CPU_PIECE)])
        else:
            values = _normal_from_words(words)
        return values.reshape(len(self), *shape).to(device)

    def integers(
        self, purpose: str, high: int, shape: tuple[int, ...] = (), *, step: int | None = None
    ) -> Tensor:
        """(B, *shape) int64 in [0, high), two words each; the bias of a value is below high / 2**64.

        Raises:
            ValueError: ``high`` is outside 1..2**31.
        """
        if not 1 <= high <= 2**31:
            raise ValueError(f"high must lie in 1..2**31, got {high}")
        words = self._words("integers", purpose, 2 * math.prod(shape), step)
        pairs = words.reshape(len(self), -1, 2) if words.numel() else words.new_empty(len(self), 0, 2)
        values = (pairs[..., 1] * high + ((pairs[..., 0] * high) >> 32)) >> 32
        return values.reshape(len(self), *shape)

    def _words(self, kind: str, purpose: str, count: int, step: int | None) -> Tensor:
        """(B, count) int64 words: element e is word e % 4 of block e // 4."""
        blocks = -(-count // 4)
        if blocks - 1 > _WORD:
            raise ValueError(f"one draw holds at most 2**34 words per sample, {count} were asked for")
        number = self.step if step is None else step
        if not 0 <= number <= _WORD:
            raise ValueError(f"step must lie in 0..2**32-1, got {number}")
        block = torch.arange(blocks, dtype=torch.int64, device=self.ids.device).unsqueeze(0)
        ids = self.ids.unsqueeze(1)
        # The kind is part of the key: a uniform and a normal of one purpose must not share their words.
        key = _key_words(self.seed, kind, purpose)
        words = torch.stack(philox4x32((block, int(number), ids & _WORD, ids >> 32), key), dim=-1)
        return words.reshape(len(self), blocks * 4)[:, :count]


class _Active(AbstractContextManager[KeyedDraws]):
    # No generator: backward passes over a retained graph enter the context of a checkpoint more than once.

    def __init__(self, draws: KeyedDraws):
        self._draws = draws
        self._tokens: list[Token] = []

    def __enter__(self) -> KeyedDraws:
        self._tokens.append(_ambient.set(self._draws))
        return self._draws

    def __exit__(self, *_: object) -> None:
        _ambient.reset(self._tokens.pop())


def current_draws() -> KeyedDraws | None:
    """The draws made ambient by :meth:`KeyedDraws.active` in this thread, or None."""
    return _ambient.get()


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint``: the recomputation sees the forward's draws.

    Autograd recomputes on a thread per device, in which nothing is ambient.
    """
    draws = current_draws()
    return nullcontext(), nullcontext() if draws is None else draws.active()


# AS 241, PPND16. Two of its three regions are enough: the smallest tail that one word expresses is 2**-33,
# and sqrt(33 ln 2) = 4.78 lies below 5, where the third begins.
_CENTER_TOP = (
    3.3871328727963666080e0,
    1.3314166789178437745e2,
    1.9715909503065514427e3,
    1.3731693765509461125e4,
    4.5921953931549871457e4,
    6.7265770927008700853e4,
    3.3430575583588128105e4,
    2.5090809287301226727e3,
)
_CENTER_BOTTOM = (
    1.0,
    4.2313330701600911252e1,
    6.8718700749205790830e2,
    5.3941960214247511077e3,
    2.1213794301586595867e4,
    3.9307895800092710610e4,
    2.8729085735721942674e4,
    5.2264952788528545610e3,
)
_TAIL_TOP = (
    1.42343711074968357734e0,
    4.63033784615654529590e0,
    5.76949722146069140550e0,
    3.64784832476320460504e0,
    1.27045825245236838258e0,
    2.41780725177450611770e-1,
    2.27238449892691845833e-2,
    7.74545014278341407640e-4,
)
_TAIL_BOTTOM = (
    1.0,
    2.05319162663775882187e0,
    1.67638483018380384940e0,
    6.89767334985100004550e-1,
    1.48103976427480074590e-1,
    1.51986665636164571966e-2,
    5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)
_LN2 = 0.6931471805599453094
_SQRT_HALF = 0.7071067811865475244
# log(m) = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172: twelve odd terms leave less than 1e-18.
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(12))


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    # One rounding per operation: a fused multiply-add would round differently on some devices.
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value.mul_(x).add_(coefficient)
    return value


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64 values, the same bits on every device."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    exponent = (exponent - low.to(exponent.dtype)).to(x.dtype)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return exponent * _LN2 + s * 2.0 * _horner(s * s, _ATANH)


def _inverse_normal_cdf(words: Tensor) -> Tensor:
    """(n,) words to (n,) float64: the quantile of u = (word + 1/2) / 2**32."""
    u = (words.to(torch.float64) + 0.5) * 2.0**-32
    q = u - 0.5
    r = 0.180625 - q * q
    center = q * _horner(r, _CENTER_TOP) / _horner(r, _CENTER_BOTTOM)
    tail = torch.sqrt(-_log(torch.minimum(u, 1.0 - u))) - 1.6
    outside = _horner(tail, _TAIL_TOP) / _horner(tail, _TAIL_BOTTOM)
    return torch.where(q.abs() <= 0.425, center, torch.where(q < 0, -outside, outside))


def _normal_from_words(words: Tensor) -> Tensor:
    return _inverse_normal_cdf(words).to(torch.float32)
