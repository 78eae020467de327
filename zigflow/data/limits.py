"""Budgets of what is decoded, and the error of bytes that exceed them or are not what they should be."""

from dataclasses import dataclass

from zigflow.errors import ZigflowError


class DecodeError(ZigflowError, ValueError):
    """Bytes that are not what their suffix says, or that exceed a budget."""


@dataclass(frozen=True)
class Limits:
    """Budgets of one member.

    Attributes:
        max_bytes: bytes of a member and of the array that it declares.
        max_pixels: width times height of an image.
        max_text: bytes of a text or a JSON document.
        max_profile: bytes of a color profile inside of an image.
    """

    max_bytes: int = 1 << 29
    max_pixels: int = 1 << 26
    max_text: int = 1 << 20
    max_profile: int = 1 << 24


DEFAULT_LIMITS = Limits()
