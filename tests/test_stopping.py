"""The train command is signalled, refused, failed: its exit code, its one line, what it leaves in the directory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.scenarios import free_port
from zigflow.engine import checkpoint

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TINY = [
    "+debug=cpu_tiny",
    "loop.progress=false",
    "data.train_steps=100000",
    "ckpt_every=100000",
    "log_every=1",
]

pytestmark = pytest.mark.slow


def start(folder, *arguments, processes=1, command="train_acc.py", presets=TINY):
    launcher = [sys.executable]
    if processes > 1:
        port = f"--master-port={free_port()}"
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", port]
    return subprocess.Popen(
        [*launcher, str(ROOT / command), *presets, *arguments],
        cwd=folder,
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, as a terminal makes for a command.
        start_new_session=True,
    )


def press_ctrl_c(process):
    """What a terminal does: every process of the command gets it, data workers included."""
    os.killpg(process.pid, signal.SIGINT)


def wait_for(path, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)


def exit_note(run_dir, rank=0):
    return json.loads((run_dir / "exit" / f"rank_{rank:04d}.json").read_text())


def test_signalled_while_building_and_in_a_step_then_refused_then_continued(tmp_path):
    run_dir = tmp_path / "run"
    building = start(tmp_path, "run_dir=run")
    wait_for(run_dir / "train.log", building)
    building.send_signal(signal.SIGUSR1)
    _, said = building.communicate(timeout=240)
    assert building.returncode == 75, said
    assert "stopped by SIGUSR1" in said
    assert "Traceback" not in said
    assert (exit_note(run_dir)["code"], exit_note(run_dir)["step"]) == (75, 0)
    assert checkpoint.find_latest(run_dir) is None

    stepping = start(tmp_path, "run_dir=run")
    wait_for(run_dir / "metrics.jsonl", stepping)
    config = (run_dir / ".hydra" / "overrides.yaml").stat().st_mtime_ns
    second = start(tmp_path, "run_dir=run", "global_seed=1")
    _, said = second.communicate(timeout=240)
    assert second.returncode == 1
    assert f"error: run is being written by another process (pid {stepping.pid} on" in said
    assert (run_dir / ".hydra" / "overrides.yaml").stat().st_mtime_ns == config, "the first run's files stay"
    stepping.send_signal(signal.SIGTERM)
    _, said = stepping.communicate(timeout=240)
    assert stepping.returncode == 75, said
    saved = checkpoint.open_checkpoint(run_dir).step
    assert saved > 0
    assert f"stopped by SIGTERM after step {saved}, which is saved" in said
    assert exit_note(run_dir) | {"pid": 0, "time": 0} == {
        "rank": 0, "code": 75, "step": saved, "pid": 0, "time": 0,
        "reason": f"stopped by SIGTERM after step {saved}, which is saved; the same command with run_dir=run continues",
    }  # fmt: skip

    last = start(tmp_path, "run_dir=run", f"data.train_steps={saved + 2}")
    _, said = last.communicate(timeout=240)
    assert last.returncode == 0, said
    assert f"continuing run from step {saved}" in said
    assert (exit_note(run_dir)["code"], exit_note(run_dir)["step"]) == (0, saved + 2)


def test_two_processes_signalled_through_their_launcher_then_one_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    launch = start(tmp_path, "run_dir=run", "data.batch_size=8", processes=2)
    wait_for(run_dir / "metrics.jsonl", launch)
    launch.send_signal(signal.SIGTERM)
    _, said = launch.communicate(timeout=240)
    saved = checkpoint.open_checkpoint(run_dir).step
    assert launch.returncode != 0
    notes = [exit_note(run_dir, rank) for rank in range(2)]
    assert [(n["rank"], n["code"], n["step"]) for n in notes] == [(0, 75, saved), (1, 75, saved)], said[
        -3000:
    ]

    alone = start(tmp_path, "run_dir=run", "data.batch_size=8", f"data.train_steps={saved + 1}")
    _, said = alone.communicate(timeout=240)
    assert alone.returncode == 0, said
    assert (
        "the global batch of 16 that run began with stands: 1 processes x 2 micro-batches x 8 samples" in said
    )
    assert checkpoint.open_checkpoint(run_dir).trainer["counters"]["images_seen"] == 16 * (saved + 1)
    three = start(tmp_path, "run_dir=run", "data.batch_size=8", f"data.train_steps={saved + 2}", processes=3)
    _, said = three.communicate(timeout=240)
    assert three.returncode != 0
    assert (
        "continues with its global batch of 16: the global batch of 16 does not divide by 3 processes" in said
    )


def test_a_mistake_found_while_building_leaves_no_directory(tmp_path):
    done = start(tmp_path, "run_dir=run", "model.use_pe=7")
    _, said = done.communicate(timeout=240)
    assert done.returncode == 2, said
    assert "use_pe" in said
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = start(tmp_path, "run_dir=file")
    _, said = done.communicate(timeout=240)
    assert done.returncode == 1, said
    assert "file" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_ctrl_c_saves_leaves_and_a_second_one_does_not_wait(tmp_path):
    run_dir = tmp_path / "run"
    stepping = start(tmp_path, "run_dir=run", "data.num_workers=1")
    wait_for(run_dir / "metrics.jsonl", stepping)
    press_ctrl_c(stepping)
    _, said = stepping.communicate(timeout=240)
    assert stepping.returncode == 130, said
    saved = checkpoint.open_checkpoint(run_dir).step
    assert saved > 0
    assert said.splitlines()[-1] == (
        f"stopped by SIGINT after step {saved}, which is saved; the same command with run_dir=run continues"
    )
    assert (exit_note(run_dir)["code"], exit_note(run_dir)["step"]) == (130, saved)

    again = start(tmp_path, "run_dir=run")
    lines = (run_dir / "metrics.jsonl").stat().st_size
    deadline = time.monotonic() + 240
    while (run_dir / "metrics.jsonl").stat().st_size <= lines and time.monotonic() < deadline:
        assert again.poll() is None, again.communicate()[1][-3000:]
        time.sleep(0.02)
    # Both before the process has come to look: the second does not wait for the step or the save.
    again.send_signal(signal.SIGSTOP)
    press_ctrl_c(again)
    again.send_signal(signal.SIGCONT)
    press_ctrl_c(again)
    _, said = again.communicate(timeout=240)
    assert again.returncode == 130, said
    assert "stopped by" in said.splitlines()[-1] and "SIGINT" in said.splitlines()[-1]

    last = start(tmp_path, "run_dir=run", f"data.train_steps={checkpoint.open_checkpoint(run_dir).step + 1}")
    _, said = last.communicate(timeout=240)
    assert last.returncode == 0, said


def test_ctrl_c_at_a_launcher_stops_and_saves_both_processes(tmp_path):
    run_dir = tmp_path / "run"
    launch = start(tmp_path, "run_dir=run", processes=2)
    wait_for(run_dir / "metrics.jsonl", launch)
    press_ctrl_c(launch)
    _, said = launch.communicate(timeout=240)
    saved = checkpoint.open_checkpoint(run_dir).step
    assert launch.returncode != 0 and saved > 0
    notes = [exit_note(run_dir, rank) for rank in range(2)]
    assert [(n["code"], n["step"]) for n in notes] == [(130, saved), (130, saved)], said[-3000:]


def test_ctrl_c_while_sampling_keeps_what_is_sampled(tmp_path):
    quick = ["data.train_steps=2", "run_dir=run"]
    trained = start(tmp_path, *quick, presets=[*TINY[:2], "metrics=none"])
    assert trained.wait(240) == 0, trained.communicate()[1][-3000:]
    asked = [
        "ckpt=run", "sample_dir=samples", "metrics=none", "loop.progress=false", "loop.device=cpu",
        "num_fid_samples=40", "offline_sample_local_bs=2", "ode.sampling_method=euler", "ode.num_steps=20",
    ]  # fmt: skip
    cut = start(tmp_path, *asked, command="sample_acc.py", presets=[])
    wait_for(tmp_path / "samples" / "000003.png", cut)
    press_ctrl_c(cut)
    _, said = cut.communicate(timeout=240)
    assert cut.returncode == 130, said
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "samples").glob("0*.png")}
    assert 4 <= len(kept) < 40
    assert said.splitlines()[-1] == (
        "stopped by SIGINT: pictures written so far are kept; the same command goes on"
    )
    whole = start(tmp_path, *asked, command="sample_acc.py", presets=[])
    _, said = whole.communicate(timeout=240)
    assert whole.returncode == 0, said
    found = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "samples").glob("0*.png")}
    assert len(found) == 40
    assert kept.items() <= found.items(), "what was there is not made again"
