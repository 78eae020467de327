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


def flipped(batch: Any, draws: Any) -> Any:
    """The batch with the pixels of some samples mirrored left to right, each by a keyed draw with probability 1/2.

    The frames of a video go together.

    Args:
        draws: keyed draws of the batch's samples.

    Raises:
        ValueError: the batch has no pixels; the latents of a mirrored image are not mirrored latents.
    """
    pixels: Tensor | None = batch.pixels
    if pixels is None:
        raise ValueError("random_flip mirrors pixels, and the batch holds none: set data.random_flip=false")
    turned_B = draws.uniform("train.flip") < 0.5
    turned = turned_B.reshape(-1, *(1,) * (pixels.ndim - 1)).to(pixels.device)
    return replace(batch, pixels=torch.where(turned, pixels.flip(-1), pixels))


def condition(batch: Any, has_text: bool, draws: Any) -> Any:
    """What a model is conditioned on.

    A batch may bring a finished ``condition``; else a text model gets the tokens, one caption of each sample
    picked by keyed draw when there are several, and any other model the labels.

    Args:
        has_text: the model reads text.
        draws: keyed draws of the batch's samples.

    Returns:
        Labels (B,), tokens (B, L, D), whatever ``batch.condition`` is, or None.

    Raises:
        ValueError: a text model and a batch without tokens.
    """
    ready = getattr(batch, "condition", None)
    if ready is not None:
        return ready
    if not has_text:
        return batch.labels
    tokens: Tensor | None = batch.tokens
    if tokens is None:
        raise ValueError(
            "the model reads text and the batch has no tokens; give the source a caption-feature key"
        )
    if tokens.ndim == 4:
        choice = draws.integers("train.caption", tokens.shape[1])
        tokens = tokens[torch.arange(tokens.shape[0], device=tokens.device), choice]
    return tokens
