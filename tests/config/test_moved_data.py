"""Where a run finds its data: as it was given, from the run, from the working directory, or where it was."""

import shutil

import pytest

from zigflow.stored_config import find_roots, fix_roots


def config(run_dir, source=None, heldout=None):
    nodes = {
        "source": {"root": source} if source else None,
        "heldout": {"root": heldout} if heldout else None,
    }
    return {"run_dir": str(run_dir), "data": nodes}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with data and a run, and what training kept of it."""
    old = tmp_path / "old"
    for folder in ("data/train", "data/held", "outputs/run"):
        (old / folder).mkdir(parents=True)
    monkeypatch.chdir(old)
    return old


def trained(run_dir, source, heldout=None):
    stored = config(run_dir, source, heldout)
    return stored, fix_roots(stored)


def found(stored, roots, run_dir):
    now = config(run_dir, *((stored["data"][s] or {}).get("root") for s in ("source", "heldout")))
    find_roots(now, stored, roots, run_dir)
    return now["data"]["source"]["root"]


def test_a_run_that_stays_finds_its_data_from_anywhere(project, tmp_path, monkeypatch):
    stored, roots = trained("outputs/run", "data/train", "data/held")
    assert stored["data"]["heldout"]["root"] == str(project / "data/held")
    assert roots["source"] == {
        "given": "data/train", "absolute": str(project / "data/train"), "from_run": "../../data/train"
    }  # fmt: skip
    (tmp_path / "elsewhere/data/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert found(stored, roots, project / "outputs/run") == str(project / "data/train")


def test_a_copied_project_takes_its_own_data_and_says_so(project, tmp_path, monkeypatch, caplog):
    stored, roots = trained("outputs/run", "data/train")
    new = shutil.copytree(project, tmp_path / "new/place")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        assert found(stored, roots, new / "outputs/run") == str(new / "data/train")
    assert f"data.source.root: {new / 'data/train'}, from the run (given as data/train)" in caplog.text


def test_a_run_that_was_copied_alone(project, tmp_path, monkeypatch):
    stored, roots = trained("outputs/run", "data/train")
    run = shutil.copytree(project / "outputs/run", tmp_path / "a/b/c/run")
    monkeypatch.chdir(tmp_path)
    assert found(stored, roots, run) == str(project / "data/train"), "where it was"
    (tmp_path / "here/data/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert found(stored, roots, run) == str(tmp_path / "here/data/train"), "from the working directory"


def test_an_absolute_path_goes_first(project, tmp_path):
    stored, roots = trained("outputs/run", str(project / "data/train"))
    new = shutil.copytree(project, tmp_path / "new")
    assert found(stored, roots, new / "outputs/run") == str(project / "data/train")
    shutil.rmtree(project / "data")
    assert found(stored, roots, new / "outputs/run") == str(new / "data/train")


def test_what_is_left_alone(project):
    stored, roots = trained("outputs/run", "https://host/{0..3}.tar", "data/held")
    assert list(roots) == ["heldout"]
    now = config(project, "https://host/{0..3}.tar", "/named/by/the/command")
    find_roots(now, stored, roots, project / "outputs/run")
    assert now["data"]["heldout"]["root"] == "/named/by/the/command"
    assert now["data"]["source"]["root"] == "https://host/{0..3}.tar"
    gone, kept = trained("outputs/run", "data/gone")
    assert found(gone, kept, project / "outputs/run") == str(project / "data/gone"), (
        "for the source to refuse"
    )
    assert found(gone, None, project / "outputs/run") == str(project / "data/gone"), "a run of 0.1"
