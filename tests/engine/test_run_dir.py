"""One directory, one run, one writer."""

import os
import signal

import pytest

from tests.engine.evaluation_toys import on_threads
from tests.engine.toys import PROFILES
from zigflow import files
from zigflow.engine.lock import sole_writer
from zigflow.engine.options import TrainOptions
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_dir import RunDir, RunDirError, check_same_config
from zigflow.errors import OtherRankError


def test_the_identity_stays(tmp_path):
    with RunDir(tmp_path / "a" / "b") as run_dir:
        first = run_dir.run_id
    with RunDir(tmp_path / "a" / "b") as run_dir:
        assert run_dir.run_id == first


def test_a_second_writer_is_refused_and_named(tmp_path):
    with RunDir(tmp_path), pytest.raises(RunDirError, match=f"pid {os.getpid()} on"):
        RunDir(tmp_path).__enter__()
    with RunDir(tmp_path):
        pass


def test_a_folder_has_one_writer_at_a_time_and_says_nothing_of_it_later(tmp_path):
    folder = tmp_path / "a" / "samples"
    with sole_writer(folder, Ranks(), "another folder"):
        holder = (folder / "lock").read_text()
        with (
            pytest.raises(
                RunDirError, match=rf"{folder} is being .*\(pid {os.getpid()} on .*, or choose another folder"
            ),
            sole_writer(folder, Ranks(), "another folder"),
        ):
            pytest.fail("two writers")
        assert (folder / "lock").read_text() == holder, "the refused one must not touch the lock of the other"
    assert (folder / "lock").read_text() == ""
    with pytest.raises(KeyError), sole_writer(folder, Ranks(), "another folder"):
        raise KeyError
    with sole_writer(folder, Ranks(), "another folder"):
        pass


def test_a_folder_that_is_taken_stops_every_process(tmp_path):
    with sole_writer(tmp_path, Ranks(), "another folder"):
        found = on_threads(2, lambda ranks: sole_writer(tmp_path, ranks, "another folder").__enter__())
    assert isinstance(found[0], RunDirError)
    assert isinstance(found[1], OtherRankError)


def test_the_lock_goes_with_a_killed_process(tmp_path):
    """A data worker may outlive its killed parent; it must not hold the directory."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        RunDir(tmp_path).__enter__()
        orphan = os.fork()
        if orphan == 0:
            signal.pause()
        os.write(writing, f"{orphan}".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    orphan = int(os.read(reading, 20))
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.kill(orphan, 0)
        with RunDir(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_leftovers_are_cleaned_at_the_start(tmp_path):
    for name in (".incomplete-step-0000001", ".deleted-step-0000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "file").write_text("x")
    with RunDir(tmp_path):
        assert list((tmp_path / "checkpoints").iterdir()) == []


def test_contradictions_name_key_and_values():
    stored = {"model": {"depth": 2, "ssm": {"d_state": 16}}, "data": {"name": "a"}}
    check_same_config({"model": {"depth": 2, "ssm": {"d_state": 16}}, "data": {"name": "b"}}, stored)
    with pytest.raises(RunDirError, match=r"model\.ssm\.d_state: the checkpoint has 16, the command says 8"):
        check_same_config({"model": {"depth": 2, "ssm": {"d_state": 8}}}, stored)
    with pytest.raises(RunDirError, match=r"model\.extra: the checkpoint has '\(absent\)'"):
        check_same_config(
            {"model": {"depth": 2, "ssm": {"d_state": 16}, "extra": 1}, "data": {"name": "a"}}, stored
        )


def test_a_replaced_file_is_the_old_or_the_new(tmp_path):
    file = tmp_path / "x.json"
    files.replace_json(file, {"a": 1})
    operations = []

    def fail(operation, path):
        operations.append(operation)
        if operation == "rename":
            raise OSError("power cut")

    with files.observed(fail), pytest.raises(OSError, match="power cut"):
        files.replace_json(file, {"a": 2})
    assert operations.index("fsync") < operations.index("rename")
    assert file.read_text() == '{\n "a": 1\n}\n'


def test_json_that_no_reader_takes_is_refused(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})


GOOD = {"train_steps": 1, "run_dir": "x"}


@pytest.mark.parametrize(
    "change, error",
    [
        ({"train_steps": 0}, ValueError),
        ({"log_every": 2.0}, TypeError),
        ({"keep_last": 0}, ValueError),
        ({"seed": "a"}, TypeError),
        ({"max_grad_norm": 0.0}, ValueError),
        ({"mixed_precision": "fp8"}, ValueError),
        ({"resume": "always"}, ValueError),
        ({"checkpoint_policy": "blocks"}, ValueError),
        ({"ema": (0.9999,)}, TypeError),
        ({"ema": (PROFILES[0], PROFILES[0])}, ValueError),
    ],
)
def test_impossible_options_name_their_key(change, error):
    TrainOptions(**GOOD)
    with pytest.raises(
        error,
        match="EMA"
        if isinstance(change.get("ema", (0,))[0], type(PROFILES[0]))
        else next(iter(change)).split("_")[0],
    ):
        TrainOptions(**GOOD | change)


def test_unset_limits_are_allowed():
    assert TrainOptions(**GOOD | {"max_grad_norm": None, "mixed_precision": None}).max_grad_norm is None


def test_one_process_agrees_with_itself():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
    assert ranks.sum([1.5, 2.0]) == [1.5, 2.0]
    with pytest.raises(KeyError, match="mine"), ranks.together("something"):
        raise KeyError("mine")


def test_a_failure_elsewhere_fails_here(monkeypatch):
    ranks = Ranks()
    monkeypatch.setattr(ranks, "any", lambda flag: True)
    with (
        pytest.raises(OtherRankError, match="something failed on another process"),
        ranks.together("something"),
    ):
        pass
