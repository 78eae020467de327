"""Exit codes and what they leave behind, without a launch."""

import json
import sys

import pytest

from zigflow import cli, train_job
from zigflow.engine import exits, lock
from zigflow.engine.lock import Lock, RunDirError, refuse_second_writer, remove_unused
from zigflow.engine.signals import Stopped, stop
from zigflow.files import StorageError
from zigflow.settings import SettingsError


@pytest.fixture(autouse=True)
def _as_before():
    with stop.installed():
        yield
    exits.note.release()


def run(monkeypatch, folder, work):
    """The command's exit code when its work is ``work(cfg)``, and its note if it left one."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["train_acc.py", "+debug=cpu_tiny", "run_dir=run"])
    monkeypatch.setattr(train_job, "train_from_config", work)
    code = cli.train()
    note = folder / "run" / "exit" / "rank_0000.json"
    return code, json.loads(note.read_text()) if note.exists() else None


def claiming(then=None):
    def work(cfg, watch=None):
        exits.note.claim(cfg.run_dir, 0)
        exits.note.step = 7
        if then is not None:
            raise then

    return work


@pytest.mark.parametrize(
    "error, code, reason",
    [
        (None, 0, "done"),
        (RunDirError("no"), 1, "RunDirError: no"),
        (
            StorageError("write", "x", OSError(28, "No space left on device")),
            1,
            "StorageError: write of x failed",
        ),
        (Stopped("stopped by SIGTERM after step 7"), 75, "stopped by SIGTERM after step 7"),
    ],
)
def test_the_code_stands_in_the_directory_too(monkeypatch, tmp_path, error, code, reason, capsys):
    got, note = run(monkeypatch, tmp_path, claiming(error))
    assert (got, note["code"], note["step"], note["rank"]) == (code, code, 7, 0)
    assert note["reason"].startswith(reason)
    assert "Traceback" not in capsys.readouterr().err


def test_a_foreign_error_keeps_its_traceback_and_is_noted(monkeypatch, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, tmp_path, claiming(ZeroDivisionError("x")))
    note = json.loads((tmp_path / "run" / "exit" / "rank_0000.json").read_text())
    assert (note["code"], note["reason"]) == (1, "ZeroDivisionError: x")


def test_an_error_that_follows_a_signal_is_the_signal(monkeypatch, tmp_path):
    def work(cfg, watch=None):
        exits.note.claim(cfg.run_dir, 0)
        stop.received = "SIGUSR1"
        raise RuntimeError("connection closed by peer")

    code, note = run(monkeypatch, tmp_path, work)
    assert (code, note["code"]) == (75, 75)
    assert note["reason"] == "stopped by SIGUSR1; RuntimeError: connection closed by peer"


def test_ctrl_c_has_the_code_of_shells(monkeypatch, tmp_path, capsys):
    def work(cfg, watch=None):
        exits.note.claim(cfg.run_dir, 0)
        stop.received = "SIGINT"
        raise Stopped("stopped by SIGINT after step 7, which is saved")

    code, note = run(monkeypatch, tmp_path, work)
    assert (code, note["code"], note["reason"]) == (
        130,
        130,
        "stopped by SIGINT after step 7, which is saved",
    )
    assert capsys.readouterr().err.splitlines()[-1] == note["reason"]


def test_a_stop_while_building_is_noted_unless_another_run_writes_there(monkeypatch, tmp_path):
    def work(cfg, watch=None):
        raise Stopped("early")

    code, note = run(monkeypatch, tmp_path, work)
    assert (code, note["code"], note["step"], note["reason"]) == (75, 75, 0, "early")
    (tmp_path / "run" / "exit" / "rank_0000.json").unlink()
    monkeypatch.setattr(cli, "_refuse_second_writer", lambda arguments: None)
    holder = Lock(tmp_path / "run")
    try:
        assert run(monkeypatch, tmp_path, work) == (75, None)
    finally:
        holder.release()


def test_a_mistake_takes_its_fresh_directory_away_and_no_other(monkeypatch, tmp_path):
    def work(cfg, watch=None):
        raise SettingsError("model.use_pe=7")

    assert run(monkeypatch, tmp_path, work) == (2, None)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("")
    assert run(monkeypatch, tmp_path, work) == (2, None)
    assert (tmp_path / "run" / "mine.txt").exists()


def test_a_directory_that_holds_anything_of_a_run_is_not_unused(tmp_path):
    assert not remove_unused(tmp_path / "missing")
    for name in ("run.json", "metrics.jsonl", "lock", "checkpoints/x", ".hydra/mine.txt"):
        folder = tmp_path / name.replace("/", "_")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("")
        assert not remove_unused(folder), name
        assert (folder / name).exists()


def test_a_second_command_is_refused_before_hydra_writes(monkeypatch, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    holder = Lock(tmp_path / "run")
    try:
        code, note = run(monkeypatch, tmp_path, claiming())
        assert (code, note) == (1, None)
        assert "is being written by another process (pid" in capsys.readouterr().err
        assert not (tmp_path / "run" / ".hydra").exists()
        with pytest.raises(RunDirError):
            refuse_second_writer(tmp_path / "run")
    finally:
        holder.release()
    refuse_second_writer(tmp_path / "run")
    assert lock._held == set()


def test_the_notes_of_an_earlier_launch_go(tmp_path):
    for rank in (0, 1):
        exits.note.claim(tmp_path, rank)
        exits.note.write(75, "stopped")
    assert len(list((tmp_path / "exit").iterdir())) == 2
    exits.note.claim(tmp_path, 0)
    assert list((tmp_path / "exit").iterdir()) == []
