"""What a launcher says is believed only when it adds up: no process trains alone by accident."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zigflow import plugins
from zigflow.engine import launch
from zigflow.engine.launch import LaunchError, check_environment, check_joined, machines
from zigflow.settings import SettingsError

ROOT = Path(__file__).parents[2]
TOLD = {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0"}


def joined(size, rank, local=1):
    return {
        "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip


@given(st.integers(1, 64), st.data())
def test_what_adds_up_is_accepted(size, data):
    rank = data.draw(st.integers(0, size - 1))
    local = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    environ = joined(size, rank, local)
    assert check_environment(environ) == size
    assert machines(environ) == size // local
    check_joined(size, environ)


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_process_that_joined_fewer_or_more_than_were_started_stops(size, count):
    if size == count:
        return
    with pytest.raises(LaunchError, match=f"started {size} .* {count} joined") as refused:
        check_joined(count, joined(size, 0))
    assert "ACCELERATE_USE_CPU=true" in str(refused.value)


@given(st.sets(st.sampled_from(sorted(TOLD)), min_size=1))
def test_a_launcher_that_tells_no_world_size_is_an_error(names):
    with pytest.raises(LaunchError, match="without WORLD_SIZE") as refused:
        check_environment({name: TOLD[name] for name in names})
    assert all(name in str(refused.value) for name in names)
    assert "torchrun --nproc_per_node" in str(refused.value)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_copies_that_know_nothing_of_each_other_are_an_error(name):
    assert check_environment({name: "1"}) == 1
    assert check_environment({name: "2", **joined(2, 1)}) == 2
    with pytest.raises(LaunchError, match=name):
        check_environment({name: "2"})


@pytest.mark.parametrize(
    "change, part",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "2"}, "RANK=2"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": None}, "WORLD_SIZE=2 without RANK"),
        ({"LOCAL_RANK": None}, "WORLD_SIZE=2 without LOCAL_RANK"),
    ],
)
def test_contradictions_are_named(change, part):
    environ = {k: v for k, v in {**joined(2, 0), **change}.items() if v is not None}
    with pytest.raises(LaunchError, match=part):
        check_environment(environ)


def test_a_mistake_of_the_launch_is_one_of_the_command():
    assert issubclass(LaunchError, SettingsError)
    assert plugins.is_mistake(LaunchError("x"))


def test_a_process_without_launcher_is_alone(monkeypatch):
    for name in ("WORLD_SIZE", *TOLD, *launch._COUNTS):
        monkeypatch.delenv(name, raising=False)
    assert check_environment() == 1
    assert machines() == 1
    assert launch.make_accelerator(cpu=True).num_processes == 1


def test_two_started_and_one_joined_stops_before_a_model_is_built(monkeypatch):
    # Another test has made this process's accelerator already, so it joins nobody.
    launch.make_accelerator(cpu=True)
    for name, value in joined(2, 0, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="started 2 processes .* 1 joined"):
        launch.make_accelerator(cpu=True)


@pytest.mark.parametrize("told, got", [(None, "no"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_the_precision_that_the_launcher_was_told(told, got):
    assert launch.launched_precision({} if told is None else {"ACCELERATE_MIXED_PRECISION": told}) == got


def test_what_launchers_may_ask_and_we_do_not_do():
    with pytest.raises(LaunchError, match="mixed_precision=fp8"):
        launch.launched_precision({"ACCELERATE_MIXED_PRECISION": "fp8"})


RUN_IDS = """
import json, os, sys
from zigflow import plugins
found = []
for extra in json.loads(sys.argv[1]):
    os.environ.update(extra)
    plugins.run_id.cache_clear()
    try:
        found.append(plugins.run_id())
    except Exception as error:
        found.append(str(error))
    for name in extra:
        del os.environ[name]
print(json.dumps(found))
"""


def test_all_ranks_agree_on_the_run_s_name():
    """Two real processes of one launcher, under what each kind of launcher sets."""
    here = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    away = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}
    cases = [
        {**here, "TORCHELASTIC_RUN_ID": "none"},
        {**here, "TORCHELASTIC_RUN_ID": "0c0383b4"},
        {**here, "SLURM_JOB_ID": "812", "TORCHELASTIC_RUN_ID": "none"},
        {**away, "SLURM_JOB_ID": "812"},
        {**away, "SLURM_JOB_ID": "812", "RUN_ID": "mine"},
        {**away, "TORCHELASTIC_RUN_ID": "none"},
        {"WORLD_SIZE": "2"},
    ]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_IDS, json.dumps([{**c, "RANK": r, "LOCAL_RANK": r} for c in cases])],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for r in ("0", "1")
    ]  # fmt: skip
    first, second = (json.loads(rank.communicate(timeout=60)[0]) for rank in ranks)
    assert first == second
    assert first[1:5] == ["0c0383b4", "812", "812", "mine"]
    assert first[0] not in ("none", *first[1:])
    for refused in first[5:]:
        assert refused.startswith("2 machines need one name for the run: export RUN_ID=NAME")


@pytest.mark.parametrize(
    "arguments, environ, part",
    [
        (["-m", "optim.lr=1e-3,1e-4"], {"RANK": "0", **joined(2, 0, 2)}, "inside a launched process"),
        (["--multirun", "optim.lr=1e-3,1e-4"], joined(1, 0), "inside a launched process"),
        (["hydra.mode=MULTIRUN", "optim.lr=1e-3,1e-4"], joined(1, 0), "inside a launched process"),
        (["-m", "optim.lr=1e-3,1e-4", "run_dir=x"], {}, "run_dir= with --multirun"),
        (["-m", "optim.lr=1e-3,-1"], {}, "optim.lr=-1"),
        (["-m", "optim.lr=1e-3,1e-4", "grad_accum=1,0"], {}, "grad_accum=0"),
        ([], {"MASTER_ADDR": "h"}, "MASTER_ADDR set without WORLD_SIZE"),
        ([], joined(2, 0, 1), "2 machines need one name"),
    ],
)
def test_refused_before_anything_is_made(arguments, environ, part, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUN_ID", "set-back-after-the-test")
    monkeypatch.delenv("RUN_ID")
    plugins.run_id.cache_clear()
    with pytest.raises(SettingsError, match=part.replace("(", r"\(")):
        plugins.check_command_line(arguments, "default")
    assert list(tmp_path.iterdir()) == []


def test_every_job_of_a_sweep_is_known_before_it_starts():
    jobs = plugins._jobs(["optim.lr=1e-3,1e-4", "scan=hilbert,spiral", "hydra.sweeper.max_batch_size=1"])
    assert len(jobs) == 4
    assert all(whole for _, whole in jobs)
    assert {tuple(overrides[1:]) for overrides, _ in jobs} == {
        (f"optim.lr={lr}", f"scan={scan}") for lr in ("0.001", "0.0001") for scan in ("hilbert", "spiral")
    }
    # Of another sweeper what it leaves alone is known.
    foreign = ["hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-3)", "data=digits"]
    assert plugins._jobs(foreign) == [(["hydra/sweeper=optuna", "data=digits"], False)]


_PART = """
import os, sys
import torch
from torch import distributed
from zigflow.engine.launch import leave
distributed.init_process_group("gloo")
distributed.all_reduce(torch.ones(1))
leave(done={done})
assert not distributed.is_initialized()
leave(done={done})
"""


@pytest.mark.slow
@pytest.mark.parametrize("done", [True, False])
def test_processes_part_before_they_end(tmp_path, done):
    """An exit with open connections is aborted now and then."""
    script = tmp_path / "part.py"
    script.write_text(_PART.format(done=done))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]
    launch.leave(done=done)  # nothing to part from
