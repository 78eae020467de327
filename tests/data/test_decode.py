"""Decoders: values, budgets, and refusing anything that could run."""

import contextlib
import io
import os
import pickle
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zigflow.data.decode import DECODERS, DecodeError, Limits, cover_crop, decode, to_pixels
from zigflow.data.writer import encode_npy, encode_png


def png(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def tiff(image):
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    return stream.getvalue()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3)])
def test_png_round_trip(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode("image.PNG", encode_png(image)), image)
    assert np.array_equal(decode("png", encode_png(image, compress_level=0)), image)


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_modes(mode, channels):
    image = Image.new(mode, (4, 2), 1 if mode in ("1", "P") else None)
    assert decode("png", png(image)).shape == ((2, 4) if channels == 1 else (2, 4, 3))


def test_jpeg():
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 100, 50)).save(stream, "JPEG", quality=95)
    value = decode("image.jpg", stream.getvalue())
    assert value.shape == (6, 8, 3)
    assert np.abs(value.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("dtype", ["float32", "float16", ">f8", "int64", "uint8", "bool"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(dtype, order):
    array = np.asarray(np.arange(24).reshape(2, 3, 4), dtype=dtype, order=order)
    for data in (npy(array), encode_npy(array)):
        value = decode("x.npy", data)
        assert value.dtype.isnative
        assert value.dtype.kind == array.dtype.kind
        assert np.array_equal(value, array)
        assert value.flags.writeable
    assert decode("npy", npy(np.float32(3))).shape == ()


def test_texts_and_classes():
    assert decode("cls", b" 17\n") == 17
    assert decode("a.txt", "grün".encode()) == "grün"
    assert decode("caption.json", b'["a", "b"]') == ["a", "b"]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "suffix", ["pyd", "pickle", "pkl", "pth", "pt", "npz", "ckpt", "tar", "gz", "exe", ""]
)
def test_what_can_run_is_never_decoded(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecodeError, match="not decoded"):
        decode(suffix, pickle.dumps(Payload()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", sorted(DECODERS))
def test_pickles_under_a_harmless_suffix_do_not_run(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blob = pickle.dumps(Payload())
    objects = npy(np.array([Payload()], dtype=object), allow_pickle=True)
    for data in (blob, objects):
        with pytest.raises(DecodeError):
            decode(suffix, data)
    assert not list(tmp_path.iterdir())


def npy_header(text, body=b"", version=b"\x01\x00"):
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    "data, match",
    [
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"), "budget"),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}", bytes(15)), "15 are there"),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}", bytes(17)), "17 are there"),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "cannot be|npy"),
        (npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "numbers"),
        (npy_header("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}", bytes(16)), "numbers"),
        (npy_header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", bytes(4)), "numbers"),
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", bytes(4), b"\x03\x00"),
            "version",
        ),
        (npy_header("__import__('os').mkdir('owned')"), "not a readable npy"),
        (b"", "not a readable npy"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "not a readable npy"),
    ],
)
def test_damaged_and_hostile_arrays(data, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecodeError, match=match):
        decode("npy", data)
    assert not list(tmp_path.iterdir())


def test_an_image_bomb_is_refused_from_its_header():
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big") * 2
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + b"\x08\x02\0\0\0")
        + chunk(b"IDAT", zlib.compress(bytes(99)))
    )
    with pytest.raises(DecodeError, match=r"60000 x 60000 pixels|Bomb"):
        decode("png", bomb)
    with pytest.raises(DecodeError, match="4 x 4 pixels, the budget is 15"):
        decode("png", encode_png(np.zeros((4, 4), np.uint8)), Limits(max_pixels=15))


@pytest.mark.parametrize(
    "suffix, data, match",
    [
        ("json", b"[" * 200_000, "JSON"),
        ("json", b"{", "JSON"),
        ("json", b"1" * 10_000, "JSON"),
        ("txt", b"\xff\xfe", "UTF-8"),
        ("cls", b"-1", "class"),
        ("cls", b"1.5", "class"),
        ("cls", b"1" * 40, "class"),
        ("cls", b"", "class"),
        ("png", b"", "image"),
        ("jpg", b"\xff\xd8\xff\xe0", "image"),
        ("png", b"GIF89a" + bytes(40), "image"),
        ("tif", tiff(Image.new("F", (2, 2))), "32 bits"),
        ("gif", b"GIF89a" + bytes(40), "not decoded"),
    ],
)
def test_damaged_members(suffix, data, match):
    with pytest.raises(DecodeError, match=match):
        decode(suffix, data)


def test_budgets_of_bytes_and_text():
    with pytest.raises(DecodeError, match="budget of a member is 10"):
        decode("txt", b"x" * 11, Limits(max_bytes=10))
    with pytest.raises(DecodeError, match="11 bytes of text"):
        decode("json", b"x" * 11, Limits(max_text=10))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(DECODERS)), st.binary(max_size=200))
def test_noise_is_decoded_or_refused_but_never_anything_else(suffix, data):
    with contextlib.suppress(DecodeError):
        decode(suffix, data)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["png", "npy"]), st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_decoded_or_refused(suffix, at, change):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    data = bytearray(encode_png(image) if suffix == "png" else encode_npy(image))
    data[at % len(data)] ^= change
    with contextlib.suppress(DecodeError):
        decode(suffix, bytes(data))


def test_pixels_span_minus_one_to_one():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = to_pixels(levels, 1)
    assert pixels.shape == (1, 16, 16)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8)[0], torch.from_numpy(levels))
    assert torch.equal(to_pixels(levels, 3), pixels.expand(3, 16, 16))
    color = np.stack([levels] * 3, axis=2)
    assert torch.equal(to_pixels(color, 1), pixels)
    assert torch.equal(to_pixels(levels[..., None], 1, (16, 16)), pixels)
    for channels, image in ((2, levels), (3, levels.astype(np.float32)), (3, levels[0])):
        with pytest.raises(ValueError):
            to_pixels(image, channels)


@pytest.mark.parametrize("size, target", [((30, 20), (10, 10)), ((20, 30), (10, 10)), ((7, 9), (16, 24))])
def test_cropping_keeps_the_center_and_the_aspect_ratio(size, target):
    width, height = size
    ramp = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    out = np.asarray(cover_crop(Image.fromarray(ramp), *target)).astype(float)
    assert out.shape == target
    assert np.abs(out - out[:, ::-1] * -1 - 255).mean() < 8, "a ramp stays symmetric about the center"
    scale = min(width / target[1], height / target[0])
    assert abs((out[0, -2] - out[0, 1]) / (target[1] - 3) - 255 / (width - 1) * scale) < 3
