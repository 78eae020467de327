"""Encoded images written byte by byte, and the arithmetic that says what a viewer shows of them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SRGB = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
D65, D50 = np.array([0.95047, 1.0, 1.08883]), np.array([0.9642, 1.0, 0.8249])
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def raw_png(values, depth, color_type, *before, interlaced=False, after=b""):
    """(H, W) or (H, W, C) of integers below 2^depth as a PNG; ``before`` are further chunks."""
    values = np.asarray(values)
    values = values[..., None] if values.ndim == 2 else values
    passes = [values[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [values]
    rows = b"".join(b"\0" + _packed(row, depth) for part in passes if part.size for row in part)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, color_type, 0, 0, interlaced)
    body = chunk(b"IHDR", head) + b"".join(before) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + after + chunk(b"IEND", b"")


def _packed(row, depth):
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else "u1").tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.ravel()).tobytes()


def raw_tiff(pages, order="<"):
    """A TIFF whose directories hold these tags, {tag: (type, count, value)}; strips of one grey pixel each."""
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 9) + b"\x80"
    for place, tags in enumerate(pages):
        tags = {256: (3, 1, 1), 257: (3, 1, 1), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8),
                277: (3, 1, 1), 278: (3, 1, 1), 279: (4, 1, 1), **tags}  # fmt: skip
        out += struct.pack(order + "H", len(tags))
        for tag, (kind, count, value) in sorted(tags.items()):
            code = "HH" if kind == 3 and count == 1 else "I"
            out += struct.pack(
                order + "HHI" + code, tag, kind, count, *([value, 0] if code == "HH" else [value])
            )
        out += struct.pack(order + "I", len(out) + 4 if place + 1 < len(pages) else 0)
    return out


def linear_to_srgb(linear):
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def primaries_to_d50(primaries):
    """RGB of D65 primaries to XYZ of D50, by Bradford's adaptation."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapt = np.linalg.inv(bradford) @ np.diag(bradford @ D50 / (bradford @ D65)) @ bradford
    return adapt @ (xyz * np.linalg.solve(xyz, D65))


def d50_to_srgb(xyz):
    """(..., 3) XYZ of D50 to sRGB in 0 to 255."""
    return 255 * linear_to_srgb(xyz @ np.linalg.inv(primaries_to_d50(SRGB)).T)


def shown_of(values, primaries, gamma):
    """What a screen shows of 8-bit RGB with such primaries and gamma."""
    return d50_to_srgb((np.asarray(values) / 255.0) ** gamma @ primaries_to_d50(primaries).T)


def profile(space, tags, connection=b"XYZ ", kind=b"mntr"):
    """An ICC profile, version 2.1, of these tags."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x" + bytes(80), b"cprt": b"text" + bytes(4) + b"x\0",
            b"wtpt": _xyz(D50), **tags}  # fmt: skip
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"", 0x02100000, kind, space, connection) + bytes(12) + b"acsp"
    head += bytes(28) + _xyz(D50)[8:] + bytes(48)
    return head + table + body


def _xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def _curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def matrix_profile(primaries, gamma):
    columns = primaries_to_d50(primaries).T
    tags = {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    return profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def grey_profile(gamma):
    return profile(b"GRAY", {b"kTRC": _curve(gamma)})


def ink_profile(lab):
    """A CMYK profile of a table with two entries per ink; ``lab`` (2, 2, 2, 2, 3) uint8 as ICC encodes Lab."""
    ramp = np.arange(256, dtype=np.uint8).tobytes()
    table = struct.pack(">4s4sBBBx9i", b"mft1", b"", 4, 3, 2, *(65536 * np.eye(3, dtype=int).ravel()))
    return profile(b"CMYK", {b"A2B0": table + ramp * 4 + lab.tobytes() + ramp * 3}, b"Lab ", b"prtr")


def lab_to_srgb(lab):
    """(..., 3) of ICC's 8-bit Lab (D50) to sRGB in 0 to 255."""
    lightness, a, b = np.moveaxis(np.asarray(lab, float), -1, 0)
    y = (lightness * 100 / 255 + 16) / 116
    f = np.stack([y + (a - 128) / 500, y, y - (b - 128) / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return d50_to_srgb(xyz)


def turned(shown, orientation):
    """What is stored of a (H, W, ...) picture; by the table of EXIF 2.32, 4.6.4 A, pixel by pixel."""
    height, width = shown.shape[:2]
    high, wide = (width, height) if orientation > 4 else (height, width)
    places = {
        1: lambda r, c: (r, c),
        2: lambda r, c: (r, width - 1 - c),
        3: lambda r, c: (height - 1 - r, width - 1 - c),
        4: lambda r, c: (height - 1 - r, c),
        5: lambda r, c: (c, r),
        6: lambda r, c: (c, width - 1 - r),
        7: lambda r, c: (height - 1 - c, width - 1 - r),
        8: lambda r, c: (height - 1 - c, r),
    }
    return np.array([[shown[places[orientation](r, c)] for c in range(wide)] for r in range(high)])


def with_orientation(array, kind, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "TIFF":
        return saved(Image.fromarray(array), kind, tiffinfo={274: orientation}, **options)
    return saved(Image.fromarray(array), kind, exif=exif, **options)
