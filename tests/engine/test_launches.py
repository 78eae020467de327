"""Runs of one, two and four real processes over gloo: killed, crashed, signalled, resumed on another number."""

import signal

import pytest
import torch

from tests.assertions import assert_close
from tests.engine.toys import assert_same_bits
from zigflow.engine import checkpoint
from zigflow.engine.tensors import load_tensors


def notes(prefix, processes):
    return [
        load_tensors(prefix.with_name(f"{prefix.name}_rank{rank}.safetensors")) for rank in range(processes)
    ]


def step_of_all(found, what, step):
    """One step's values over all ranks, in the order of the samples."""
    ids = torch.cat([tensors[f"ids/{step}"] for tensors in found])
    return torch.cat([tensors[f"{what}/{step}"] for tensors in found])[ids.argsort()]


def state_of(tensors):
    return {name: value for name, value in tensors.items() if name.startswith("state/")}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_the_same_run_to_the_bit(tmp_path, forks, processes):
    options = {"ckpt_every": 2, "limit": 2}
    codes = forks("train", tmp_path / "straight", 9, processes, tmp_path / "straight_note", options)
    assert codes == [0] * processes
    # A run of a hundred steps is killed while it works; the rest is asked for afterwards.
    saved = forks("kill", tmp_path / "cut", 10**6, processes, 4, options | {"keep_last": 10**6})
    first = saved[-1]
    end = first + 5
    assert forks("train", tmp_path / "cut", end, processes, tmp_path / "cut_note", options) == [0] * processes
    assert (
        forks("train", tmp_path / "whole", end, processes, tmp_path / "whole_note", options)
        == [0] * processes
    )
    for whole, cut in zip(
        notes(tmp_path / "whole_note", processes), notes(tmp_path / "cut_note", processes), strict=True
    ):
        assert_same_bits(state_of(cut), state_of(whole))
        for step in range(first + 1, end + 1):
            for what in ("ids", "times", "losses"):
                assert torch.equal(cut[f"{what}/{step}"], whole[f"{what}/{step}"])
    stored = [checkpoint.open_checkpoint(tmp_path / run).trainer for run in ("cut", "whole")]
    for key in ("counters", "data", "scaler", "optimizer_groups", "schedule"):
        assert stored[0][key] == stored[1][key], key


def test_one_two_four_and_one_processes_are_the_same_run_within_rounding(tmp_path, forks):
    """Without dropout, the one thing of the toy that draws by process: all that zigflow draws is keyed by sample."""
    options = {"dropout": 0.0, "limit": 8}
    assert forks("train", tmp_path / "single", 8, 1, tmp_path / "single", options) == [0]
    single = notes(tmp_path / "single", 1)
    for end, processes in ((2, 1), (4, 2), (6, 4), (8, 1)):
        note = tmp_path / f"until_{end}"
        assert forks("train", tmp_path / "elastic", end, processes, note, options) == [0] * processes
        part = notes(note, processes)
        for step in (end - 1, end):
            for what in ("ids", "times"):
                assert torch.equal(step_of_all(part, what, step), step_of_all(single, what, step)), (
                    what,
                    step,
                )
            assert_close(
                f"losses of step {step}",
                step_of_all(part, "losses", step),
                step_of_all(single, "losses", step),
            )
    stored = checkpoint.open_checkpoint(tmp_path / "elastic").trainer
    assert (stored["data"]["global_batch"], stored["counters"]["images_seen"]) == (8, 64)
    last, want = state_of(notes(tmp_path / "until_8", 1)[0]), state_of(single[0])
    for name, value in want.items():
        if name != "state/generator":
            assert_close(name, last[name], value, floor=1e-6)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_nan_on_one_process_stops_all_and_each_names_it(tmp_path, forks, bad_rank):
    codes, said, kept, sample = forks("poison", tmp_path, 2, bad_rank)
    assert codes == [0, 0], "both processes must leave by themselves"
    for rank, line in enumerate(said):
        assert line.startswith("NonFiniteError" if rank == bad_rank else "OtherRankError"), line
        assert f"step 3: the loss is not finite for samples {sample};" in line
    assert kept == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("only", [0, 1])
def test_a_signal_to_one_process_makes_all_save_and_leave(tmp_path, forks, only, number):
    codes, step, said = forks("signalled", tmp_path, 2, only, int(number), 3)
    assert (codes, step) == ([0, 0], 3)
    assert said[only] == number.name
    assert said[1 - only] == "a signal to another process"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_launch_is_refused_and_the_first_goes_on(tmp_path, forks, processes):
    first, second, said = forks("second_launch", tmp_path, processes)
    assert first == second == [0] * processes
    assert "is being written by another process (pid " in said[0]
    assert all(line.startswith("OtherRankError: opening the run directory") for line in said[1:])
    assert checkpoint.open_checkpoint(tmp_path / "run").step == 4


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_either_process_killed_at_every_operation_of_a_save(tmp_path, forks, rank, record_property):
    outcomes = forks("crash_everywhere", tmp_path, rank)
    assert len(outcomes) > (30 if rank == 0 else 5)
    steps = [step for _, step in outcomes]
    assert steps == sorted(steps), "the save is published once, and stays"
    assert set(steps) == ({1, 2} if rank == 0 else {1})
    assert all(other == 1 for other, step in outcomes if step == 1), "the other process fails too"
    record_property("crash points", len(outcomes))


@pytest.mark.slow
def test_two_hundred_random_kills(tmp_path, forks, record_property):
    found = forks("random_kills", tmp_path / "killed", 200, 7)
    assert found["kills"] == 200
    assert found["in a save"] > 0, "the kills must hit saves too"
    assert found["most steps lost"] <= 1
    end = found["steps"] + 2
    assert forks("train", tmp_path / "killed", end, 1, tmp_path / "killed_note", {}) == [0]
    assert forks("train", tmp_path / "whole", end, 1, tmp_path / "whole_note", {}) == [0]
    killed, whole = notes(tmp_path / "killed_note", 1)[0], notes(tmp_path / "whole_note", 1)[0]
    assert_same_bits(state_of(killed), state_of(whole))
    for name, value in found.items():
        record_property(name, value)
