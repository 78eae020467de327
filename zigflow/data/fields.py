"""From the members of a sample to the fields of a batch: which suffix delivers what, and what it must look like."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from zigflow.registry import unknown_name

from .decode import DEFAULT_LIMITS, DecodeError, Limits, decode, to_pixels
from .json_fields import pick, split_suffix
from .picture import SUFFIXES, WHITE, Background, background_color
from .shard_index import Sample
from .sizes import EnlargedOnce, enlarging
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
_POINTS = ("pixels", "latents", "moments")


class FieldDecoder:
    """Chooses a member for every field and decodes it.

    Args:
        first: suffixes of the first sample, from which the fields follow.
        rename: file suffix -> field, or ZigMa's way round, batch key -> file suffix; of several suffixes for one field
            the first that a sample has is taken. ``json.label`` is the field ``label`` of the member ``json``. None:
            the usual names, one per field. One that names neither pixels nor latents takes those by their usual names.
        fields: the fields wanted; None takes all that the first sample has.
        channels: 1 or 3, for encoded images; None: those of the first one.
        image_size: pixels of the shorter side after a center crop, or (height, width); None keeps the size.
        enlarge: smaller images than ``image_size`` are made larger instead of refused.
        num_classes: number of labels; 0 does not check.
        class_names: names of the classes by number, for labels that are stored as names.
        limits: budgets of one member.
        background: what shows through transparent images: a grey level, or red, green and blue, 0 to 255.

    Attributes:
        suffixes: field -> suffixes that may deliver it.
        ignored: suffixes of the first sample that deliver nothing.
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
        channels: int | None = 3,
        image_size: int | Sequence[int] | None = None,
        enlarge: bool = False,
        num_classes: int = 0,
        class_names: Sequence[str] = (),
        limits: Limits = DEFAULT_LIMITS,
        background: Background = WHITE,
    ):
        self.suffixes = _choose(normal_rename(rename), _known_fields(fields), list(first))
        # Where each is found: a member, and for a field of a JSON document the way to it.
        self._places = {
            suffix: split_suffix(suffix, first) for chosen in self.suffixes.values() for suffix in chosen
        }
        used = {member for member, _ in self._places.values()}
        self.ignored = tuple(sorted(suffix for suffix in first if suffix not in used))
        self.channels, self.limits, self.num_classes = channels, limits, num_classes
        self.class_names = tuple(class_names)
        self.image_size, self.enlarge = _pair(image_size), enlarge
        self.background = background_color(background)
        # The usual names cover sets whose images are of several formats.
        self._usual = not set((normal_rename(rename) or {}).values()) & set(_POINTS)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._enlarged = EnlargedOnce()

    def _check_size(self, size: tuple[int, int]) -> None:
        """Refuse an image that would be enlarged while a source is opened; say it once while samples are read."""
        problem = "" if self.enlarge else enlarging(size, self.image_size)
        if problem and not self.shapes:
            raise DecodeError(problem)
        self._enlarged.tell("an image", problem)

    @property
    def identity(self) -> str:
        """What the decoded values depend on, besides the bytes."""
        stored_as_names = any(not suffix.endswith("cls") for suffix in self.suffixes.get("labels", ()))
        names = f" {self.class_names}" if stored_as_names and self.class_names else ""
        shown = "" if self.background == WHITE else f" {self.background}"
        return f"{sorted(self.suffixes.items())} {self.channels} {self.image_size}{shown}{names}"

    def fix_shapes(self, sample: Mapping[str, Any]) -> tuple[int, ...]:
        """Take the shapes of this sample as those of all; returns the shape of its pixels, or of its latents."""
        if self.channels is None and "pixels" in sample:
            self.channels = sample["pixels"].shape[-3]
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
            found = [suffix for suffix in suffixes if self._places[suffix][0] in present]
            if not found and self._usual and suffixes[0] in _PICTURES:
                found = [suffix for suffix in _PICTURES if suffix in present]
            if not found:
                raise error(" or ".join(suffixes), f"missing ({field}); there are {sorted(present)[:16]}")
            chosen[field] = found[0]
        data = read({self._place(suffix)[0] for suffix in chosen.values()})
        out: dict[str, Any] = {"key": sample.key}
        for field, suffix in chosen.items():
            member, path = self._place(suffix)
            try:
                value = pick(decode(member, data[member], self.limits, self.background), path)
                out[field] = self._field(field, value)
            except (DecodeError, TypeError, ValueError) as problem:
                raise error(member, _about(suffix, member, problem)) from problem
        return out

    def _place(self, suffix: str) -> tuple[str, tuple[str, ...]]:
        """The member that holds ``suffix`` and the way in it; an image of another format is a member itself."""
        return self._places.get(suffix, (suffix, ()))

    def _field(self, field: str, value: Any) -> Any:
        if field == "labels":
            return self._label(value)
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
                    ": give data.image_size=N to crop and resize"
                    if field == "pixels" and not self.image_size
                    else ""
                )
            )
        return tensor

    def _label(self, value: Any) -> int:
        """The number of a class, stored as a number, as one in digits or as a name."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str):
            text = value.strip()
            if text in self.class_names:
                value = self.class_names.index(text)
            elif text.isdecimal():
                value = int(text)
            elif self.class_names:
                raise DecodeError(str(unknown_name("class", text, list(self.class_names))))
            else:
                raise DecodeError(
                    f"label {text[:80]!r} is a name, and which number it has is not known: list the names of the "
                    "classes in data.class_names=[...]"
                )
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DecodeError(f"a label is the number or the name of a class, got {str(value)[:80]!r}")
        if 0 < self.num_classes <= value:
            raise DecodeError(
                f"label {value} is outside 0..{self.num_classes - 1}: data.num_classes={self.num_classes} is less than "
                "the data has"
            )
        return value

    def _pixels(self, value: np.ndarray) -> torch.Tensor:
        if value.dtype != np.uint8:
            raise DecodeError(f"pixels are stored as 8-bit values, these are {value.dtype}")
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3):
            self._check_size(value.shape[:2])
            channels = self.channels or (1 if value.ndim == 2 else 3)
            return to_pixels(value, channels, self.image_size)
        if value.ndim == 4 and len(value):
            self._check_size(value.shape[2:])
            channels = self.channels or value.shape[1]
            frames = [to_pixels(np.moveaxis(frame, 0, -1), channels, self.image_size) for frame in value]
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
            out[_lowered(left)] = known[right]
        elif left in known:
            out[_lowered(right)] = known[left]
        else:
            raise unknown_name("batch field", right, [*FIELDS, *OFFICIAL_KEYS])
    return out


def _lowered(suffix: str) -> str:
    """A suffix as the index has it, in lower case; the fields of a JSON document keep theirs."""
    head, json, path = suffix.partition("json.")
    return f"{head.lower()}{json}{path}" if json else suffix.lower()


def _about(suffix: str, member: str, problem: Exception) -> str:
    return str(problem) if suffix == member else f"{suffix}: {problem}"


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
    usual = set(table) if rename is None else set()
    if rename is not None and not set(table) & set(_POINTS):
        for suffix, field in DEFAULT_RENAME.items():
            if field in _POINTS:
                table.setdefault(field, []).append(suffix)
                usual.add(field)
    out: dict[str, tuple[str, ...]] = {}
    for field, suffixes in table.items():
        present = [suffix for suffix in suffixes if split_suffix(suffix, first)[0] in first]
        if (fields is not None and field not in fields) or (field in usual and not present):
            continue
        if field in usual and len(present) > 1:
            raise ValueError(
                f"{field} can come from {' or '.join(present)}: say which with rename={{suffix: {field!r}}}"
            )
        if not present:
            raise ValueError(
                f"the first sample has no {' or '.join(suffixes)} ({field}); it has {sorted(first)}"
            )
        out[field] = tuple(present if field in usual else suffixes)
    missing = sorted(set(fields or ()) - set(out))
    if missing or not set(_POINTS) & set(out):
        raise ValueError(
            f"{', '.join(missing) or 'pixels or latents'} cannot be found among the suffixes {sorted(first)}: "
            f"{_cure(missing)}"
        )
    return out


def _cure(missing: list[str]) -> str:
    if missing == ["labels"]:
        return (
            "name the member that holds them, such as 'data.source.rename={json.label: labels}' for the field label "
            "of a JSON member, or train without classes: leave labels out of data.source.fields, data.num_classes=0"
        )
    return "name a suffix for each with data.source.rename={suffix: field}"


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    return int(height), int(width)
