"""The directories of tags that TIFF files and EXIF blocks are made of, read without following what is hostile.

Source: TIFF 6.0 (Adobe, 1992) and its 64-bit variant BigTIFF; EXIF 2.32, where a block is a small TIFF file.
"""

from collections.abc import Mapping

from .limits import DecodeError

SUBFILE, BITS, PHOTOMETRIC, ORIENTATION, SAMPLES = 254, 258, 262, 274, 277
TILE_WIDTH, TILE_LENGTH = 322, 323
_WANTED = (SUBFILE, BITS, PHOTOMETRIC, ORIENTATION, SAMPLES, TILE_WIDTH, TILE_LENGTH)
_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_MAX_TAGS, _MAX_VALUES = 4096, 64

Directory = Mapping[int, tuple[int, ...]]


def read_directories(data: bytes, most: int = 64) -> list[Directory]:
    """The directories in their order: tag -> integer values, for the tags named in this module.

    Args:
        data: a TIFF file, or an EXIF block without its prefix.
        most: directories after which reading ends.

    Raises:
        DecodeError: they lie outside of the data, follow each other in a circle, or declare more than is there.
    """
    if data[:2] not in (b"II", b"MM") or len(data) < 8:
        raise DecodeError("not a readable image: no TIFF header")

    def number(at: int, width: int) -> int:
        if at + width > len(data):
            raise DecodeError(f"not a readable image: its tags lie behind its {len(data)} bytes")
        return int.from_bytes(data[at : at + width], "little" if data[:2] == b"II" else "big")

    big = number(2, 2) == 43
    word, count_width = (8, 8) if big else (4, 2)
    out: list[Directory] = []
    seen: set[int] = set()
    at = number(8 if big else 4, word)
    while at and len(out) < most:
        if at in seen:
            raise DecodeError("not a readable image: its directories follow each other in a circle")
        seen.add(at)
        count = number(at, count_width)
        if count > _MAX_TAGS:
            raise DecodeError(
                f"not a readable image: a directory of {count} tags, at most {_MAX_TAGS} are read"
            )
        at += count_width
        found: dict[int, tuple[int, ...]] = {}
        declared = 0
        for entry in range(at, at + count * (4 + 2 * word), 4 + 2 * word):
            tag, kind, many = number(entry, 2), number(entry + 2, 2), number(entry + 4, word)
            size = many * _SIZES.get(kind, 0)
            declared += size
            # Tags may point at the same bytes again and again: a small file would unfold to any size.
            if declared > len(data):
                raise DecodeError(f"not a readable image: its tags declare more than its {len(data)} bytes")
            if tag in _WANTED and kind in (3, 4) and 0 < many <= _MAX_VALUES:
                place = entry + 4 + word if size <= word else number(entry + 4 + word, word)
                width = _SIZES[kind]
                found[tag] = tuple(number(place + i * width, width) for i in range(many))
        out.append(found)
        at = number(at + count * (4 + 2 * word), word) if len(out) < most else 0
    return out


def exif_orientation(exif: bytes) -> int:
    """How an image lies, 1 (upright) to 8; 1 where the block does not say or cannot be read, as viewers take it."""
    try:
        directories = read_directories(exif.removeprefix(b"Exif\0\0"), 1)
    except DecodeError:
        return 1
    value = directories[0].get(ORIENTATION, (1,))[0] if directories else 1
    return value if 1 <= value <= 8 else 1
