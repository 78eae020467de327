"""An encoded image to pixels, as a viewer shows it: the one place where images are decoded, for every reader.

============================  ========================================================================================
orientation (EXIF, TIFF tag)  applied
transparency                  composited on a background, white unless another is given: alpha, palettes with alpha,
                              a color that is declared transparent
color profile                 converted to sRGB (:mod:`.color_profile`); PNG's gAMA and cHRM and the color codes of PNG
                              and AVIF are refused where they say other colors than sRGB's
16 bits                       rounded to 8: grey in PNG and TIFF, color in PNG; 12 and 32 bits and floats are refused
CMYK, YCCK                    by the profile; without one by (255 - ink) (255 - black) / 255
1 bit, palettes               grey of 0 and 255; RGB
several frames or pages       refused; the smaller previews that TIFF and JPEG files carry along do not count
============================  ========================================================================================
"""

import io
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .color_profile import to_srgb
from .limits import DEFAULT_LIMITS, DecodeError, Limits
from .tiff_tags import (
    BITS,
    PHOTOMETRIC,
    SAMPLES,
    SUBFILE,
    TILE_LENGTH,
    TILE_WIDTH,
    Directory,
    exif_orientation,
    read_directories,
)

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "avif")
WHITE = (255, 255, 255)
Background = int | Sequence[int]

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
    b"GIF8": "GIF", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000",
}  # fmt: skip
_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
}
_READ = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")
# What makes of an image in its plain mode something else than its values.
_SPECIAL = {"exif", "icc_profile", "transparency", "gamma", "chromaticity"}
_SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
# ITU-T H.273: BT.709 and unspecified; BT.709, unspecified, BT.601 and sRGB.
_SRGB_PRIMARIES, _SRGB_TRANSFERS = (1, 2), (1, 2, 6, 13)
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}

_QUARTER_TURNS = (5, 6, 7, 8)


def decode_image(data: bytes, limits: Limits = DEFAULT_LIMITS, background: Background = WHITE) -> np.ndarray:
    """PNG, JPEG, WebP, BMP, TIFF or AVIF to (H, W) for grey or (H, W, 3) uint8, in sRGB.

    Args:
        data: the file's bytes; what they are is told from them, not from a name.
        limits: budgets.
        background: what shows through transparency: a grey level, or red, green and blue, 0 to 255.

    Raises:
        DecodeError: damaged, over budget, or an image of a kind that is refused; the kind is named.
    """
    from PIL import Image

    kind = _kind(data)
    try:
        tiff = _check_head(kind, data, limits)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            _check_size(*image.size, limits)
            _check_frames(kind, image)
            image.load()
            deep = kind == "PNG" and data[24] == 16
            plain = image.mode in ("L", "RGB") and not deep and not _SPECIAL & image.info.keys()
            if plain:
                return np.array(image)
            color, alpha = _sixteen_bits(image, data) if deep else _layers(image, kind, data, tiff)
            if "icc_profile" in image.info:
                color = to_srgb(color, image.info["icc_profile"], limits)
            elif kind == "PNG":
                _check_png_colors(image.info, color.mode)
            pixels = np.array(color.convert("RGB") if color.mode == "CMYK" else color)
            if alpha is not None:
                pixels = _composite(pixels, alpha, background_color(background))
            # Pillow turns TIFF files itself.
            turn = None if kind == "TIFF" else _TURNS.get(exif_orientation(image.info.get("exif") or b""))
            return pixels if turn is None else np.ascontiguousarray(turn(pixels))
    except DecodeError:
        raise
    # Pillow answers damage with exceptions of many kinds; a bomb warning turned into an error is one of them.
    except Exception as error:
        raise DecodeError(f"not a readable {kind} image: {type(error).__name__}: {error}") from error


def image_size_of(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an encoded image as it is shown, from its header; None for what is no readable image."""
    from PIL import Image

    try:
        kind = _kind(data)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            turned = exif_orientation(image.info.get("exif") or b"") in _QUARTER_TURNS
            return (image.width, image.height) if turned else (image.height, image.width)
    # Damage is told where the image is decoded.
    except Exception:
        return None


def read_image(
    path: Path, limits: Limits = DEFAULT_LIMITS, background: Background = WHITE
) -> tuple[bytes, np.ndarray]:
    """A file's bytes, and its pixels as :func:`decode_image` returns them.

    Raises:
        DecodeError: as :func:`decode_image`; the file is named.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise DecodeError(f"{path}: {size} bytes, the budget is {limits.max_bytes}")
    data = path.read_bytes()
    try:
        return data, decode_image(data, limits, background)
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from error


def background_color(background: Background) -> tuple[int, int, int]:
    """Red, green and blue of a background.

    Raises:
        ValueError: it is neither a level nor three of them, 0 to 255.
    """
    levels = list(background) if isinstance(background, Sequence) else [background] * 3
    if len(levels) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in levels):
        raise ValueError(
            f"background is a level 0 to 255 or three of them (red, green, blue), got {background!r}"
        )
    return levels[0], levels[1], levels[2]


def _kind(data: bytes) -> str:
    """The format by its first bytes."""
    kind = next((kind for mark, kind in _SIGNATURES.items() if data.startswith(mark)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "WEBP"
    elif data[4:8] == b"ftyp":
        # An AVIF file may name a general brand first and its own among the compatible ones.
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        kind = "AVIF" if b"avif" in brands or b"avis" in brands else _BRANDS.get(data[8:12])
    known = ", ".join(_READ)
    if kind is None:
        raise DecodeError(f"not a readable image: it begins with {data[:12]!r}; read are {known}")
    if kind not in _READ:
        raise DecodeError(f"a {kind} image, which is not read; convert it to one of {known}")
    if not _built_in(kind):
        raise DecodeError(
            f"a {kind} image, which this build of pillow cannot read: install a newer pillow, or convert it to PNG"
        )
    return kind


@lru_cache(maxsize=8)
def _built_in(kind: str) -> bool:
    from PIL import features

    name = kind.lower()
    return kind not in ("WEBP", "AVIF") or bool(name in features.modules and features.check(name))


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise DecodeError(f"{width} x {height} pixels, the budget is {limits.max_pixels}")


def _check_head(kind: str, data: bytes, limits: Limits) -> Directory:
    """What must be known before pillow opens the file; the first directory of a TIFF."""
    if kind == "PNG":
        if data[12:16] != b"IHDR":
            raise DecodeError("not a readable image: a PNG begins with its header")
        at = data.find(b"cICP", 8, data.find(b"IDAT"))
        if at > 0 and data[at - 4 : at] == b"\0\0\0\4":
            _check_codes(data[at + 4], data[at + 5])
    elif kind == "WEBP":
        # The decoder allocates its canvas when it is made.
        _check_size(*_webp_size(data), limits)
    elif kind == "AVIF":
        at = data.find(b"colrnclx", 0, 1 << 16)
        if at > 0:
            codes = data[at + 8 : at + 12]
            _check_codes(int.from_bytes(codes[:2], "big"), int.from_bytes(codes[2:], "big"))
    elif kind == "TIFF":
        return _check_tiff(data, limits)
    return {}


def _check_codes(primaries: int, transfer: int) -> None:
    if primaries not in _SRGB_PRIMARIES or transfer not in _SRGB_TRANSFERS:
        raise DecodeError(
            f"colors that are not sRGB's (primaries {primaries}, transfer {transfer} of ITU-T H.273): "
            "convert it to sRGB"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk, head = data[12:16], data[20:30]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF


def _check_tiff(data: bytes, limits: Limits) -> Directory:
    directories = read_directories(data)
    # Bit 0: a smaller preview of another page; bit 2: a mask of one.
    pages = [directory for directory in directories if not directory.get(SUBFILE, (0,))[0] & 5]
    if len(pages) > 1 or not directories:
        raise DecodeError(f"a TIFF image of {len(pages)} pages: store each as an image of its own")
    first = directories[0]
    bits, samples = max(first.get(BITS, (1,))), first.get(SAMPLES, (1,))[0]
    if bits > 8 and (bits != 16 or samples > 1):
        what = f"{bits} bits per channel and {samples} channel{'s' if samples > 1 else ''}"
        raise DecodeError(f"a TIFF image of {what}: store 8 bits, or 16-bit grey, or a PNG")
    _check_size(first.get(TILE_WIDTH, (0,))[0], first.get(TILE_LENGTH, (0,))[0], limits)
    return first


def _check_frames(kind: str, image: Any) -> None:
    # TIFF pages are counted before; further images of a JPEG file (MPO) are previews and depths of the first.
    frames = getattr(image, "n_frames", 1) if kind in ("PNG", "WEBP", "AVIF") else 1
    if frames > 1:
        raise DecodeError(
            f"an animation of {frames} frames: store the one that is meant as an image of its own"
        )


def _check_png_colors(info: dict[Any, Any], mode: str) -> None:
    """PNG's numbers for its colors, which count where there is neither a profile nor the mark of sRGB."""
    if "srgb" in info:
        return
    gamma, chromaticity = info.get("gamma"), info.get("chromaticity")
    if gamma is not None and abs(gamma - 1 / 2.2) > 0.01:
        raise DecodeError(f"values of gamma {gamma:.5f} (PNG's gAMA; sRGB's is 0.45455): convert it to sRGB")
    if chromaticity is not None and mode != "L":
        off = max(abs(a - b) for a, b in zip(chromaticity, _SRGB_CHROMATICITY, strict=True))
        if off > 0.01:
            raise DecodeError("colors that are not sRGB's (PNG's cHRM): convert it to sRGB")


def _layers(image: Any, kind: str, data: bytes, tiff: Directory) -> tuple[Any, np.ndarray | None]:
    """Color as a PIL image (L, RGB or CMYK) and alpha (H, W) uint8 or None, of a loaded image."""
    from PIL import Image

    mode, key = image.mode, image.info.get("transparency")
    if mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        # Pillow inverts white-is-zero for 8 bits only.
        values = 65535 - values if tiff.get(PHOTOMETRIC, (1,))[0] == 0 else values
        return Image.fromarray(_round_to_8(values)), None
    if mode in ("P", "PA", "RGBa", "La", "RGBX", "YCbCr"):
        clear = mode in ("PA", "RGBa", "La") or (mode == "P" and image.has_transparency_data)
        image = image.convert("RGBA" if clear else "RGB")
    elif mode == "1":
        image = image.convert("L")
    if image.mode in ("LA", "RGBA"):
        *color, alpha = image.split()
        return Image.merge(image.mode[:-1], color), np.asarray(alpha)
    if image.mode not in ("L", "RGB", "CMYK"):
        raise DecodeError(
            f"an image of 8 bits per channel, or 16 in a PNG, is needed, this one has mode {mode}"
        )
    if kind != "PNG" or key is None or mode == "P":
        return image, None
    # The declared color is in the file's own bits, which pillow has widened to 8 of all but the lowest ones.
    if mode == "L" and data[24] < 8:
        key = key * 255 // ((1 << data[24]) - 1)
    same = np.asarray(image) == np.asarray(key)
    return image, _opaque(same if same.ndim == 2 else same.all(axis=2))


def _opaque(clear: np.ndarray) -> np.ndarray:
    """(H, W) bool -> alpha (H, W) uint8: 0 where it is true, 255 elsewhere."""
    return np.where(clear, 0, 255).astype(np.uint8)


def _round_to_8(values: np.ndarray) -> np.ndarray:
    """uint16 to the nearest of 256 levels: 255 / 65535 = 1 / 257."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _sixteen_bits(image: Any, data: bytes) -> tuple[Any, np.ndarray | None]:
    """Color and alpha of a PNG of 16 bits per channel; pillow would drop the lower eight of all but grey."""
    from PIL import Image

    key = image.info.get("transparency")
    color_type = data[25]
    if color_type == 0:
        values = np.asarray(image).astype(np.uint16)[..., None]
    elif color_type == 4:
        # Two channels of two bytes are stored as four of one byte are.
        head = data[12:24] + bytes((8, 6)) + data[26:29]
        same = data[:12] + head + zlib.crc32(head).to_bytes(4, "big") + data[33:]
        with Image.open(io.BytesIO(same), formats=("PNG",)) as four:
            planes = np.asarray(four).astype(np.uint16)
        values = planes[..., ::2] << 8 | planes[..., 1::2]
    else:
        # Read as little-endian, pillow keeps what are the lower bytes.
        high = np.asarray(image).astype(np.uint16)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
            raw = f"{again.mode};16L"
            # Plain tuples in older versions of pillow, named ones since.
            tiles: Any = [(*tile[:3], raw) for tile in again.tile]
            again.tile = (
                tiles if type(again.tile[0]) is tuple else [type(again.tile[0])(*tile) for tile in tiles]
            )
            values = high << 8 | np.asarray(again)
    alpha = None
    if color_type in (4, 6):
        values, alpha = values[..., :-1], _round_to_8(values[..., -1])
    elif key is not None:
        alpha = _opaque((values == np.asarray(key)).all(axis=2))
    values = values[..., 0] if values.shape[2] == 1 else values
    return Image.fromarray(_round_to_8(values)), alpha


def _composite(pixels: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Pixels over a background, rounded; grey ones stay grey on a grey background."""
    if pixels.ndim == 2 and len(set(background)) > 1:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    behind = np.array(background if pixels.ndim == 3 else background[0], dtype=np.uint16)
    part = alpha.astype(np.uint16)
    part = part if pixels.ndim == 2 else part[..., None]
    return ((pixels * part + behind * (255 - part) + 127) // 255).astype(np.uint8)
