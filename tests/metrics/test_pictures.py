"""Pictures hold what they should at the pixels where it should be."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import zigflow.metrics
from zigflow.metrics.pictures import _smooth_log, save_frame_grid, save_loss_curve, save_sample_grid

HISTORY = [(s, s * 128, 0.3 + float(np.exp(-s / 50))) for s in range(1, 200)]


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_class_in_its_row(tmp_path, channels):
    labels = torch.tensor([2, 0, 2, 2, 0])
    images = torch.randint(0, 256, (5, channels, 6, 8), dtype=torch.uint8)
    path = save_sample_grid(tmp_path / "a" / "grid.png", images, labels, columns=2, scale=5, margin=3)
    picture = np.asarray(Image.open(path))
    assert picture.shape[0] == 3 + 2 * (30 + 3)
    gutter = picture.shape[1] - 2 * (40 + 3)
    for row, shown in enumerate([(1, 4), (0, 2)]):
        for column, index in enumerate(shown):
            top, left = 3 + row * 33, gutter + column * 43
            cell = picture[top : top + 30, left : left + 40]
            want = images[index].permute(1, 2, 0).expand(-1, -1, 3).numpy().repeat(5, 0).repeat(5, 1)
            assert np.array_equal(cell, want)
        # The class number is drawn in the gutter of its row.
        assert picture[3 + row * 33 : 33 + row * 33, :gutter].min() < 100


def test_real_digits_are_enlarged_to_be_visible(tmp_path, digits):
    picture = Image.open(save_sample_grid(tmp_path / "g.png", *digits["heldout"]))
    assert picture.height >= 10 * 48
    assert picture.width >= 10 * 48


def test_missing_places_stay_gray_and_wide_labels_fit(tmp_path):
    images, labels = np.zeros((3, 1, 8, 8), np.uint8), np.array([7, 7, 1234])
    picture = np.asarray(Image.open(save_sample_grid(tmp_path / "g.png", images, labels)))
    assert (picture[-20, -20] == 232).all()
    assert (picture[20, -20] == 0).all()
    assert (picture[:, 0] == 255).all()


def test_bad_grids_are_refused(tmp_path):
    images, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="uint8"):
        save_sample_grid(tmp_path / "g.png", images.float(), labels)
    with pytest.raises(ValueError, match="RGB"):
        save_sample_grid(tmp_path / "g.png", images.repeat(1, 2, 1, 1), labels)
    with pytest.raises(ValueError, match="one per image"):
        save_sample_grid(tmp_path / "g.png", images, labels[:1])
    with pytest.raises(ValueError, match="RGB"):
        save_sample_grid(tmp_path / "g.png", images[:0], labels[:0])
    with pytest.raises(ValueError, match="columns"):
        save_sample_grid(tmp_path / "g.png", images, labels, columns=0)


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], HISTORY[:2], [(s, 0, 1.0) for s in range(4)]])
def test_loss_curves_of_any_length(tmp_path, history):
    path = save_loss_curve(tmp_path / "b" / "loss.png", history, title="digits")
    assert is_png(path)
    assert Image.open(path).size == (960, 540)


def test_smoothing_keeps_powers_and_removes_noise():
    steps = np.array([0.0, 1, 2, 5, 9, 10, 40])
    assert _smooth_log(steps, np.full(7, 0.2), 3.0) == pytest.approx(np.full(7, 0.2))
    steps = np.arange(400.0)
    trend = 0.99**steps
    noisy = trend * np.exp(0.3 * np.random.default_rng(0).normal(size=400))
    middle = slice(60, 340)
    # Centered, the mean of the logarithm does not lag behind an exponential.
    assert _smooth_log(steps, trend, 8.0)[middle] == pytest.approx(trend[middle], rel=2e-3)
    error = np.abs(np.log(_smooth_log(steps, noisy, 8.0) / trend))[middle]
    assert error.mean() < 0.1


def test_bad_histories_are_refused(tmp_path):
    path = tmp_path / "l.png"
    for history, message in [
        ([], "no loss"),
        ([(1, 2)], "rows"),
        ([(2, 2, 1.0), (1, 1, 1.0)], "increase"),
        ([(1, 1, 1.0), (2, 2, float("nan"))], "step 2 is nan"),
        ([(1, 1, 0.0)], "step 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_loss_curve(path, history)
    with pytest.raises(ValueError, match="half_life"):
        save_loss_curve(path, HISTORY, half_life=0)
    assert not path.exists()


@pytest.mark.parametrize(
    "path", sorted(Path(zigflow.metrics.__file__).parent.glob("*.py")), ids=lambda p: p.name
)
def test_picture_and_data_libraries_are_imported_at_use(path):
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    assert not found & {"matplotlib", "PIL", "sklearn", "scipy"}


def test_frames_of_a_video_in_reading_order(tmp_path):
    frames = np.arange(1, 7, dtype=np.uint8)[:, None, None, None] * np.ones((6, 3, 4, 4), np.uint8) * 40
    strip = frames.transpose(1, 2, 0, 3).reshape(3, 4, 24)
    with Image.open(save_frame_grid(tmp_path / "deep" / "a.png", strip, 6, margin=1)) as image:
        pixels = np.asarray(image)
    assert pixels.shape[1] == 2 * 4 + 1 and pixels.shape[0] == 3 * 4 + 2, "two columns, three rows"
    found = [pixels[5 * row, 5 * column, 0] for row in range(3) for column in range(2)]
    assert found == [40, 80, 120, 160, 200, 240]
    gray = save_frame_grid(tmp_path / "b.png", strip[:1], 6)
    assert Image.open(gray).mode == "RGB"
    with pytest.raises(ValueError, match="expected"):
        save_frame_grid(tmp_path / "c.png", strip, 5)
