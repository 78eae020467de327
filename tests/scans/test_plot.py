"""Pictures: written, deterministic, and different when the orders are."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from scans import list_scans
from scans.plot import DEFAULT_NAMES, plot_scans
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
    assert output.read_bytes() == plot_scans(DEFAULT_NAMES, 3, 4, tmp_path / "b.png").read_bytes()
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
