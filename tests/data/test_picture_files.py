"""Folders of images: the same pixels by every reader, and nothing left out or taken without a word."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from tests.data import pictures as p
from zigflow.data.decode import to_pixels
from zigflow.data.facts import facts_of
from zigflow.data.limits import DecodeError
from zigflow.data.subset import Subset
from zigflow.datasets.image_folder import ImageFolderSource
from zigflow.datasets.shards import ShardSource
from zigflow.metrics.stored_images import StoredImages
from zigflow.tools.__main__ import main

SIZE = (8, 12)


def image(value=90, size=SIZE, kind="PNG", **options):
    return p.saved(Image.fromarray(np.full((*size, 3), value, np.uint8)), kind, **options)


def fill(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """A class with one file of each case that readers answer differently: turned, transparent, wide-gamut, deep, ..."""
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, SIZE, dtype=np.uint8)
    profile = p.matrix_profile(p.DISPLAY_P3, 2.2)
    files = {
        "a.png": p.with_orientation(p.turned(color, 6), "PNG", 6, icc_profile=profile),
        "b.jpg": p.with_orientation(p.turned(color, 3), "JPEG", 3, quality=95),
        "c.webp": p.saved(Image.fromarray(np.dstack([color, alpha])), "WEBP", lossless=True),
        "d.tif": p.with_orientation(p.turned(color, 8), "TIFF", 8),
        "e.bmp": p.saved(Image.fromarray(255 - color), "BMP"),
        "f.avif": p.saved(Image.fromarray(color), "AVIF"),
        "g.png": p.raw_png(rng.integers(0, 65536, (*SIZE, 3)), 16, 2),
        "h.jpeg": p.saved(Image.fromarray(np.dstack([color, alpha]), "CMYK"), "JPEG"),
        "i.PNG": p.saved(Image.fromarray(color).quantize(8), "PNG", transparency=2),
    }
    return fill(tmp_path_factory.mktemp("kinds"), {f"only/{name}": data for name, data in files.items()})


def test_every_reader_gives_the_same_pixels(every_kind, tmp_path):
    folder = ImageFolderSource(every_kind, SIZE)
    expected = {folder[i]["key"]: folder[i]["pixels"] for i in range(len(folder))}
    assert len(expected) == 9
    base = ["make-shards", "folder", "--input", str(every_kind)]
    assert main([*base, "--output", str(tmp_path / "kept"), "--shard-size", "1"]) == 0
    assert main([*base, "--output", str(tmp_path / "written"), "--resize", "8"]) == 0
    stored = StoredImages(every_kind / "only", 4)
    shown = [picture for i in range(stored.num_rounds) for picture in stored.round(i)[0]]
    kept, written = ShardSource(tmp_path / "kept"), ShardSource(tmp_path / "written")
    tars = sorted((tmp_path / "kept").glob("*.tar"))
    streamed = [ShardSource.stream(str(tar), cache_dir=tmp_path / "cache").first["pixels"] for tar in tars]
    square = ImageFolderSource(every_kind, 8)
    for i, (name, pixels) in enumerate(expected.items()):
        assert np.array_equal(to_pixels(shown[i].permute(1, 2, 0).numpy(), 3), pixels), f"evaluate: {name}"
        # Order is the writers' own: every image is there once.
        assert sum(bool((kept[j]["pixels"] == pixels).all()) for j in range(9)) == 1, f"shards: {name}"
        assert sum(bool((other == pixels).all()) for other in streamed) == 1, f"stream: {name}"
        small = square[i]["pixels"]
        assert any((written[j]["pixels"] - small).abs().max() < 1e-6 for j in range(9)), f"--resize: {name}"
    suffixes = {
        entry.suffix for j in range(9) for entry in kept.reader.sample(*kept.reader.split_index(j)).entries
    }
    assert {"image.png", "image.jpg", "image.webp", "image.tiff", "image.bmp", "image.avif"} < suffixes


def test_the_background_is_a_parameter_of_every_reader(tmp_path):
    clear = p.saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")
    root = fill(tmp_path / "in", {"a/0.png": clear, "a/1.png": clear})
    base = ["make-shards", "folder", "--input", str(root), "--output"]
    assert main([*base, str(tmp_path / "kept")]) == 0
    assert main([*base, str(tmp_path / "gray"), "--resize", "8", "--background", "51"]) == 0
    white, gray = ImageFolderSource(root, 8), ImageFolderSource(root, 8, background=51)
    assert (white[0]["pixels"] == 1).all() and (gray[0]["pixels"] - 51 / 127.5 + 1).abs().max() < 1e-6
    assert (
        white.fingerprint != gray.fingerprint == ImageFolderSource(root, 8, background=[51] * 3).fingerprint
    )
    assert white.fingerprint == ImageFolderSource(root, 8, background=255).fingerprint
    assert np.array_equal(ShardSource(tmp_path / "kept", background=51)[0]["pixels"], gray[0]["pixels"])
    assert np.array_equal(ShardSource(tmp_path / "gray")[0]["pixels"], gray[0]["pixels"])
    kept = [ShardSource(tmp_path / "kept", background=level).fingerprint for level in (255, 51)]
    assert kept[0] != kept[1] and kept[0] == ShardSource(tmp_path / "kept").fingerprint
    judged = StoredImages(tmp_path / "in" / "a", background=51).round(0)[0]
    assert (judged == 51).all() and (StoredImages(tmp_path / "in" / "a").round(0)[0] == 255).all()
    with pytest.raises(ValueError, match="background is a level"):
        ShardSource(tmp_path / "kept", background="white")


def test_a_background_that_would_be_lost(tmp_path, capsys):
    fill(tmp_path / "in", {"0.png": image()})
    command = ["make-shards", "folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main([*command, "--background", "0"]) == 1
    assert "--background needs --resize" in capsys.readouterr().err
    assert main([*command, "--resize", "4", "--background", "300"]) == 1
    assert "0 to 255" in capsys.readouterr().err


def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path, caplog):
    files = {"a/0.png": image(), "b/0.png": image(), "b/deep/1.jpg": image(kind="JPEG")}
    other = {
        "a/x.gif": b"", "a/y.gif": b"", "b/notes.txt": b"", "b/README": b"", "a/Thumbs.db": b"", "b/._0.png": b"",
        "a/.ipynb_checkpoints/0-checkpoint.png": image(), "b/.thumbnails/0.png": image(), "b/@eaDir/0.png": image(),
        "__MACOSX/a/._0.png": b"", ".cache/0.png": image(),
    }  # fmt: skip
    fill(tmp_path, files | other)
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with caplog.at_level(logging.INFO):
        source = ImageFolderSource(tmp_path, 8)
    assert [path.as_posix() for path in source.files] == sorted(files)
    assert source.class_names == ("a", "b")
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = line.getMessage()
    for part in (
        f"{tmp_path}: 3 images in 2 classes are read (2 png, 1 jpg)", "2 .gif files (first a/x.gif)",
        "1 .txt files (first b/notes.txt)", "1 files without a suffix (first b/README)",
        "5 hidden folders (first .cache)",
        "2 hidden files (first a/Thumbs.db)", "1 links that lead nowhere (first a/gone.png)",
    ):  # fmt: skip
        assert part in text
    assert "\n" not in text and source.left_out in text


def test_a_clean_folder_is_no_warning(tmp_path, caplog):
    fill(tmp_path, {"a/0.jpg": image(kind="JPEG"), "b/0.jpeg": image(kind="JPEG")})
    assert ImageFolderSource(tmp_path, 8).left_out == ""
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("held", [{}, {"0.gif": b""}, {".thumbnails/0.png": b""}])
def test_a_class_without_an_image_is_an_error_for_every_reader(tmp_path, capsys, held):
    fill(tmp_path, {"in/ant/0.png": image(), "in/cat/0.png": image()})
    (tmp_path / "in" / "bee").mkdir()
    fill(tmp_path / "in" / "bee", held)
    with pytest.raises(ValueError, match="class folder .*bee holds no image .* but (nothing|1 )"):
        ImageFolderSource(tmp_path / "in", 8)
    command = ["make-shards", "folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "bee holds no image" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("train", "val"), ("Train",)])
def test_parts_of_a_set_are_no_classes(tmp_path, capsys, names):
    fill(tmp_path, {f"in/{name}/{animal}/0.png": image() for name in names for animal in ("ant", "bee")})
    with pytest.raises(ValueError, match=rf"parts of a set .*\(ant, bee\): give .*in/{names[0]}$"):
        ImageFolderSource(tmp_path / "in", 8)
    command = ["make-shards", "folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "holds parts of a set" in capsys.readouterr().err
    assert ImageFolderSource(tmp_path / "in" / names[0], 8).class_names == ("ant", "bee")


def test_classes_whose_images_all_lie_deeper_are_said(tmp_path, caplog):
    fill(tmp_path, {"train/red/0.png": image(), "car/red/0.png": image(), "car/blue/0.png": image()})
    assert ImageFolderSource(tmp_path, 8).class_names == ("car", "train")
    assert "the classes are car, train; what their folders hold (blue, red)" in caplog.text
    caplog.clear()
    fill(tmp_path, {"train/1.png": image()})
    ImageFolderSource(tmp_path, 8)
    assert "the classes are" not in caplog.text


def test_folders_that_hold_nothing_to_read_say_what_they_hold(tmp_path):
    fill(tmp_path, {"x.gif": b"", "sub/y.heic": b""})
    with pytest.raises(
        ValueError, match=r"holds no images \(png, .*\); it holds 1 \.gif files \(first x\.gif\)"
    ):
        ImageFolderSource(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match=r"1 \.gif files .*1 folders \(first sub\)"):
        StoredImages(tmp_path)


def test_links_below_a_class_are_followed_once_and_circles_end(tmp_path, caplog):
    root = fill(tmp_path / "in", {"a/0.png": image(), "b/0.png": image()})
    fill(tmp_path, {"elsewhere/1.png": image(), "elsewhere/deep/2.png": image()})
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "linked_again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(root / "a")
    (root / "c").symlink_to(tmp_path / "elsewhere" / "deep")
    source = ImageFolderSource(root, 8)
    names = [path.as_posix() for path in source.files]
    assert names == ["a/0.png", "a/linked/1.png", "a/linked/deep/2.png", "b/0.png", "c/2.png"]
    assert "2 folders reached twice by links (first a/linked/circle)" in source.left_out


def test_order_of_files_is_that_of_their_paths(tmp_path):
    names = ["a-b/1.png", "a/1.png", "a/b/1.png", "a/b-c/1.png", "a/b.png", "a/B/1.png", "a/b/c/1.png"]
    fill(tmp_path, {f"top/{name}": image() for name in names})
    got = [path.as_posix() for path in ImageFolderSource(tmp_path, 8).files]
    assert got == [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / "top").rglob("*.png"))]


def test_formats_of_judged_folders(tmp_path):
    files = {
        "0.png": image(0),
        "1.jpg": image(10, kind="JPEG"),
        "2.webp": image(20, kind="WEBP", lossless=True),
    }
    stored = StoredImages(fill(tmp_path, files))
    images, ids, _ = stored.round(0)
    assert ids.tolist() == [0, 1, 2] and images[:, 0, 0, 0].tolist() == [0, 10, 20]


@pytest.mark.parametrize("names, match", [
    (["0.png", "1.png", "sheet.png"], r"2 images whose names are numbers \(first 0\.png\) and 1 others"),
    (["0.png", "1.png", "1_b.png"], r"1 others \(first 1_b\.png\)"),
    (["1.png", "1.jpg"], r"1\.jpg and 1\.png are both number 1"),
    (["01.png", "1.png"], r"01\.png and 1\.png are both number 1"),
])  # fmt: skip
def test_names_that_would_change_what_is_judged_are_refused(tmp_path, names, match):
    fill(tmp_path, {name: image(kind="JPEG" if name.endswith("jpg") else "PNG") for name in names})
    with pytest.raises(ValueError, match=match):
        StoredImages(tmp_path)


def test_a_grid_beside_images_is_left_out_and_said(tmp_path, caplog):
    fill(tmp_path, {f"img_{i}.png": image(i) for i in range(3)} | {"grid.png": image(size=(50, 90))})
    stored = StoredImages(tmp_path)
    assert (len(stored), len(stored.round(0)[0])) == (3, 3)
    assert "3 images are read; left out are 1 grids of samples (first grid.png)" in caplog.text
    caplog.clear()
    # Beside the facts of our own sampling it is expected.
    fill(tmp_path, {"sampling.json": b"{}", "results.json": b"{}", "videos/0.png": image()})
    assert len(StoredImages(tmp_path)) == 3 and not caplog.text
    for path in tmp_path.glob("img_*"):
        os.remove(path)
    (tmp_path / "sampling.json").unlink()
    assert len(StoredImages(tmp_path)) == 1, "alone it is an image"


@pytest.mark.parametrize("odd", [image(size=(9, 12)), p.saved(Image.new("L", (12, 8)), "PNG"), b"text"])
def test_an_image_of_another_kind_is_named(tmp_path, odd):
    stored = StoredImages(fill(tmp_path, {"0.png": image(), "1.png": image(), "2.png": odd}), 2)
    stored.round(0)
    with pytest.raises(ValueError, match=r"2\.png"):
        stored.round(1)


def test_a_bad_file_is_named_by_make_shards(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    fill(
        tmp_path / "in",
        {"0.png": image(), "1.webp": p.saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])},
    )
    assert (
        main(["make-shards", "folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
        == 1
    )
    assert "1.webp: an animation of 3 frames" in capsys.readouterr().err
    with pytest.raises(DecodeError, match=r"1\.webp: an animation"):
        ImageFolderSource(tmp_path / "in", 8)[1]


def test_a_folder_without_a_size_or_number_of_channels(tmp_path, caplog):
    grey = p.saved(Image.new("L", SIZE), "PNG")
    mixed = fill(tmp_path / "mixed", {"0.png": grey, "1.png": image(), "2.png": b"text"})
    with pytest.raises(ValueError, match=r"set data\.image_size=N"):
        ImageFolderSource(mixed, None)
    source = ImageFolderSource(mixed, 4, channels=None)
    assert source.image_shape == (3, 4, 4) == tuple(source[0]["pixels"].shape)
    assert "1 of 2 images that were looked at are grey" in caplog.text
    assert ImageFolderSource(fill(tmp_path / "g", {"0.png": grey}), 4, channels=None).image_shape == (1, 4, 4)


def test_damage_at_the_front_of_a_folder_is_passed_over_only_where_that_is_allowed(tmp_path):
    root = fill(tmp_path, {"0.png": b"text", "1.png": b"text", "2.png": image()})
    assert ImageFolderSource(root, 4, max_skipped=2).first["key"] == "2.png"
    assert facts_of(ImageFolderSource(root, 4, max_skipped=2), "x").fields == ("pixels",)
    assert facts_of(Subset(ImageFolderSource(root, 4, max_skipped=2), 2), "x").fields == ("pixels",)
    for allowed in (0, 1):
        with pytest.raises(ValueError, match=rf"{allowed}\.png"):
            facts_of(ImageFolderSource(root, 4, max_skipped=allowed), "x")
