"""Registering, finding and refusing names; plug-ins through the entry-point group."""

import importlib.metadata
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scans
from scans import ScanPath, UnknownScanError, get_scan, list_scans, parse_scan_type, register_scan, registry


@pytest.fixture
def clean(monkeypatch):
    """Names registered by a test are gone after it."""
    list_scans()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.setattr(registry, "_BROKEN_PLUGINS", {})


def test_unknown_names_get_near_matches():
    with pytest.raises(
        UnknownScanError, match=r"unknown scan 'zigzg'. Did you mean 'zigzag' .*hilbert"
    ) as caught:
        get_scan("zigzg")
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)


def test_a_new_scan_is_found_everywhere(clean):
    @register_scan("raster_t")
    def raster_t(h, w):
        """Columns."""
        return [np.arange(h * w).reshape(h, w).T.ravel(), ScanPath(range(h * w), name="rows")]

    assert "raster_t" in list_scans()
    assert "raster_t" in list_scans(dims=2)
    assert "raster_t" not in list_scans(dims=3)
    columns, rows = get_scan("raster_t")(2, 3)
    np.testing.assert_array_equal(columns.order, [0, 3, 1, 4, 2, 5])
    assert (columns.name, columns.shape) == ("raster_t[0]", (2, 3))
    assert (rows.name, rows.shape) == ("rows", (2, 3))
    assert get_scan("raster_t").dims == (2,)
    assert get_scan("raster_t").summary == "Columns."
    assert parse_scan_type("raster_t").schedule(3, 1, 2, 3)[2].path == columns
    assert raster_t(2, 3)[1].is_identity


def test_one_name_has_an_image_and_a_video_form(clean):
    @register_scan("both")
    def image(h, w):
        return [np.arange(h * w)]

    @register_scan("both")
    def video(t, h, w):
        return [np.arange(t * h * w)[::-1]]

    assert get_scan("both").dims == (2, 3)
    assert get_scan("both")(2, 2)[0].is_identity
    assert get_scan("both")(2, 2, 2)[0].order[0] == 7
    assert get_scan("both").over(1, 2, 2)[0].shape == (2, 2)


def test_duplicates_name_both_modules(clean):
    def other(h, w):
        return [np.arange(h * w)]

    other.__module__ = "somebody.scans"
    with pytest.raises(ValueError, match=r"'zigzag' over \(h, w\).*scans\.zigzag\.zigzag.*somebody\.scans"):
        register_scan("zigzag")(other)


def test_a_reloaded_module_replaces_its_own(clean):
    def first(h, w):
        return [np.arange(h * w)]

    def second(h, w):
        return [np.arange(h * w)[::-1]]

    second.__qualname__ = first.__qualname__
    register_scan("mine")(first)
    assert get_scan("mine")(2, 2)[0].is_identity
    register_scan("mine")(second)
    assert not get_scan("mine")(2, 2)[0].is_identity


@pytest.mark.parametrize(
    "name", ["Zigzag", "zigzagN8", "v2", "video_sst", "zzvideo_x", "from_model", "a b", "", "1a"]
)
def test_names_that_mean_something_else(name, clean):
    with pytest.raises(ValueError, match="cannot name a scan"):
        register_scan(name)(lambda h, w: [])


@pytest.mark.parametrize(
    "function", [lambda n: [], lambda a, b, c, d: [], lambda h, w, *, seed: [], lambda *sizes: []]
)
def test_signatures_are_checked(function, clean):
    with pytest.raises(TypeError, match=r"must take \(h, w\) or \(t, h, w\)"):
        register_scan("odd")(function)


@pytest.mark.parametrize(
    "result, error, words",
    [
        (lambda n: [np.arange(n - 1)], ValueError, r"'bad'.*\(2, 3\).*5 tokens.*6"),
        (lambda n: [np.arange(n), np.zeros(n, int)], ValueError, r"bad\[1\].*not a bijection"),
        (lambda n: [np.linspace(0, 1, n)], TypeError, "float64"),
        (lambda n: np.arange(n), ValueError, "one-dimensional"),
        (lambda n: [], ValueError, "no path"),
    ],
)
def test_what_a_function_returns_is_checked(result, error, words, clean):
    @register_scan("bad")
    def bad(h, w):
        return result(h * w)

    with pytest.raises(error, match=words):
        get_scan("bad")(2, 3)


def test_options():
    assert get_scan("random").options == ("seed", "count")
    with pytest.raises(TypeError, match="'zigzag' has no option seed; it has: none"):
        get_scan("zigzag")(4, 4, seed=1)
    with pytest.raises(TypeError, match="'random' has no option sed; it has: seed, count"):
        get_scan("random")(4, 4, sed=1)


def test_missing_forms_name_those_that_have_them(clean):
    with pytest.raises(
        ValueError, match=r"'hilbert_official' has no joint.*hilbert, .*random.*zigzag.*video_sst"
    ):
        get_scan("hilbert_official")(2, 4, 4)
    with pytest.raises(ValueError, match="got 4 sizes"):
        get_scan("zigzag")(2, 4, 4, 4)

    @register_scan("deep")
    def deep(t, h, w):
        return [np.arange(t * h * w)]

    with pytest.raises(ValueError, match=r"'deep' has only a joint.*zigzag"):
        get_scan("deep")(4, 4)
    assert get_scan("deep").over(1, 4, 4)[0].shape == (1, 4, 4)
    assert parse_scan_type("deep").schedule(2, 1, 4, 4)[0].path.is_identity


class FakePoint:
    """An entry point whose loading runs a function."""

    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"{name}_package.scans", load


@pytest.fixture
def plugins(clean, monkeypatch):
    def install(*points):
        calls = []

        def entry_points(*, group):
            calls.append(group)
            return points

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        monkeypatch.setattr(registry, "_plugins_loaded", False)
        return calls

    return install


def load_peano():
    @register_scan("peano")
    def peano(h, w):
        return [np.arange(h * w)[::-1]]


def test_plugins_load_at_the_first_unknown_name(plugins):
    calls = plugins(FakePoint("good", load_peano))
    get_scan("zigzag")
    assert calls == []
    assert get_scan("peano")(2, 2)[0].order[0] == 3
    assert calls == ["zigflow.scans"]
    assert "peano" in list_scans()
    assert parse_scan_type("peano").scan == "peano"
    assert calls == ["zigflow.scans"]


def test_plugins_are_listed(plugins):
    plugins(FakePoint("good", load_peano))
    assert "peano" in list_scans()


def test_a_broken_plugin_is_reported_and_harms_nobody(plugins, caplog):
    def broken():
        register_scan("half")(lambda h, w: [np.arange(h * w)])
        raise RuntimeError("no such table")

    plugins(FakePoint("bad", broken), FakePoint("good", load_peano))
    with caplog.at_level(logging.WARNING, logger="scans"):
        names = list_scans()
    assert "peano" in names
    assert "zigzag" in names
    assert "half" not in names
    assert len(caplog.records) == 1
    assert "'bad'" in caplog.text
    assert "RuntimeError: no such table" in caplog.text
    with pytest.raises(
        UnknownScanError, match="Plug-in 'bad' could not be loaded: RuntimeError: no such table"
    ):
        get_scan("half")
    with pytest.raises(UnknownScanError, match="Plug-in 'bad'"):
        parse_scan_type("halfN4")
    assert len(caplog.records) == 1


def test_a_plugin_cannot_take_our_names(plugins, caplog):
    def steal():
        register_scan("hilbert")(lambda h, w: [np.arange(h * w)])

    plugins(FakePoint("thief", steal))
    list_scans()
    assert "already registered by scans.hilbert.hilbert" in caplog.text
    assert not get_scan("hilbert")(4, 4)[0].is_identity


def test_scans_needs_numpy_only():
    """Alone, isolated from the site: no torch, no matplotlib, no zigflow, no hydra."""
    code = (
        "import sys, scans; scans.list_scans(); scans.parse_scan_type('zzvideo_sst').schedule(6, 3, 4, 4);"
        "print([m for m in ('torch', 'matplotlib', 'zigflow', 'hydra', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_scheme_in_this_folder_may_import_the_decorator_from_the_package(tmp_path):
    shutil.copytree(
        Path(scans.__file__).parent, tmp_path / "scans", ignore=shutil.ignore_patterns("__pycache__")
    )
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    example = guide.partition("A new scan in full:")[2].split("```")[1].removeprefix("python\n")
    (tmp_path / "scans" / "columns_first.py").write_text(example)
    package = tmp_path / "scans" / "__init__.py"
    package.write_text(package.read_text().replace("    diagonal,\n", "    columns_first,\n    diagonal,\n"))
    code = "import scans; print(scans.get_scan('columns_first')(2, 3)[0].order.tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[0, 3, 1, 4, 2, 5]", done.stderr
