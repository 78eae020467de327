"""Samples out of tar shards: images, videos, latents, labels and captions, in the layout of ZigMa and webdataset."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zigflow.data.decode import DEFAULT_LIMITS, DecodeError, Limits, decode, to_pixels
from zigflow.data.shards import ShardReader
from zigflow.data.tar import ShardError
from zigflow.registry import unknown_name

FIELDS = ("pixels", "latents", "labels", "tokens", "captions")
DEFAULT_RENAME = {
    "image.png": "pixels",
    "image.jpg": "pixels",
    "image.jpeg": "pixels",
    "png": "pixels",
    "jpg": "pixels",
    "jpeg": "pixels",
    "frames.npy": "pixels",
    "img_feature256.npy": "latents",
    "img_feature512.npy": "latents",
    "frame_feature256.npy": "latents",
    "latent.npy": "latents",
    "latent_hr.npy": "latents",
    "cls_id.cls": "labels",
    "cls": "labels",
    "caption.json": "captions",
    "txt": "captions",
    "caption_feature.npy": "tokens",
}


class ShardSource:
    """A folder of tars, read in place through its index (see ``zigflow.data.shards``).

    Args:
        root: the folder.
        rename: file suffix -> field of the batch (pixels, latents, labels, tokens, captions); of several suffixes
            for one field the first that a sample has is taken. None: the usual names, one per field.
        fields: the fields to read; None reads all that the first sample has.
        channels: 1 or 3, for encoded images.
        image_size: pixels of the shorter side after a center crop, or (height, width); None keeps the size.
        num_classes: number of labels; None takes it from the index, 0 where that does not say.
        cache_dir: where the index of a folder that is not ours is kept; None keeps it beside the tars.
        limits: budgets of one member.

    Raises:
        ValueError: ``rename`` or ``fields`` name unknown fields, or the first sample does not have them.
        ShardError: shards or index are damaged.
    """

    def __init__(
        self,
        root: str | Path,
        rename: Mapping[str, str] | None = None,
        *,
        fields: Sequence[str] | None = None,
        channels: int = 3,
        image_size: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        cache_dir: str | Path | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ):
        for field in [*(rename or {}).values(), *(fields or ())]:
            if field not in FIELDS:
                raise unknown_name("batch field", field, list(FIELDS))
        self.reader = ShardReader(root, cache_dir)
        self.channels, self.limits = channels, limits
        self.image_size = _pair(image_size)
        first = [entry.suffix for entry in self.reader.sample(0, 0).entries]
        self.suffixes = _choose(dict(rename) if rename is not None else None, fields, first)
        self.shard_sizes = self.reader.sizes
        meta = self.reader.index.meta
        self.class_names = tuple(meta.get("class_names", ()))
        self.num_classes = int(meta.get("num_classes", 0)) if num_classes is None else num_classes
        if "labels" not in self.suffixes:
            self.num_classes = 0
        options = f"{self.reader.fingerprint} {sorted(self.suffixes.items())} {channels} {self.image_size}"
        self.fingerprint = hashlib.sha256(options.encode()).hexdigest()[:32]
        self.image_shape: tuple[int, ...] | None = None
        self.image_shape = tuple(_image(self[0]).shape)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read sample ``index``.

        Raises:
            IndexError: there is none.
            ShardError: a member is missing, damaged, over budget, or has another shape than the first sample's.
        """
        shard, member = self.reader.split_index(index)
        present = {entry.suffix for entry in self.reader.sample(shard, member).entries}
        chosen: dict[str, str] = {}
        for field, suffixes in self.suffixes.items():
            found = [suffix for suffix in suffixes if suffix in present]
            if not found:
                raise self.reader.error(
                    shard, member, " or ".join(suffixes), f"missing ({field}); there are {sorted(present)}"
                )
            chosen[field] = found[0]
        key, data = self.reader.read(shard, member, set(chosen.values()))
        sample: dict[str, Any] = {"key": key}
        for field, suffix in chosen.items():
            try:
                sample[field] = self._field(field, decode(suffix, data[suffix], self.limits))
            except (DecodeError, TypeError, ValueError) as error:
                raise self.reader.error(shard, member, suffix, str(error)) from error
        return sample

    def _field(self, field: str, value: Any) -> Any:
        if field == "labels":
            if not isinstance(value, int) or (self.num_classes and value >= self.num_classes):
                raise DecodeError(f"label {value!r} is outside 0..{self.num_classes - 1}")
            return value
        if field == "captions":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise DecodeError("captions are a text or a list of texts")
            return tuple(texts)
        if not isinstance(value, np.ndarray):
            raise DecodeError(f"{field} need an image or an npy array")
        if field == "tokens":
            return _floats(value, field, (2, 3))
        if field == "latents":
            tensor = _floats(value, field, (3, 4))
        else:
            tensor = self._pixels(value)
        leads = "pixels" if "pixels" in self.suffixes else "latents"
        if field == leads and self.image_shape is not None and tuple(tensor.shape) != self.image_shape:
            raise DecodeError(
                f"shape {tuple(tensor.shape)}, the first sample has {self.image_shape}"
                + ("" if self.image_size else ": give image_size to crop and resize")
            )
        return tensor

    def _pixels(self, value: np.ndarray) -> torch.Tensor:
        if value.dtype != np.uint8:
            raise DecodeError(f"pixels are stored as 8-bit values, these are {value.dtype}")
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3):
            return to_pixels(value, self.channels, self.image_size)
        if value.ndim == 4:
            frames = [to_pixels(np.moveaxis(frame, 0, -1), self.channels, self.image_size) for frame in value]
            return torch.stack(frames)
        raise DecodeError(f"pixels are an image or (T, C, H, W), these are {value.shape}")


def _floats(value: np.ndarray, field: str, ranks: tuple[int, ...]) -> torch.Tensor:
    if value.ndim not in ranks:
        raise DecodeError(f"{field} have {' or '.join(map(str, ranks))} dimensions, got shape {value.shape}")
    numbers = value.astype(np.float32, copy=False)
    if not np.isfinite(numbers).all():
        raise DecodeError(f"{field} hold values that are not finite")
    return torch.from_numpy(numbers)


def _choose(
    rename: dict[str, str] | None, fields: Sequence[str] | None, first: list[str]
) -> dict[str, tuple[str, ...]]:
    """Field -> suffixes that may deliver it, for the fields wanted."""
    table: dict[str, list[str]] = {}
    for suffix, field in (DEFAULT_RENAME if rename is None else rename).items():
        table.setdefault(field, []).append(suffix.lower())
    out: dict[str, tuple[str, ...]] = {}
    for field, suffixes in table.items():
        present = [suffix for suffix in suffixes if suffix in first]
        if (fields is not None and field not in fields) or (rename is None and not present):
            continue
        if rename is None and len(present) > 1:
            raise ValueError(
                f"{field} can come from {' or '.join(present)}: say which with rename={{suffix: {field!r}}}"
            )
        if not present:
            raise ValueError(
                f"the first sample has no {' or '.join(suffixes)} ({field}); it has {sorted(first)}"
            )
        out[field] = tuple(suffixes if rename is not None else present)
    missing = sorted(set(fields or ()) - set(out))
    if missing or not {"pixels", "latents"} & set(out):
        raise ValueError(
            f"{', '.join(missing) or 'pixels or latents'} cannot be found among the suffixes {sorted(first)}: "
            "give rename={suffix: field}"
        )
    return out


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    return int(height), int(width)


def _image(sample: Mapping[str, Any]) -> torch.Tensor:
    return sample["pixels"] if "pixels" in sample else sample["latents"]


def example(folder: Path) -> ShardSource:
    """A tiny instance, for the test of the batch contract."""
    from zigflow.data.writer import ShardWriter, encode_npy

    values = np.arange(6 * 4 * 2 * 2, dtype=np.float32).reshape(6, 4, 2, 2) / 96
    with ShardWriter(folder, samples_per_shard=4, meta={"num_classes": 3}) as writer:
        for index, latent in enumerate(values):
            members = {"latent.npy": encode_npy(latent), "cls": str(index % 3).encode()}
            writer.add(f"{index:03d}", members)
    return ShardSource(folder)


__all__ = ["DEFAULT_RENAME", "FIELDS", "ShardError", "ShardSource", "example"]
