"""Images are made smaller without asking, larger only where ``enlarge`` says so."""

import logging
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

_LOOKED_AT = 256
DECODED = 32
"""Images whose channels are looked at: whole ones are decoded for it, not headers alone."""


class EnlargedOnce:
    """Says in one line that a smaller image is made larger: a run must not end at one that nobody looked at before."""

    def __init__(self) -> None:
        self._told = False

    def tell(self, name: str, problem: str) -> None:
        """Log ``problem`` of the image ``name``, the first time that there is one."""
        if problem and not self._told:
            self._told = True
            log.warning(
                "%s: %s; it was not among those that were looked at, and is enlarged, as any other is",
                name,
                problem,
            )


def enlarging(size: tuple[int, int], wanted: tuple[int, int] | None) -> str:
    """What is wrong with making an image of ``size`` into one of ``wanted``, both (height, width); "" for nothing."""
    if wanted is None or (size[0] >= wanted[0] and size[1] >= wanted[1]):
        return ""
    side = min(size)
    return (
        f"the image has {size[0]} x {size[1]} pixels, image_size={_typed(wanted)} would enlarge it: set "
        f"data.image_size={side} or less, or data.source.enlarge=true to enlarge"
    )


def check_sizes(
    count: int, size_at: Callable[[int], tuple[str, tuple[int, int] | None]], wanted: tuple[int, int] | None
) -> None:
    """Look at some of ``count`` images, spread over all, and refuse one that is smaller than ``wanted``.

    Args:
        size_at: index -> name and (height, width), which is None where it is not known.

    Raises:
        ValueError: the first that is, with how many of those looked at are.
    """
    if wanted is None or not count:
        return
    looked = sorted({step * (count - 1) // (_LOOKED_AT - 1) for step in range(_LOOKED_AT)})
    small: list[str] = []
    for index in looked:
        name, size = size_at(index)
        problem = "" if size is None else enlarging(size, wanted)
        if problem:
            small.append(f"{name}: {problem}")
    if small:
        raise ValueError(f"{small[0]} ({len(small)} of {len(looked)} images that were looked at are smaller)")


def _typed(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"


def common_channels(kinds: Sequence[int], name: object) -> int | None:
    """The channels that all images of a set are read with, from those (1 or 3) of the ones that were looked at.

    3 where any has colors: one grey image among colored ones must not decide for all, and which one comes first is
    chance. A mixture is logged in one line. None for no image.
    """
    if len(set(kinds)) > 1:
        log.warning(
            "%s: %d of %d images that were looked at are grey and are read with three equal channels; "
            "data.channels=1 reads all as grey",
            name, kinds.count(1), len(kinds),
        )  # fmt: skip
    return max(kinds, default=None)
