"""Every hostile archive is an error by default, a counted skip within a budget, and nothing else ever."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.hostile import BUDGET, CASES, build, survivors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """All archives, read in one process of their own that is watched."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in CASES:
        build(name, folder / "in" / name.replace(" ", "-"))
    build("missing member", folder / "in" / "warm-up")
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.hostile", str(folder / "in")],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", list(CASES))
def test_by_default_it_is_an_error_that_says_where(report, name):
    got, match = report[1]["cases"][name], CASES[name][1]
    if match is None:
        assert got["error"] is None
        return
    assert got["error"], f"{name} was read without an error"
    assert re.search(match, got["error"])
    shard, offset, key = got["place"]
    assert shard == "b.tar"
    assert offset is not None or match == "no samples"
    assert key or match in ("truncated", "closing blocks", "wrong checksum", "no samples", "bytes follow",
                            "extended header", "no tar header|truncated")  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_within_a_budget_the_others_are_read_and_it_is_counted(report, name):
    got = report[1]["cases"][name]
    good = [f"a{i}" for i in range(4)]
    assert "refused" not in got, got.get("refused")
    assert set(got["keys"]) == {*good, *survivors(name)}
    assert got["again"], "a second reading gives the same sample at every position"
    if CASES[name][1] is not None:
        assert 1 <= len(set(got["skipped"])) <= BUDGET
        assert all("shard b.tar" in message for message in got["skipped"])


def test_nothing_is_executed_and_nothing_lies_outside(report):
    folder, got = report
    assert got["events"] == []
    inside = {name.replace(" ", "-") for name in CASES} | {"warm-up"}
    assert {path.name for path in (folder / "in").iterdir()} == inside
    assert [path.name for path in folder.iterdir()] == ["in"]
    assert not (ROOT / "owned").exists()
    for case in (folder / "in").iterdir():
        allowed = {"a.tar", "b.tar", "index.json", "a.tar.index.json", "b.tar.index.json"}
        assert {path.name for path in case.iterdir()} <= allowed


def test_memory_is_bounded(report):
    got = report[1]
    most = max(case["megabytes"] for case in got["cases"].values())
    assert most - got["start"] < 200, (
        "members of 600 MB, arrays of 4 TB, images and texts that unfold to 256 MB"
    )


def test_one_problem_more_than_the_budget_is_an_error(tmp_path):
    from zigflow.data.tar import BudgetError
    from zigflow.datasets.shards import ShardSource

    folder = build("climbing name", tmp_path / "x")
    data = (folder / "b.tar").read_bytes()
    (folder / "c.tar").write_bytes(data.replace(b"g0.", b"h0.").replace(b"g1.", b"h1."))
    assert ShardSource(folder, max_skipped=3).reader.problems.limit == 3
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(BudgetError, match="1 problems were passed over before, no more are allowed"):
        ShardSource(folder, max_skipped=1)
    assert not list(folder.glob("index.json")), "what exceeds the budget leaves no index"


def test_an_index_remembers_its_problems(tmp_path):
    from zigflow.data.tar import ShardError
    from zigflow.datasets.shards import ShardSource

    folder = build("symbolic link", tmp_path / "x")
    first = ShardSource(folder, max_skipped=1)
    stamp = (folder / "index.json").stat().st_mtime_ns
    again = ShardSource(folder, max_skipped=1)
    assert (folder / "index.json").stat().st_mtime_ns == stamp
    assert [str(e) for e in again.reader.problems.errors] == [str(e) for e in first.reader.problems.errors]
    with pytest.raises(
        ShardError, match=r"shard b\.tar, offset \d+, key 'bad\.txt': a symbolic link is refused"
    ):
        ShardSource(folder)


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "pt", "npz"])
def test_members_that_could_run_are_never_read(tmp_path, suffix):
    from tests.data.hostile import END, good, sample
    from zigflow.data.tar import ShardError
    from zigflow.datasets.shards import ShardSource

    (tmp_path / "a.tar").write_bytes(sample("0", {**good(), f"latent.{suffix}": b"x"}) + END)
    assert "tokens" not in ShardSource(tmp_path)[0]
    with pytest.raises(ShardError, match="can run code"):
        ShardSource(tmp_path, {f"latent.{suffix}": "latents"})
