"""Bytes of a shard member to arrays, texts and numbers, within fixed budgets and without running anything."""

import io
import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from .limits import DEFAULT_LIMITS, DecodeError, Limits
from .picture import SUFFIXES, WHITE, Background, decode_image

__all__ = [
    "DECODERS",
    "DEFAULT_LIMITS",
    "DecodeError",
    "Limits",
    "cover_crop",
    "decode",
    "decode_image",
    "decode_npy",
    "npy_header",
    "to_pixels",
]


_MAX_NPY_HEADER = 1 << 16


def decode(suffix: str, data: bytes, limits: Limits = DEFAULT_LIMITS, background: Background = WHITE) -> Any:
    """Decode by what follows the last dot of ``suffix``.

    Args:
        background: what shows through the transparent parts of images.

    Returns:
        png, jpg and the others of images: (H, W) or (H, W, 3) uint8 array; npy: array; cls: int; txt: str; json:
        plain Python.

    Raises:
        DecodeError: the bytes are damaged, over budget, or of a kind that is never decoded (pickles and
            others that can run code).
    """
    kind = suffix.rsplit(".", 1)[-1].lower()
    if kind not in DECODERS:
        raise DecodeError(
            f"members ending in {kind!r} are not decoded; known: {', '.join(sorted(DECODERS))} "
            "(formats that can run code, such as pickles, are refused on purpose)"
        )
    if len(data) > limits.max_bytes:
        raise DecodeError(f"{len(data)} bytes, the budget of a member is {limits.max_bytes}")
    return decode_image(data, limits, background) if kind in SUFFIXES else DECODERS[kind](data, limits)


# Parsing a header takes longer than copying a latent, and the members of a set share a few headers.
@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = io.BytesIO(header)
    version = npy_format.read_magic(stream)
    if version == (1, 0):
        return npy_format.read_array_header_1_0(stream)
    if version == (2, 0):
        return npy_format.read_array_header_2_0(stream)
    raise ValueError(f"npy version {version} is not read; 1.0 and 2.0 are")


def npy_header(data: bytes) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """Where an npy file's data begin, and its shape, whether it is in Fortran order, and its type.

    Raises:
        DecodeError: the header is damaged or over budget.
    """
    width = 4 if data[6:7] == b"\x02" else 2
    begin = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if begin > _MAX_NPY_HEADER:
        raise DecodeError(f"not a readable npy array: a header of {begin} bytes")
    try:
        return begin, *_npy_header(data[:begin])
    # The header is a Python literal: noise in it ends in exceptions of many kinds.
    except Exception as error:
        raise DecodeError(f"not a readable npy array: {error}") from error


def decode_npy(data: bytes, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """A plain numeric array; object and structured types are refused before anything is read."""
    begin, shape, fortran, dtype = npy_header(data)
    if dtype.kind not in "fiub" or dtype.names is not None:
        raise DecodeError(f"an npy array of numbers is needed, this one has type {dtype}")
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise DecodeError(f"an npy array of shape {shape} cannot be")
    count = math.prod(shape)
    declared, present = count * dtype.itemsize, len(data) - begin
    if declared > limits.max_bytes:
        raise DecodeError(f"the npy header declares {declared} bytes, the budget is {limits.max_bytes}")
    if declared != present:
        raise DecodeError(f"the npy header declares {declared} bytes of data, {present} are there")
    try:
        flat = np.frombuffer(data, dtype=dtype, count=count, offset=begin)
        array = flat.reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="), order="C", copy=True)
    except (ValueError, OverflowError) as error:
        raise DecodeError(f"an npy array of shape {str(shape)[:80]} cannot be: {error}") from error


def decode_json(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Any:
    try:
        return json.loads(decode_text(data, limits))
    except DecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"not a readable JSON document: {type(error).__name__}: {error}") from error


def decode_text(data: bytes, limits: Limits = DEFAULT_LIMITS) -> str:
    if len(data) > limits.max_text:
        raise DecodeError(f"{len(data)} bytes of text, the budget is {limits.max_text}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError(f"not UTF-8 text: {error}") from error


def decode_class(data: bytes, limits: Limits = DEFAULT_LIMITS) -> int:
    """A class number written in digits."""
    text = data[:32].strip()
    if len(data) > 32 or not text.isdigit():
        raise DecodeError(f"a class is a number 0, 1, 2, ..., got {data[:32]!r}")
    return int(text)


DECODERS: dict[str, Callable[[bytes, Limits], Any]] = {
    **dict.fromkeys(SUFFIXES, decode_image),
    "npy": decode_npy,
    "json": decode_json,
    "txt": decode_text,
    "cls": decode_class,
}


def cover_crop(image: Any, height: int, width: int) -> Any:
    """Crop a PIL image to the center, in the target's aspect ratio, and resize it (bicubic, antialiased)."""
    from PIL import Image

    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    box_width, box_height = width * scale, height * scale
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def to_pixels(image: np.ndarray, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """(H, W) or (H, W, 3) uint8 to (channels, h, w) float32 in [-1, 1]: value / 127.5 - 1.

    Args:
        image: as :func:`decode_image` returns it.
        channels: 1 (grey) or 3; the image is converted.
        size: (height, width) to crop and resize to; None keeps the size.

    Raises:
        ValueError: ``channels`` is neither 1 nor 3, or the array is no 8-bit image.
    """
    from PIL import Image

    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, {channels} were asked for")
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"an image is (H, W) or (H, W, 3) uint8, got {image.dtype} {image.shape}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    have = 1 if image.ndim == 2 else image.shape[2]
    if have != channels or (size is not None and image.shape[:2] != tuple(size)):
        picture = Image.fromarray(image).convert("L" if channels == 1 else "RGB")
        if size is not None:
            picture = cover_crop(picture, *size)
        image = np.array(picture)
    array = torch.from_numpy(image.reshape(*image.shape[:2], channels))
    # Transposed as bytes, of which there are a quarter.
    return array.permute(2, 0, 1).contiguous().to(torch.float32).div_(127.5).sub_(1.0)
