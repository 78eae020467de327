"""Embedded color profiles (ICC): the values of an image as they are in sRGB, which is what networks and screens take.

Little CMS does the arithmetic, through pillow, with the perceptual intent. What a profile does is measured once: one
that changes no color by more than one level is sRGB under whatever name, and images with it are left as they are.
"""

import hashlib
import io
from typing import Any

import numpy as np

from .limits import DEFAULT_LIMITS, DecodeError, Limits

_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
_MAX_KEPT = 32
_kept: dict[bytes, tuple[str, Any]] = {}


def to_srgb(image: Any, profile: bytes | None, limits: Limits = DEFAULT_LIMITS) -> Any:
    """Convert a PIL image (L, RGB or CMYK) from its profile to sRGB.

    Returns:
        The image itself where the profile is sRGB's; otherwise L for grey images, RGB for the others.

    Raises:
        DecodeError: the profile is damaged, over budget, or that of other colors than the image has.
    """
    from PIL import ImageCms

    if not profile:
        raise DecodeError("its color profile is damaged: remove it, or convert the image to sRGB")
    if len(profile) > limits.max_profile:
        raise DecodeError(f"a color profile of {len(profile)} bytes, the budget is {limits.max_profile}")
    mode, transform = _measured(profile)
    # Grey images often carry the profile of the colored ones that they were made from.
    if mode != image.mode and (mode, image.mode) != ("RGB", "L"):
        raise DecodeError(
            f"its color profile is one of {mode} values, the image has {image.mode}: "
            "remove it, or convert the image to sRGB"
        )
    if transform is None:
        return image
    try:
        shown = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    except (ImageCms.PyCMSError, ValueError) as error:
        raise DecodeError(f"its color profile cannot be applied: {error}") from error
    if shown is None:  # In place, which was not asked for.
        raise DecodeError("its color profile cannot be applied")
    return shown.convert("L") if image.mode == "L" else shown


def _measured(profile: bytes) -> tuple[str, Any]:
    """The mode that a profile is for, and the transform to sRGB; None where it changes nothing."""
    key = hashlib.sha256(profile).digest()
    if key not in _kept:
        if len(_kept) >= _MAX_KEPT:
            _kept.clear()
        _kept[key] = _measure(profile)
    return _kept[key]


def _measure(profile: bytes) -> tuple[str, Any]:
    from PIL import Image, ImageCms, features

    if not features.check("littlecms2"):
        raise DecodeError(
            "it has a color profile, and this pillow was built without Little CMS: install another build of pillow, "
            "or convert the image to sRGB"
        )
    mode = _MODES.get(profile[16:20])
    if mode is None:
        raise DecodeError(
            f"its color profile is damaged or one of {profile[16:20]!r}: convert the image to sRGB"
        )
    try:
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            opened, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.PERCEPTUAL
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise DecodeError(
            f"its color profile cannot be read ({error}): remove it, or convert the image to sRGB"
        ) from error
    if mode == "CMYK":
        return mode, transform
    probe = _lattice() if mode == "RGB" else np.arange(256, dtype=np.uint8)[None]
    shown = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform)).astype(int)
    change = np.abs(shown - (probe if mode == "RGB" else probe[..., None])).max()
    return mode, None if change <= 1 else transform


def _lattice() -> np.ndarray:
    """(18, 324, 3) colors: every channel in steps of 15."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    return np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(18, 18 * 18, 3)
