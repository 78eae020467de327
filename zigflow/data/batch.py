"""The batch that a loader hands to training and evaluation.

Legend: B samples, C channels, H x W pixels, T frames, N captions per sample, L tokens, D token width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TENSOR_FIELDS = ("pixels", "latents", "moments", "labels", "tokens")
SAMPLE_FIELDS = (*TENSOR_FIELDS, "captions", "key", "id")


@dataclass(frozen=True)
class Batch:
    """Samples side by side; what a source does not deliver is None.

    Attributes:
        pixels: (B, C, H, W) or (B, T, C, H, W) float32 in [-1, 1].
        latents: (B, C, H, W) or (B, T, C, H, W) float32, as the codec made them, not scaled.
        moments: (B, 2 C, H, W) or (B, T, 2 C, H, W) float32, mean and log variance of latents, from which the codec
            draws them.
        labels: (B,) int64.
        tokens: (B, L, D) or (B, N, L, D) float32 text features, N captions of which training picks one.
        ids: (B,) int64, global sample positions: they key the random draws of the samples.
        keys: B names of samples in the source.
        captions: B tuples of texts, empty when the source has none.
        skipped: what is wrong with the samples that others replace here, with their places.
    """

    pixels: Tensor | None
    latents: Tensor | None
    labels: Tensor | None
    tokens: Tensor | None
    ids: Tensor
    keys: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...] = ()
    skipped: tuple[str, ...] = ()
    moments: Tensor | None = None

    @property
    def size(self) -> int:
        return self.ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader when it pins memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: getattr(self, name) for name in (*TENSOR_FIELDS, "ids")}
        return replace(self, **{k: None if v is None else change(v) for k, v in tensors.items()})


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Stack samples of a source (see ``zigflow.data.source``), each with an ``id`` added by the loader.

    Raises:
        ValueError: no samples, an unknown field, or two samples whose fields or shapes differ; both named.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    skipped = tuple(message for sample in samples for message in sample.get("skipped", ()))
    samples = [{k: v for k, v in sample.items() if k != "skipped"} for sample in samples]
    first = samples[0]
    unknown = sorted(set(first) - set(SAMPLE_FIELDS))
    if unknown:
        raise ValueError(f"sample {first.get('key')!r} has unknown fields {unknown}; known: {SAMPLE_FIELDS}")
    for sample in samples[1:]:
        if set(sample) != set(first):
            raise ValueError(
                f"samples {first['key']!r} and {sample['key']!r} have different fields: "
                f"{sorted(first)} and {sorted(sample)}"
            )
    tensors: dict[str, Tensor | None] = {
        name: _stack(name, samples) if name in first else None for name in TENSOR_FIELDS
    }
    return Batch(
        **tensors,
        ids=torch.tensor([sample["id"] for sample in samples], dtype=torch.int64),
        keys=tuple(sample["key"] for sample in samples),
        captions=tuple(tuple(sample["captions"]) for sample in samples) if "captions" in first else (),
        skipped=skipped,
    )


def _stack(name: str, samples: Sequence[Mapping[str, Any]]) -> Tensor:
    if name == "labels":
        return torch.tensor([int(sample["labels"]) for sample in samples], dtype=torch.int64)
    shape = samples[0][name].shape
    for sample in samples[1:]:
        if sample[name].shape != shape:
            raise ValueError(
                f"{name} of samples {samples[0]['key']!r} and {sample['key']!r} differ in shape: "
                f"{tuple(shape)} and {tuple(sample[name].shape)}"
            )
    return torch.stack([sample[name] for sample in samples]).to(torch.float32)
