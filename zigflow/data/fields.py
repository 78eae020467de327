"""From the members of a sample to the fields of a batch: which suffix delivers what, and what it must look like."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from zigflow.registry import unknown_name

from .decode import DEFAULT_LIMITS, DecodeError, Limits, decode, to_pixels
from .picture import SUFFIXES, WHITE, Background, background_color
from .shard_index import Sample
from .source import image_shape
from .tar import ShardError

FIELDS = ("pixels", "latents", "moments", "labels", "tokens", "captions")
_PICTURES = (*(f"image.{suffix}" for suffix in SUFFIXES), *SUFFIXES)
DEFAULT_RENAME = {
    **dict.fromkeys(_PICTURES, "pixels"),
    "frames.npy": "pixels",
    "img_feature256.npy": "latents",
    "img_feature512.npy": "latents",
    "frame_feature256.npy": "latents",
    "latent.npy": "latents",
    "latent_hr.npy": "latents",
    "moments.npy": "moments",
    "cls_id.cls": "labels",
    "cls": "labels",
    "caption.json": "captions",
    "txt": "captions",
    "caption_feature.npy": "tokens",
    "caption_clip_feature.npy": "tokens",
}
OFFICIAL_KEYS = {
    "image": "pixels",
    "video": "pixels",
    "img_feature": "latents",
    "img_feature256": "latents",
    "img_feature512": "latents",
    "frame_feature256": "latents",
    "latent": "latents",
    "latent_hr": "latents",
    "cls_id": "labels",
    "cls_name": "captions",
    "caption": "captions",
    "caption_feature": "tokens",
}
_SHAPED = ("pixels", "latents", "moments", "tokens")


class FieldDecoder:
    """Chooses a member for every field and decodes it.

    Args:
        first: suffixes of the first sample, from which the fields follow.
        rename: file suffix -> field, or ZigMa's way round, batch key -> file suffix; of several suffixes for one field
            the first that a sample has is taken. None: the usual names, one per field.
        fields: the fields wanted; None takes all that the first sample has.
        channels: 1 or 3, for encoded images.
        image_size: pixels of the shorter side after a center crop, or (height, width); None keeps the size.
        num_classes: number of labels; 0 does not check.
        limits: budgets of one member.
        background: what shows through transparent images: a grey level, or red, green and blue, 0 to 255.

    Attributes:
        suffixes: field -> suffixes that may deliver it.
        shapes: field -> shape that every sample must have; the owner sets it from the first sample.

    Raises:
        ValueError: an unknown field, or one that the first sample does not have.
    """

    def __init__(
        self,
        first: Sequence[str],
        rename: Mapping[str, str] | None = None,
        fields: Sequence[str] | None = None,
        *,
        channels: int = 3,
        image_size: int | Sequence[int] | None = None,
        num_classes: int = 0,
        limits: Limits = DEFAULT_LIMITS,
        background: Background = WHITE,
    ):
        self.suffixes = _choose(normal_rename(rename), _known_fields(fields), list(first))
        self.channels, self.limits, self.num_classes = channels, limits, num_classes
        self.image_size = _pair(image_size)
        self.background = background_color(background)
        # The usual names cover sets whose images are of several formats.
        self._usual = rename is None
        self.shapes: dict[str, tuple[int, ...]] = {}

    @property
    def identity(self) -> str:
        """What the decoded values depend on, besides the bytes."""
        shown = "" if self.background == WHITE else f" {self.background}"
        return f"{sorted(self.suffixes.items())} {self.channels} {self.image_size}{shown}"

    def fix_shapes(self, sample: Mapping[str, Any]) -> tuple[int, ...]:
        """Take the shapes of this sample as those of all; returns the shape of its pixels, or of its latents."""
        self.shapes = {name: _shape(name, sample[name]) for name in _SHAPED if name in sample}
        return image_shape(sample)

    def __call__(
        self,
        sample: Sample,
        read: Callable[[set[str]], Mapping[str, bytes]],
        error: Callable[[str, str], ShardError],
    ) -> dict[str, Any]:
        """The fields of a sample and its ``key``.

        Args:
            read: suffixes -> their bytes.
            error: (suffix, message) -> the error that names the place.

        Raises:
            ShardError: a member is missing, damaged, over budget or of another shape than the first sample's.
        """
        present = {entry.suffix for entry in sample.entries}
        chosen: dict[str, str] = {}
        for field, suffixes in self.suffixes.items():
            found = [suffix for suffix in suffixes if suffix in present]
            if not found and self._usual and suffixes[0] in _PICTURES:
                found = [suffix for suffix in _PICTURES if suffix in present]
            if not found:
                raise error(" or ".join(suffixes), f"missing ({field}); there are {sorted(present)[:16]}")
            chosen[field] = found[0]
        data = read(set(chosen.values()))
        out: dict[str, Any] = {"key": sample.key}
        for field, suffix in chosen.items():
            try:
                out[field] = self._field(field, decode(suffix, data[suffix], self.limits, self.background))
            except (DecodeError, TypeError, ValueError) as problem:
                raise error(suffix, str(problem)) from problem
        return out

    def _field(self, field: str, value: Any) -> Any:
        if field == "labels":
            if not isinstance(value, int) or 0 < self.num_classes <= value:
                raise DecodeError(f"label {value!r} is outside 0..{self.num_classes - 1}")
            return value
        if field == "captions":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise DecodeError("captions are a text or a list of texts")
            return tuple(texts)
        if not isinstance(value, np.ndarray):
            raise DecodeError(f"{field} need an image or an npy array")
        if field == "pixels":
            tensor = self._pixels(value)
        else:
            tensor = _floats(value, field, (2, 3) if field == "tokens" else (3, 4))
        wanted = self.shapes.get(field)
        if wanted is not None and _shape(field, tensor) != wanted:
            raise DecodeError(
                f"shape {_shape(field, tensor)}, the first sample has {wanted}"
                + (
                    ": give image_size to crop and resize"
                    if field == "pixels" and not self.image_size
                    else ""
                )
            )
        return tensor

    def _pixels(self, value: np.ndarray) -> torch.Tensor:
        if value.dtype != np.uint8:
            raise DecodeError(f"pixels are stored as 8-bit values, these are {value.dtype}")
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3):
            return to_pixels(value, self.channels, self.image_size)
        if value.ndim == 4 and len(value):
            frames = [to_pixels(np.moveaxis(frame, 0, -1), self.channels, self.image_size) for frame in value]
            return torch.stack(frames)
        raise DecodeError(f"pixels are an image or (T, C, H, W), these are {value.shape}")


def normal_rename(rename: Mapping[str, str] | None) -> dict[str, str] | None:
    """Suffix -> field, from either way round.

    Raises:
        ValueError: neither side of an entry is a field of a batch or one of ZigMa's batch keys.
    """
    if rename is None:
        return None
    known = {**OFFICIAL_KEYS, **{field: field for field in FIELDS}}
    out: dict[str, str] = {}
    for left, right in rename.items():
        # A suffix such as "cls" or "png" is never a key, "latent.npy" neither: a key on the right decides.
        if right in known:
            out[left.lower()] = known[right]
        elif left in known:
            out[right.lower()] = known[left]
        else:
            raise unknown_name("batch field", right, [*FIELDS, *OFFICIAL_KEYS])
    return out


def _known_fields(fields: Sequence[str] | None) -> Sequence[str] | None:
    for field in fields or ():
        if field not in FIELDS:
            raise unknown_name("batch field", field, list(FIELDS))
    return fields


def _shape(field: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """The part of a shape that all samples share: the number of captions may differ."""
    return tuple(tensor.shape[-2:] if field == "tokens" else tensor.shape)


def _floats(value: np.ndarray, field: str, ranks: tuple[int, ...]) -> torch.Tensor:
    if value.ndim not in ranks or not value.size:
        raise DecodeError(f"{field} have {' or '.join(map(str, ranks))} dimensions, got shape {value.shape}")
    if field == "moments" and value.shape[-3] % 2:
        raise DecodeError(
            f"moments have an even number of channels, mean and log variance, got {value.shape}"
        )
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
        table.setdefault(field, []).append(suffix)
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
    if missing or not {"pixels", "latents", "moments"} & set(out):
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
