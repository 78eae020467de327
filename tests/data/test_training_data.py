"""Whole runs on damaged, scarce and streamed data: refused before the first step, or counted, never hanging."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.hostile import END, png, sample
from tests.data.shard_server import serving
from tests.engine.evaluation_toys import on_threads
from zigflow import files
from zigflow.data.tar import BudgetError, ShardError
from zigflow.engine import checkpoint
from zigflow.engine.ranks import Ranks
from zigflow.engine.skips import SkipBudget
from zigflow.plugins import compose_config
from zigflow.settings import SettingsError
from zigflow.train_job import train_from_config

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("webdataset")


def digit(number, **changes):
    rows = bytes([0, *range(8)]) * 8
    return {"image.png": png(8, 8, rows=rows), "cls": str(number % 10).encode(), **changes}


def tar_bytes(number, count=8, bad=()):
    rows = (sample(f"{number}-{i}", digit(i, **({"cls": b"x"} if i in bad else {}))) for i in range(count))
    return b"".join(rows) + END


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(4):
        (tmp_path / "set" / f"{number}.tar").write_bytes(tar_bytes(number, bad={3} if number == 2 else ()))
    return tmp_path


def options(folder, *more, root=None):
    return [
        "data=shards", "+debug=cpu_tiny", "loop.progress=false", "loop.device=cpu", "metrics=none", "data.heldout=null",
        f"data.source.root={root or folder / 'set'}", "data.image_size=8", "data.channels=1", "data.num_classes=8",
        "data.num_workers=0", "data.batch_size=8", f"run_dir={folder / 'run'}", *more,
    ]  # fmt: skip


def train(folder, *more, **kwargs):
    return train_from_config(compose_config(options(folder, *more, **kwargs)))


def keep_only(folder, **order):
    """Rewrite what the run's checkpoint says of its data order, and seal it anew."""
    path = checkpoint.open_checkpoint(folder / "run").path
    trainer = json.loads((path / "trainer.json").read_text())
    trainer["data"]["identity"]["order"] |= order
    seal = json.loads((path / checkpoint.SEAL).read_text())
    seal["files"]["trainer.json"] = files.write_json(path / "trainer.json", trainer)
    seal["digest"] = checkpoint._map_digest(seal["files"])
    files.write_json(path / checkpoint.SEAL, seal)


def stored_order(folder):
    return checkpoint.open_checkpoint(folder / "run").trainer["data"]["identity"]["order"]


def test_a_run_keeps_the_number_of_shards_that_it_began_with(folder):
    (folder / "set" / "2.tar").write_bytes(tar_bytes(2))
    train(folder, "data.shards_at_once=2", "data.train_steps=1")
    assert stored_order(folder)["shards_at_once"] == 2
    train(folder, "data.train_steps=2")
    assert stored_order(folder)["shards_at_once"] == 2, "the default does not change a run"
    with pytest.raises(SettingsError, match=r"data\.shards_at_once=3: .*run began with 2.*new run_dir"):
        train(folder, "data.shards_at_once=3", "data.train_steps=3")
    with pytest.raises(SettingsError, match=r"data\.shards_at_once=0"):
        train(folder, "data.shards_at_once=0")
    with pytest.raises(SettingsError, match=r"shuffle_buffer: drop data\.shards_at_once"):
        train(folder, "data.shards_at_once=3", "data.order=streaming")
    assert checkpoint.open_checkpoint(folder / "run").step == 2


def test_a_run_of_the_first_release_goes_on(folder):
    """It wrote 64 shards at once, whatever there were."""
    (folder / "set" / "2.tar").write_bytes(tar_bytes(2))
    train(folder, "data.train_steps=1")
    assert stored_order(folder)["shards_at_once"] == 4
    keep_only(folder, shards_at_once=64)
    for asked in ((), ("data.shards_at_once=4",), ("data.shards_at_once=64",)):
        train(folder, f"data.train_steps={2 + len(asked)}", *asked)
        assert stored_order(folder)["shards_at_once"] == 64


def test_a_damaged_sample_stops_the_run_by_default(folder):
    with pytest.raises(ShardError, match=r"shard 2\.tar, offset \d+, key '2-3': cls: a class is a number"):
        train(folder)


def test_a_damaged_sample_within_the_budget_is_counted(folder, caplog):
    with caplog.at_level("WARNING"):
        train(folder, "data.max_skipped=1")
    assert "key '2-3'" in caplog.text
    assert "1 unreadable samples were replaced so far, over all processes" in caplog.text
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 8


def stored_counters(folder):
    return checkpoint.open_checkpoint(folder / "run").trainer["counters"]


def test_the_budget_is_the_runs_and_not_a_launchs(folder, caplog):
    train(folder, "data.max_skipped=1")
    (first,) = stored_counters(folder)["unreadable"]
    with caplog.at_level("WARNING"):
        train(folder, "data.max_skipped=1", "data.train_steps=16", "ckpt_every=16")
    assert "key '2-3'" in caplog.text, "it was met again"
    assert stored_counters(folder)["unreadable"] == [first], "and counts once"

    counters = SimpleNamespace(unreadable=[first])
    options = SimpleNamespace(log_every=4, ckpt_every=3)
    trainer = SimpleNamespace(counters=counters, options=options, ranks=Ranks())
    budget = SkipBudget(1)
    budget.begin(trainer)
    budget.after_step(trainer, SimpleNamespace(step=4, skipped=()))
    with pytest.raises(
        BudgetError, match="2 unreadable samples, data.max_skipped is 1; the last one here: another"
    ):
        budget.after_step(trainer, SimpleNamespace(step=5, skipped=("another",)))
    assert counters.unreadable == [first]
    with pytest.raises(BudgetError, match="2 unreadable samples"):
        budget.after_step(trainer, SimpleNamespace(step=6, skipped=()))


def test_processes_that_met_the_same_sample_count_it_once():
    def work(ranks):
        messages = ("met by both", f"met by {ranks.rank % 2}")
        counters = SimpleNamespace(unreadable=[])
        trainer = SimpleNamespace(
            counters=counters, options=SimpleNamespace(log_every=1, ckpt_every=1), ranks=ranks
        )
        try:
            SkipBudget(2).after_step(trainer, SimpleNamespace(step=1, skipped=messages))
        except BudgetError as error:
            return str(error)
        return counters.unreadable

    alone = work(Ranks())
    assert len(alone) == 2
    together = on_threads(2, work)
    assert [text.split(",")[0] for text in together] == ["3 unreadable samples"] * 2


def test_past_the_budget_the_run_stops(folder):
    (folder / "set" / "3.tar").write_bytes(tar_bytes(3, bad={0, 1}))
    with pytest.raises(BudgetError, match="data.max_skipped is 2"):
        train(folder, "data.max_skipped=2")


@pytest.mark.parametrize(
    "more, match",
    [
        (["data.batch_size=33"], "32 samples, fewer than one global batch of 33"),
        (["data.batch_size=11", "grad_accum=3"], "fewer than one global batch of 33"),
        (["data.order=streaming", "data.num_workers=5"], "4 shards for 5 readers"),
        (["data.order=streaming", "data.limit=4"], "data.limit=4 needs samples with numbers"),
        (
            ["data=synthetic", "data.order=streaming", "data.num_classes=10"],
            "ShapesSource.*cannot be streamed",
        ),
        (["data.max_skipped=-1"], "data.max_skipped=-1 must not be negative"),
        (["data.order=random"], "data.order=random is not one of indexed, streaming"),
        (["+data.source.rename={image.png: pixel}"], "Did you mean 'pixels'"),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_step(folder, more, match):
    if "data=synthetic" in more:
        given = [o for o in options(folder) if not o.startswith(("data=", "data.source", "data.heldout"))]
        with pytest.raises(SettingsError, match=match):
            train_from_config(compose_config([*more, *given]))
    else:
        with pytest.raises(SettingsError, match=match):
            train(folder, *more)
    assert not (folder / "run" / "checkpoints").exists()


def test_a_run_on_a_stream_and_its_approximate_resume(folder, monkeypatch, caplog):
    monkeypatch.setenv("no_proxy", "*")
    cache = f"+data.source.stream={{cache_dir: {folder / 'cache'}, backoff: 0.0}}"
    with serving() as server:
        for number in range(4):
            server.files[f"/{number}.tar"] = tar_bytes(number)
            server.faults[f"/{number}.tar"] = [("cut", 700), 503]
        urls = folder / "urls.txt"
        urls.write_text("".join(f"{server.url}/{n}.tar?X-Amz-Signature=secret\n" for n in range(4)))
        stream = ["data.order=streaming", cache, "ckpt_every=4"]
        train(folder, *stream, "data.train_steps=4", root=urls)
        urls.write_text("".join(f"{server.url}/{n}.tar?X-Amz-Signature=another\n" for n in range(4)))
        with caplog.at_level("WARNING"):
            train(folder, *stream, root=urls)
    assert "resuming a stream at step 4 is approximate" in caplog.text
    stored = folder / "run" / "checkpoints" / "step-0000008"
    state = json.loads((stored / "trainer.json").read_text())
    assert state["data"]["identity"]["order"]["kind"] == "streaming"
    assert state["data"]["identity"]["order"]["resume"] == "approximate"
    assert state["counters"]["step"] == 8
    for path in (folder / "run").rglob("*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes(), path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(folder, *more):
    """Exit codes and outputs of one run on two processes; whoever hangs is an error after four minutes."""
    env = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "RUN_ID": "two",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "train_acc.py"), *options(folder, *more, "data.batch_size=4")]
    ranks = [
        subprocess.Popen(
            command, cwd=folder, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], outputs


@pytest.mark.slow
def test_damage_that_one_process_meets_ends_both(folder):
    codes, outputs = two_processes(folder)
    assert all(codes), outputs
    assert any("key '2-3'" in output for output in outputs)


@pytest.mark.slow
def test_two_processes_add_up_what_they_skipped(folder):
    codes, outputs = two_processes(folder, "data.max_skipped=2", "data.num_workers=1")
    assert codes == [0, 0], outputs
    (folder / "set" / "1.tar").write_bytes(tar_bytes(1, bad={0, 1, 2, 3, 4, 5}))
    codes, outputs = two_processes(folder, "data.max_skipped=4", f"run_dir={folder / 'again'}")
    assert all(codes), outputs
    assert any("data.max_skipped is 4" in output for output in outputs), outputs


@pytest.mark.slow
def test_two_processes_read_a_stream(folder):
    for number in range(4):
        (folder / "set" / f"{number}.tar").write_bytes(tar_bytes(number))
    codes, outputs = two_processes(folder, "data.order=streaming", "data.num_workers=2")
    assert codes == [0, 0], outputs
    codes, outputs = two_processes(
        folder, "data.order=streaming", "data.num_workers=3", f"run_dir={folder / 'refused'}"
    )
    assert all(codes), outputs
    assert any("4 shards for 6 readers (2 processes x 3 workers)" in output for output in outputs)
