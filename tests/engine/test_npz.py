"""The .npz of the ADM evaluation suite, written image by image."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from zigflow.engine.npz import npz_name, write_npz


def pictures(count=5, channels=3, height=4, width=6):
    return np.random.default_rng(0).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def test_what_numpy_reads_back(tmp_path):
    images = pictures()
    path = write_npz(tmp_path / npz_name(5, 4, 6), iter(images), 5, np.arange(5))
    assert path.name == "samples_5x4x6x3.npz"
    with np.load(path, allow_pickle=False) as found:
        assert sorted(found.files) == ["arr_0", "arr_1"]
        assert (found["arr_0"].dtype, found["arr_1"].dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(found["arr_0"], images.transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(found["arr_1"], np.arange(5))
    assert zipfile.ZipFile(path).testzip() is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_gray_becomes_color_and_no_labels_no_second_array(tmp_path):
    images = pictures(channels=1)
    with np.load(write_npz(tmp_path / "a.npz", images, 5, None)) as found:
        assert found.files == ["arr_0"]
        for channel in range(3):
            np.testing.assert_array_equal(found["arr_0"][..., channel], images[:, 0])


def test_videos_are_frames(tmp_path):
    strips = pictures(count=2, width=12)
    with np.load(write_npz(tmp_path / "a.npz", strips, 2, None, frames=3)) as found:
        assert found["arr_0"].shape == (2, 3, 4, 4, 3)
        np.testing.assert_array_equal(found["arr_0"][1, 2], strips[1, :, :, 8:].transpose(1, 2, 0))


def test_equal_samples_are_equal_files(tmp_path):
    one, two = (write_npz(tmp_path / name, pictures(), 5, None).read_bytes() for name in ("a.npz", "b.npz"))
    assert one == two


@pytest.mark.parametrize("given", [4, 6])
def test_a_wrong_number_or_shape_leaves_nothing(tmp_path, given):
    with pytest.raises(ValueError, match="images"):
        write_npz(tmp_path / "a.npz", pictures(given), 5, None)
    mixed = [*pictures(2), *pictures(1, height=5)]
    with pytest.raises(ValueError, match="image 2 has shape"):
        write_npz(tmp_path / "a.npz", mixed, 3, None)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_number(tmp_path):
    image = pictures(1, height=64, width=64)[0]
    tracemalloc.start()
    write_npz(tmp_path / "a.npz", (image for _ in range(2000)), 2000, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 2000 * image.nbytes
    assert peak < 2000 * image.nbytes / 10
