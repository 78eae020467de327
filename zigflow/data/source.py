"""What a data source is, and the check that a new one meets it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from .batch import SAMPLE_FIELDS


@runtime_checkable
class DataSource(Protocol):
    """A set of samples that can be read in any order.

    A sample is a dictionary with ``key`` (a string, unique in the source) and any of ``pixels`` ((C, H, W) or
    (T, C, H, W) float32 in [-1, 1]), ``latents`` (the same ranks, unscaled float32), ``moments`` (mean and log
    variance of latents, one behind the other: 2 C channels), ``labels`` (an integer),
    ``tokens`` ((L, D) or (N, L, D) float32) and ``captions`` (a tuple of texts). Reading the same index twice
    gives the same sample: random augmentation belongs to training, which keys it by the sample's position.

    Attributes:
        image_shape: shape of ``pixels``, or of the latents where there are no pixels.
        num_classes: number of labels, 0 for a source without.
        shard_sizes: samples per shard, in the order of the indices; one entry for a source without shards.
        fingerprint: a hash of what the indices refer to; training refuses to resume on another.
    """

    image_shape: tuple[int, ...]
    num_classes: int
    shard_sizes: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def check_source(source: DataSource, samples: int = 4) -> None:
    """Check the contract of :class:`DataSource` on the first, the last and some samples between them.

    Raises:
        ValueError: the first rule that is broken, with what was found.
        TypeError: an attribute or a method is missing.
    """
    if not isinstance(source, DataSource):
        members = ("image_shape", "num_classes", "shard_sizes", "fingerprint", "__len__", "__getitem__")
        missing = [name for name in members if not hasattr(source, name)]
        raise TypeError(f"{type(source).__name__} is no data source: it lacks {', '.join(missing)}")
    size = len(source)
    if size < 1 or sum(source.shard_sizes) != size:
        raise ValueError(f"{size} samples, but shard_sizes {source.shard_sizes} add up to something else")
    if not isinstance(source.fingerprint, str) or not source.fingerprint:
        raise ValueError(f"fingerprint must be a non-empty string, got {source.fingerprint!r}")
    for bad in (-1, size):
        try:
            source[bad]
        except IndexError:
            continue
        raise ValueError(f"index {bad} of {size} samples must raise IndexError")
    keys: dict[str, int] = {}
    for step in range(samples):
        index = step * (size - 1) // max(samples - 1, 1)
        sample, again = source[index], source[index]
        _check_sample(source, index, sample)
        for name, value in sample.items():
            same = (
                torch.equal(value, again[name]) if isinstance(value, torch.Tensor) else value == again[name]
            )
            if not same:
                raise ValueError(f"sample {index}: {name} differs between two reads")
        if keys.setdefault(sample["key"], index) != index:
            raise ValueError(f"samples {keys[sample['key']]} and {index} share the key {sample['key']!r}")


def _check_sample(source: DataSource, index: int, sample: Mapping[str, Any]) -> None:
    where = f"sample {index}"
    if not isinstance(sample.get("key"), str) or not sample["key"]:
        raise ValueError(f"{where} has no key")
    allowed = tuple(name for name in SAMPLE_FIELDS if name != "id")
    unknown = sorted(set(sample) - set(allowed))
    if unknown:
        raise ValueError(f"{where} has unknown fields {unknown}; known: {allowed}")
    if all(sample.get(name) is None for name in ("pixels", "latents", "moments")):
        raise ValueError(f"{where} has neither pixels nor latents, nor moments of latents")
    for name in ("pixels", "latents", "moments", "tokens"):
        value = sample.get(name)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            raise ValueError(
                f"{where}: {name} must be a float32 tensor, got {getattr(value, 'dtype', value)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{where}: {name} has values that are not finite")
    shape = image_shape(sample)
    if shape != tuple(source.image_shape):
        raise ValueError(f"{where} has shape {shape}, image_shape says {source.image_shape}")
    pixels = sample.get("pixels")
    if pixels is not None and (pixels.min() < -1 or pixels.max() > 1):
        raise ValueError(f"{where}: pixels lie in [{pixels.min():.3g}, {pixels.max():.3g}], allowed [-1, 1]")
    if source.num_classes and not 0 <= sample.get("labels", -1) < source.num_classes:
        raise ValueError(f"{where}: label {sample.get('labels')} outside 0..{source.num_classes - 1}")


def image_shape(sample: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a sample's pixels, or of its latents; moments hold two numbers for each of a latent."""
    if sample.get("pixels") is not None:
        return tuple(sample["pixels"].shape)
    if sample.get("latents") is not None:
        return tuple(sample["latents"].shape)
    *lead, channels, height, width = sample["moments"].shape
    return (*lead, channels // 2, height, width)
