"""A picture is what a viewer shows: each case against values computed here, from the formats' own definitions."""

import contextlib
import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from tests.data import pictures as p
from zigflow.data import color_profile, picture
from zigflow.data.limits import DecodeError, Limits
from zigflow.data.picture import decode_image

LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}
FORMATS = {
    **LOSSLESS,
    "JPEG": {"quality": 100, "subsampling": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
if "avif" not in features.modules or not features.check("avif"):
    del FORMATS["AVIF"]  # what cannot be written here cannot be tested; that it is named is, below
TOLERANCE = {"JPEG": 4, "AVIF": 6}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(*shape):
    """A ramp without symmetry, which lossy formats keep."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    planes = [8 * x + 2 * y, 160 - 5 * y, 6 * y + x][: shape[2] if len(shape) > 2 else 1]
    return np.stack(planes, axis=-1).astype(np.uint8).reshape(shape)


def far(got, expected):
    assert got.shape == expected.shape and got.dtype == np.uint8
    return np.abs(got.astype(float) - expected).max()


def over(values, alpha, background):
    part = np.asarray(alpha, float)[..., None] / 255
    return np.rint(np.asarray(values, float) * part + np.array(background, float) * (1 - part))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_plain_values_of_every_format(kind, channels):
    image = smooth(16, 24) if channels == 1 else smooth(16, 24, 3)
    got = decode_image(p.saved(Image.fromarray(image), kind, **FORMATS[kind]))
    if channels == 1 and kind in ("WEBP", "AVIF"):
        image = np.repeat(image[..., None], 3, axis=2)  # these formats know color only
    assert far(got, image) <= TOLERANCE.get(kind, 0)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "BMP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation):
    shown = smooth(12, 20, 3)
    stored = p.turned(shown, orientation)
    got = decode_image(p.with_orientation(stored, kind, orientation, **FORMATS[kind]))
    assert far(got, shown) <= TOLERANCE.get(kind, 0)
    if kind == "TIFF":
        packed = p.with_orientation(stored, kind, orientation, compression="tiff_lzw")
        assert far(decode_image(packed), shown) == 0


def test_an_orientation_behind_the_pixels_and_ones_that_say_nothing():
    shown = noise(3, 5)
    block = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    stored = p.turned(shown, 6)
    assert far(decode_image(p.raw_png(stored, 8, 0, after=p.chunk(b"eXIf", block))), shown) == 0
    for broken in (
        b"",
        b"MM",
        b"MM\0*" + bytes([255] * 4),
        block[:12],
        block.replace(b"\0\6\0\0", b"\0\x09\0\0"),
        b"x" * 90,
    ):
        assert far(decode_image(p.raw_png(shown, 8, 0, p.chunk(b"eXIf", broken))), shown) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.tuples(*[st.integers(0, 255)] * 3))
def test_transparency_shows_the_background(seed, background):
    color, alpha = noise(4, 5, 3, seed=seed), noise(4, 5, seed=seed + 1)
    image = Image.fromarray(np.dstack([color, alpha]))
    expected = over(color, alpha, background)
    for kind in ("PNG", "TIFF", "WEBP"):
        assert far(decode_image(p.saved(image, kind, **LOSSLESS[kind]), background=background), expected) == 0
    grey = p.saved(Image.fromarray(np.dstack([color[..., 0], alpha])), "PNG")
    expected = over(np.repeat(color[..., :1], 3, axis=2), alpha, background)
    got = decode_image(grey, background=background)
    assert far(got if got.ndim == 3 else np.repeat(got[..., None], 3, axis=2), expected) == 0
    assert decode_image(grey).ndim == 2, "grey on white stays grey"


def test_transparency_of_lossy_formats_and_what_lies_under_it():
    alpha = np.zeros((16, 16), np.uint8)
    alpha[4:12, 4:12] = 255
    for kind in {"WEBP", "AVIF"} & FORMATS.keys():
        image = Image.fromarray(np.dstack([np.full((16, 16, 3), 40, np.uint8), alpha]))
        got = decode_image(p.saved(image, kind, quality=100))
        assert far(got, over(np.full((16, 16, 3), 40), alpha, (255,) * 3)) <= 6
    hidden = [p.saved(Image.new("RGBA", (4, 4), (level,) * 3 + (0,)), "PNG") for level in (0, 250)]
    assert np.array_equal(*(decode_image(data) for data in hidden))
    assert decode_image(hidden[0]).min() == 255, "white, unless something else is asked for"
    assert decode_image(hidden[0], background=7).max() == 7


def test_palettes():
    index = np.arange(16).reshape(2, 8) % 4
    colors = noise(4, 3)
    palette = p.chunk(b"PLTE", colors.tobytes())
    for depth in (2, 4, 8):
        assert far(decode_image(p.raw_png(index, depth, 3, palette)), colors[index]) == 0
        for alpha in ([0], [255, 0], [10, 200, 0, 77]):
            all_alpha = np.array([*alpha, *[255] * (4 - len(alpha))])
            got = decode_image(
                p.raw_png(index, depth, 3, palette, p.chunk(b"tRNS", bytes(alpha))), background=(1, 2, 3)
            )
            assert far(got, over(colors[index], all_alpha[index], (1, 2, 3))) == 0
    for kind in ("BMP", "TIFF"):
        image = Image.fromarray(colors[index]).quantize(4)
        assert far(decode_image(p.saved(image, kind)), colors[index]) == 0


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_every_depth_and_its_transparent_level(depth):
    most = 2**depth - 1
    values = np.random.default_rng(depth).integers(0, most + 1, (7, 9))
    key = int(values[3, 4])
    values[0, :2] = (min(key + 1, most), max(key - 1, 0))
    expected = np.rint(values * 255 / most)
    assert far(decode_image(p.raw_png(values, depth, 0)), expected) == 0
    assert far(decode_image(p.raw_png(values, depth, 0, interlaced=True)), expected) == 0
    got = decode_image(p.raw_png(values, depth, 0, p.chunk(b"tRNS", struct.pack(">H", key))), background=3)
    assert far(got, np.where(values == key, 3, expected)) == 0


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("color_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_rounded_not_cut(color_type, channels, interlaced):
    values = np.random.default_rng(channels).integers(0, 65536, (9, 6, channels))
    values[0, 0], values[0, 1], values[0, 2] = 0, 65535, 128
    eight = np.rint(values / 257)
    expected = eight
    if color_type in (4, 6):
        expected = over(eight[..., :-1], eight[..., -1], [255] * (channels - 1))
    got = decode_image(p.raw_png(values, 16, color_type, interlaced=interlaced))
    assert far(got, expected[..., 0] if expected.shape[2] == 1 else expected) == 0


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_color(depth):
    values = np.random.default_rng(1).integers(0, 2**depth, (3, 4, 3))
    values[1, 1] = values[0, 0]
    values[2, 2] = values[0, 0] ^ [0, 0, 1]  # the same in the upper eight bits
    data = p.raw_png(values, depth, 2, p.chunk(b"tRNS", struct.pack(">3H", *values[0, 0].tolist())))
    expected = np.rint(values * 255 / (2**depth - 1))
    expected[0, 0] = expected[1, 1] = 255
    assert far(decode_image(data), expected) == 0


@pytest.mark.parametrize("photometric", [0, 1])
def test_sixteen_bit_grey_of_tiff(photometric):
    values = np.random.default_rng(0).integers(0, 65536, (4, 5), dtype=np.uint16)
    data = p.saved(Image.fromarray(values), "TIFF", tiffinfo={262: photometric})
    stored = 65535 - values.astype(int) if photometric == 0 else values
    assert far(decode_image(data), np.rint(stored / 257)) == 0


@pytest.mark.parametrize("name, primaries, gamma", [
    ("Display P3", p.DISPLAY_P3, 2.2), ("Adobe RGB", p.ADOBE_RGB, 563 / 256), ("linear sRGB", p.SRGB, 1.0)
])  # fmt: skip
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "BMP"])
def test_color_profiles(name, primaries, gamma, kind):
    color = smooth(12, 20, 3)
    data = p.saved(
        Image.fromarray(color), kind, icc_profile=p.matrix_profile(primaries, gamma), **FORMATS[kind]
    )
    expected = p.shown_of(color, primaries, gamma)
    assert np.abs(expected - color).max() > 20, "the profile matters"
    assert far(decode_image(data), expected) <= 2 + 3 * TOLERANCE.get(kind, 0)


def test_profiles_beside_alpha_orientation_palettes_and_sixteen_bits():
    profile = p.matrix_profile(p.DISPLAY_P3, 2.2)
    color, alpha = noise(4, 6, 3), noise(4, 6, seed=1)
    shown = p.shown_of(color, p.DISPLAY_P3, 2.2)
    data = p.saved(Image.fromarray(np.dstack([color, alpha])), "PNG", icc_profile=profile)
    assert far(decode_image(data, background=9), over(shown, alpha, (9, 9, 9))) <= 2
    data = p.with_orientation(p.turned(color, 6), "PNG", 6, icc_profile=profile)
    assert far(decode_image(data), shown) <= 2
    packed = p.chunk(b"iCCP", b"x\0\0" + p.zlib.compress(profile))
    assert far(decode_image(p.raw_png(color.astype(int) * 257, 16, 2, packed)), shown) <= 2
    index = np.arange(24).reshape(4, 6)
    data = p.raw_png(index, 8, 3, packed, p.chunk(b"PLTE", color.tobytes()))
    assert far(decode_image(data), shown) <= 2


def test_grey_profiles_and_grey_images_with_profiles_of_color():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = 255 * p.linear_to_srgb((grey / 255.0) ** 1.5)
    for kind in ("PNG", "TIFF", "JPEG"):
        data = p.saved(Image.fromarray(grey), kind, icc_profile=p.grey_profile(1.5), **FORMATS[kind])
        assert far(decode_image(data), expected) <= (2 if kind != "JPEG" else 6)
    data = p.saved(Image.fromarray(grey), "PNG", icc_profile=p.matrix_profile(p.SRGB, 1.5))
    assert far(decode_image(data), expected) <= 2
    with pytest.raises(DecodeError, match="profile is one of L values, the image has RGB"):
        decode_image(p.saved(Image.new("RGB", (2, 2)), "PNG", icc_profile=p.grey_profile(1.5)))


def test_inks_without_and_with_a_profile():
    inks = np.array(list(itertools.product((0, 90, 255), repeat=4)), np.uint8).reshape(9, 9, 4)
    big = np.kron(inks, np.ones((8, 8, 1), np.uint8))  # JPEG keeps areas
    expected = (255 - big[..., :3].astype(float)) * (255 - big[..., 3:]) / 255
    for kind, options in (("TIFF", {}), ("JPEG", {"quality": 100})):
        got = decode_image(p.saved(Image.fromarray(big, "CMYK"), kind, **options))
        assert far(got, expected) <= (1 if kind == "TIFF" else 12)
    # Moderate colors, so that nothing is clipped; all inks together are black, so that no black point is moved.
    lab = np.random.default_rng(0).integers([60, 118, 118], [220, 139, 139], (2, 2, 2, 2, 3)).astype(np.uint8)
    lab[0, 0, 0, 0], lab[1, 1, 1, 1] = (255, 128, 128), (0, 128, 128)
    corners = np.array(list(itertools.product((0, 255), repeat=4)), np.uint8).reshape(4, 4, 4)
    data = p.saved(Image.fromarray(corners, "CMYK"), "TIFF", icc_profile=p.ink_profile(lab))
    assert far(decode_image(data), p.lab_to_srgb(lab.reshape(4, 4, 3))) <= 2


def test_profiles_that_are_srgb_change_nothing_and_cost_one_look(monkeypatch):
    plain = noise(8, 8, 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    monkeypatch.setattr(color_profile, "_kept", {})
    built = []
    monkeypatch.setattr(
        color_profile, "_measure", lambda *a, _f=color_profile._measure: built.append(1) or _f(*a)
    )
    data = p.saved(Image.fromarray(plain), "PNG", icc_profile=profile)
    decode_image(data)

    def never(*_):
        raise AssertionError("a transform was applied")

    monkeypatch.setattr(ImageCms, "applyTransform", never)
    assert all(np.array_equal(decode_image(data), plain) for _ in range(3))
    assert len(built) == 1


def test_many_profiles_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(color_profile, "_kept", {})
    for i in range(40):
        decode_image(p.saved(Image.new("L", (1, 1)), "PNG", icc_profile=p.grey_profile(1 + i / 16)))
    assert len(color_profile._kept) <= 32


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_plain_image_costs_one_copy_and_no_look_at_its_facts(kind, monkeypatch):
    data = p.saved(Image.fromarray(smooth(8, 8, 3)), kind)
    expected = decode_image(data)

    def never(*_, **__):
        raise AssertionError("more than a copy")

    for method in ("convert", "split", "transpose", "resize", "getexif"):
        monkeypatch.setattr(Image.Image, method, never)
    for name in ("_layers", "_sixteen_bits", "_composite", "exif_orientation", "to_srgb", "read_directories"):
        monkeypatch.setattr(picture, name, never)
    copies = []
    monkeypatch.setattr(picture.np, "array", lambda *a, _f=np.array: copies.append(1) or _f(*a))
    assert np.array_equal(decode_image(data), expected)
    assert len(copies) == 1


def animation(kind):
    frames = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    return p.saved(frames[0], kind, save_all=True, append_images=frames[1:])


CICP = p.chunk(b"cICP", bytes((9, 16, 0, 1)))
REFUSED = {
    "an animated PNG": (lambda: animation("PNG"), "animation of 3 frames"),
    "an animated WebP": (lambda: animation("WEBP"), "animation of 3 frames"),
    "an animated AVIF": (lambda: animation("AVIF"), "animation of 3 frames"),
    "pages": (lambda: animation("TIFF"), "3 pages"),
    "floats": (lambda: p.saved(Image.new("F", (2, 2)), "TIFF"), "32 bits"),
    "integers": (lambda: p.saved(Image.new("I", (2, 2)), "TIFF"), "32 bits"),
    "deep color": (lambda: p.raw_tiff([{258: (3, 1, 16), 277: (3, 1, 3)}]), "16 bits per channel and 3 channels"),
    "Lab": (lambda: p.saved(Image.new("LAB", (2, 2)), "TIFF"), "mode LAB"),
    "GIF": (lambda: p.saved(Image.new("L", (2, 2)), "GIF"), "a GIF image, which is not read; convert it"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC image"),
    "JPEG 2000": (lambda: p.saved(Image.new("L", (8, 8)), "JPEG2000"), "a JPEG 2000 image"),
    "HDR": (lambda: p.raw_png(np.zeros((2, 2, 3), int), 8, 2, CICP), "primaries 9, transfer 16"),
    "linear": (lambda: p.raw_png([[1]], 8, 0, p.chunk(b"gAMA", struct.pack(">I", 100000))), "gamma 1.0"),
    "wide": (lambda: p.raw_png(np.zeros((1, 1, 3), int), 8, 2, p.chunk(b"cHRM", struct.pack(
        ">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))), "cHRM"),
    "a broken profile": (lambda: p.saved(Image.new("L", (1, 1)), "PNG", icc_profile=b"junk" * 50), "is damaged"),
    "a cut profile": (lambda: p.saved(Image.new("RGB", (1, 1)), "PNG",
                                      icc_profile=p.matrix_profile(p.SRGB, 2.2)[:200]), "profile cannot be read"),
    "a profile of noise": (lambda: p.raw_png([[1]], 8, 0, p.chunk(b"iCCP", b"x\0\0junk")), "profile is damaged"),
}  # fmt: skip


if "AVIF" not in FORMATS:
    del REFUSED["an animated AVIF"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    build, match = REFUSED[name]
    with pytest.raises(DecodeError, match=match) as error:
        decode_image(build())
    assert "\n" not in str(error.value)


def test_colors_that_say_srgb_are_taken():
    gamma, chroma = (
        p.chunk(b"gAMA", struct.pack(">I", 45455)),
        (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    )
    marked = p.chunk(b"sRGB", b"\0") + p.chunk(b"gAMA", struct.pack(">I", 100000))
    for before in (
        gamma + p.chunk(b"cHRM", struct.pack(">8I", *chroma)),
        marked,
        p.chunk(b"cICP", bytes((1, 13, 0, 1))),
    ):
        assert decode_image(p.raw_png(np.full((1, 1, 3), 9), 8, 2, before)).tolist() == [[[9, 9, 9]]]


def test_previews_are_no_pages():
    assert decode_image(p.raw_tiff([{}, {254: (4, 1, 1)}])).tolist() == [[128]]
    assert decode_image(p.raw_tiff([{}], ">")).tolist() == [[128]]
    assert decode_image(p.raw_tiff([{262: (3, 1, 0)}])).tolist() == [[127]]


def test_a_format_that_this_pillow_cannot_read_is_named(monkeypatch):
    data = b"\0\0\0\x1cftypmif1" + bytes(4) + b"mif1avif" + bytes(20)
    monkeypatch.setattr(picture, "_built_in", lambda kind: kind != "AVIF")
    with pytest.raises(DecodeError, match="an? AVIF image, which this build of pillow cannot read"):
        decode_image(data)


def test_budgets_hold_for_every_format():
    for kind in FORMATS:
        with pytest.raises(DecodeError, match="20 x 12 pixels, the budget is 239"):
            decode_image(p.saved(Image.fromarray(smooth(12, 20, 3)), kind), Limits(max_pixels=239))
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff\xff\0\0"
    with pytest.raises(DecodeError, match="16777216 x 256 pixels"):
        decode_image(b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas)
    with pytest.raises(DecodeError, match="profile of .* bytes, the budget is 99"):
        data = p.saved(Image.new("L", (1, 1)), "PNG", icc_profile=p.grey_profile(2))
        decode_image(data, Limits(max_profile=99))
    with pytest.raises(DecodeError, match="100000 x 100000 pixels"):
        decode_image(p.raw_tiff([{322: (4, 1, 100000), 323: (4, 1, 100000)}]))


@pytest.mark.parametrize("tags, match", [
    (dict.fromkeys(range(40000, 40004), (7, 100, 8)), "tags declare more"),
    ({40000: (7, 2**32 - 1, 8)}, "tags declare more"),
    ({258: (3, 60, 2**32 - 9)}, "declare more|behind"),
])  # fmt: skip
def test_tags_that_unfold_are_refused_before_they_are_read(tags, match, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the file was opened"))
    with pytest.raises(DecodeError, match=match):
        decode_image(p.raw_tiff([tags]))


def test_directories_in_a_circle_or_without_end():
    data = bytearray(p.raw_tiff([{}]))
    data[-4:] = data[4:8]
    with pytest.raises(DecodeError, match="circle"):
        decode_image(bytes(data))
    with pytest.raises(DecodeError, match="65535 tags"):
        decode_image(b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12 * 65535))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_damage_is_decoded_or_refused_but_never_anything_else(kind, at, value, cut):
    image = Image.fromarray(smooth(8, 9, 3))
    options = {} if kind == "BMP" else {"icc_profile": p.matrix_profile(p.ADOBE_RGB, 2.2)}
    data = bytearray(p.saved(image, kind, **options))
    if cut:
        del data[at % len(data) :]
    else:
        data[at % len(data)] = value
    with contextlib.suppress(DecodeError):
        decode_image(bytes(data), Limits(max_pixels=10_000))


@pytest.mark.parametrize("background", [-1, 256, (1, 2), (1, 2, 300), "white", 0.5, True])
def test_backgrounds_that_are_none(background):
    with pytest.raises(ValueError, match="background is a level 0 to 255"):
        picture.background_color(background)
