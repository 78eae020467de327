"""Every command and every piece of Python in the README runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
OFFICIAL = ROOT / "tests" / "parity" / "fixtures" / "zigma" / "checkpoint" / "0000010.pt"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
PYTHON = [body for language, body in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ").partition("  #")[0].strip()
    for language, body in BLOCKS
    if not language
    for line in body.splitlines()
    if re.match(r"(\$ )?(python|accelerate|make|pip) ", line)
]
LINKS = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]


def test_there_is_something_to_test():
    assert len(COMMANDS) > 20
    assert len(PYTHON) == 2
    assert "make demo" in COMMANDS and "make test" in COMMANDS


@pytest.mark.parametrize("target", LINKS)
def test_links_and_pictures_exist(target):
    assert (ROOT / target.partition("#")[0]).is_file()


def test_quick_demo_runs_on_the_cpu(capsys):
    # Four samples of the ten and a smaller net: the same lines, a size that a test can afford.
    body = PYTHON[0].replace("640", "64").replace("depth=18", "depth=2").replace("(10", "(4")
    exec(compile(body, "README.md", "exec"), {})
    assert "torch.Size([4, 3, 32, 32])" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_demo_runs_verbatim_on_the_cpu(capsys):
    exec(compile(PYTHON[0], "README.md", "exec"), {})
    assert "torch.Size([10, 3, 32, 32])" in capsys.readouterr().out


def test_official_weights_snippet(monkeypatch, tmp_path):
    from zigflow import official

    shutil.copy(OFFICIAL, tmp_path / "churches256_0280000.pt")
    monkeypatch.chdir(tmp_path)
    kwargs = official.read_official(OFFICIAL, "zigma").ctor_kwargs
    body = re.sub(r"^kwargs = \{.*?\}", f"kwargs = {kwargs!r}", PYTHON[1], flags=re.M | re.S)
    scope = {}
    exec(compile(body, "README.md", "exec"), scope)
    assert scope["model"](torch.rand(1, 4, 4, 4), torch.rand(1)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the digits and a tiny trained run where the README has its demo run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(OFFICIAL, folder / "churches256_0280000.pt")
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    run("python train_acc.py debug=cpu_tiny run_dir=outputs/demo", folder)
    return folder


def run(command, folder, expected=0):
    words = shlex.split(command)
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    words = [str(ROOT / w) if w in ("train_acc.py", "sample_acc.py") else w for w in words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def affordable(command):
    """The command with the sizes of a test added; what it does stays the same."""
    if "train_acc.py" in command and not re.search(r"--help|--cfg|debug=|bath_size", command):
        command += " debug=cpu_tiny"
        command = re.sub(r"data.train_steps=\d+", "data.train_steps=4", command)
    if "debug=overfit" in command:
        command += " data.train_steps=3 model.depth=2"
    if "sample_acc.py ckpt=outputs" in command:
        command += " num_fid_samples=20 offline_sample_local_bs=20"
        command = re.sub(r"num_steps=\d+", "num_steps=4", command)
    return command


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python") and "churches" not in c])
def test_command_runs(command, workplace):
    if "samples/NAME" in command:
        # The name that sampling gives its folder, chosen here.
        made = "python sample_acc.py ckpt=outputs/demo num_fid_samples=20 ode.sampling_method=euler ode.num_steps=3"
        run(f"{made} sample_dir=outputs/demo/samples/NAME", workplace)
    expected = 2 if "bath_size" in command else 0
    done = run(affordable(command), workplace, expected)
    if expected:
        assert done.stderr.strip() in README


def test_launches_are_run_by_their_own_tests():
    launched = [c for c in COMMANDS if c.startswith("accelerate")]
    assert launched
    assert all(c.startswith("accelerate launch --config_file config/accelerate/") for c in launched)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "churches" in c])
def test_official_commands_reach_the_autoencoder(command, workplace):
    """The stored file is smaller than the README's; the autoencoder's weights are not ours to ship."""
    command = command.replace("model=zigzag8_b1_pe2 ", "")
    if "convert-checkpoint" in command:
        assert "parameters" in run(command, workplace).stdout
        assert (workplace / "outputs" / "churches" / "checkpoints").is_dir()
        return
    done = run(command, workplace, expected=2)
    assert done.stderr.startswith("error: codec")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pip ")])
def test_pip_lines_name_what_exists(command):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"\[(\w+)\]", command):
        assert extra in project["optional-dependencies"]
