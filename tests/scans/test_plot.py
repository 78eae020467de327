"""Pictures: written, deterministic, and different when the orders are."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from PIL import Image

from scans import get_scan, list_scans
from scans.animate import animate_scans
from scans.plot import gallery, plot_scans
from zigflow.tools.plot_scans import main


def pixels(path):
    return image.imread(path)[..., :3]


def test_same_call_same_bytes_whatever_the_user_settings(tmp_path):
    one = plot_scans(["hilbert:2"], 4, 6, tmp_path / "one.png")
    with matplotlib.rc_context({"lines.linewidth": 9, "figure.dpi": 33, "font.size": 30}):
        two = plot_scans(["hilbert:2"], 4, 6, tmp_path / "deeper" / "two.png")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", list_scans())
def test_every_scan_can_be_drawn(name, tmp_path):
    picture = pixels(plot_scans([f"{name}:1"], 4, 5, tmp_path / "a.png"))
    assert (picture != 1).any()


def test_different_orders_are_different_pictures(tmp_path):
    first = pixels(plot_scans(["zigzag:1"], 4, 4, tmp_path / "a.png"))
    second = pixels(plot_scans(["spiral:1"], 4, 4, tmp_path / "b.png"))
    assert first.shape == second.shape
    assert (first != second).any()


def test_joint_walks_and_edge_grids(tmp_path):
    for frames, h, w in ((3, 2, 2), (None, 1, 1), (None, 1, 9), (None, 9, 1), (1, 3, 3)):
        assert (pixels(plot_scans(["zigzag:2"], h, w, tmp_path / "a.png", frames)) != 1).any()


def test_at_most_eight_panels(tmp_path):
    eight = pixels(plot_scans(["randomN8"], 3, 3, tmp_path / "a.png"))
    many = pixels(plot_scans(["randomN20"], 3, 3, tmp_path / "b.png"))
    assert eight.shape == many.shape


def test_the_tool_writes_the_gallery(tmp_path, capsys):
    output = tmp_path / "scans.png"
    assert main(["--output", str(output), "--height", "3", "--width", "4"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert output.read_bytes() == plot_scans(None, 3, 4, tmp_path / "b.png").read_bytes()
    assert np.mean(pixels(output) != 1) > 0.1


def test_the_tool_refuses_in_words(tmp_path, capsys):
    output = str(tmp_path / "a.png")
    assert main(["--scan", "hilbrt", "--output", output]) == 2
    assert "Did you mean 'hilbert'" in capsys.readouterr().err
    assert main(["--height", "0", "--output", output]) == 2
    assert "at least 1" in capsys.readouterr().err
    assert main(["--scan", "hilbert_official", "--frames", "2", "--output", output]) == 2
    assert "no joint" in capsys.readouterr().err


def test_no_names_and_no_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no scan to draw"):
        plot_scans([], 4, 4, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_scans(["zigzag:1"], 4, 4, tmp_path / "a.png")


@pytest.mark.parametrize("joint", [False, True])
def test_the_gallery_shows_every_path_that_is_registered(joint):
    shown = gallery(joint)
    sizes = (2, 6, 8) if joint else (12, 16)
    drawn = {path for name in shown for path in get_scan(name)(*sizes)}
    for name in list_scans(dims=3 if joint else 2):
        assert set(get_scan(name)(*sizes)) <= drawn, name
    assert ("hilbert3d" in shown) == joint
    assert "sweep2" not in shown, "its paths are sweep's"


def test_scans_of_videos_alone_are_drawn_over_several_frames(tmp_path):
    alone = plot_scans(["hilbert3d:1"], 3, 3, tmp_path / "a.png").read_bytes()
    assert alone == plot_scans(["hilbert3d:1"], 3, 3, tmp_path / "b.png", frames=4).read_bytes()
    assert alone != plot_scans(["hilbert3d:1"], 3, 3, tmp_path / "c.png", frames=1).read_bytes()


def gif(path):
    """All pictures of an animation as RGB arrays, and how long each is shown."""
    with Image.open(path) as file:
        pictures, times = [], []
        for number in range(file.n_frames):
            file.seek(number)
            pictures.append(np.asarray(file.convert("RGB")).astype(int))
            times.append(file.info["duration"])
        assert file.info["loop"] == 0
    return np.stack(pictures), times


def test_an_animation_grows_token_by_token(tmp_path):
    pictures, times = gif(animate_scans(["zigzag:1"], 3, 4, tmp_path / "deep" / "a.gif"))
    assert len(pictures) == 12, "one picture for each token"
    assert times[-1] > 1000 > times[0]
    # Ink: what the walk has covered of the pale ground; it never shrinks by more than the moving mark.
    ink = (pictures.min(axis=-1) < 200).sum(axis=(1, 2))
    assert (np.diff(ink) > 0).sum() >= 10
    assert ink[-1] > 4 * ink[0]
    # Along a row of four cells, nothing to the right of the token reached is drawn.
    width = pictures.shape[2]
    body = pictures[1][30 : 30 + (width - 28) // 4]
    assert (body[:, width // 2 + 30 :].min(axis=-1) >= 200).all()


def test_long_walks_are_bounded_and_the_same_bytes_come_again(tmp_path):
    one = animate_scans(["hilbert:2", "random:1"], 16, 16, tmp_path / "a.gif", most_pictures=10)
    assert len(gif(one)[0]) == 10
    again = animate_scans(["hilbert:2", "random:1"], 16, 16, tmp_path / "b.gif", most_pictures=10)
    assert one.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", list_scans())
def test_every_scan_can_be_animated(name, tmp_path):
    pictures, _ = gif(animate_scans([f"{name}:1"], 4, 5, tmp_path / "a.gif", most_pictures=3))
    assert (pictures[-1] != pictures[0]).any()


def test_animated_frames_stand_side_by_side(tmp_path):
    pictures, _ = gif(animate_scans(["sweep3d:1"], 4, 4, tmp_path / "a.gif", frames=2, most_pictures=3))
    still, _ = gif(animate_scans(["sweep:1"], 4, 4, tmp_path / "b.gif", most_pictures=3))
    assert pictures.shape[2] > 1.9 * still.shape[2] > 1.5 * pictures.shape[1]


def test_the_tool_animates(tmp_path, capsys):
    output = tmp_path / "a.gif"
    arguments = ["--scan", "zigzag:1", "--height", "3", "--width", "3", "--animate", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(output)]
    assert main([*arguments, "--output", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.split() == [str(output), str(tmp_path / "a.png")]
    assert main([*arguments[:-1], str(tmp_path / "a.png")]) == 2
    assert "ends in .gif" in capsys.readouterr().err


def test_animations_refuse_in_words(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="at least 2 pictures"):
        animate_scans(["zigzag"], 4, 4, tmp_path / "a.gif", most_pictures=1)
    with pytest.raises(ValueError, match="no scan to draw"):
        animate_scans([], 4, 4, tmp_path / "a.gif")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        animate_scans(["zigzag:1"], 4, 4, tmp_path / "a.gif")
