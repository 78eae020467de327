"""The lowest versions that pyproject.toml allows are installed, and do what the newest do."""

import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.packaging.environments import ROOT, build_wheel, run

EXTRAS = ("codec", "torchdiffeq", "sweep", "stream", "s3", "track", "fid")
_NO_INDEX = re.compile(
    r"not found in the package registry|error sending request|failed to fetch|client error|dns error|timed out|offline",
    re.IGNORECASE,
)
CHECK = """
import importlib
from importlib import metadata
from pathlib import Path

from zigflow import paths
from zigflow.plugins import compose_config, validated

modules = 0
for file in metadata.files("zigflow"):
    if file.suffix == ".py" and not file.name.startswith(("triton_kernels", "triton_backward", "__main__")):
        importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
        modules += 1
experiments = sorted(path.stem for path in (Path(paths.config_dir()) / "experiment").glob("*.yaml"))
for name in experiments:
    validated(compose_config([f"experiment={name}", "run_dir=unused"]))

import braceexpand, s3fs, torch_fidelity, webdataset
import hydra_plugins.hydra_joblib_launcher.joblib_launcher, hydra_plugins.hydra_optuna_sweeper.optuna_sweeper
from diffusers import AutoencoderKL
from torchmetrics.image.fid import FrechetInceptionDistance
from zigflow.engine.track_tensorboard import import_writer
from zigflow.engine.track_wandb import import_wandb
from zigflow.samplers.torchdiffeq_adapter import adapters

AutoencoderKL()
assert adapters() and import_wandb() and import_writer()
print(modules, "modules", len(experiments), "experiments")
"""


def _uv() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    assert found, "uv installs the lower bounds: make install puts it into .venv"
    return found


def _lowest(folder: Path) -> Path:
    """The resolved versions, in a file; skips, saying so, where there is no package index to resolve them from."""
    resolved = folder / "lowest.txt"
    command = [
        _uv(), "pip", "compile", "--quiet", "--resolution", "lowest-direct",
        "--python-version", f"{sys.version_info[0]}.{sys.version_info[1]}",
        *(word for extra in EXTRAS for word in ("--extra", extra)),
        "--output-file", resolved, ROOT / "pyproject.toml",
    ]  # fmt: skip
    done = run(*command, cwd=folder, check=False)
    if done.returncode and _NO_INDEX.search(done.stderr):
        pytest.skip(
            f"the lower bounds come from the package index, which is needed here: {done.stderr[-300:]}"
        )
    assert not done.returncode, done.stderr[-3000:]
    return resolved


@pytest.mark.slow
def test_the_lower_bounds_work(tmp_path):
    resolved = _lowest(tmp_path)
    bounds = re.findall(r'"([\w-]+)(?:\[[^]]*\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    chosen = dict(re.findall(r"^([\w-]+)==([\d.]+)", resolved.read_text(), re.MULTILINE))
    lowest = {name: bound for name, bound in bounds if chosen.get(name, "").startswith(bound)}
    assert {"torch", "numpy", "hydra-core", "omegaconf", "accelerate", "safetensors"} <= set(lowest)

    environment = tmp_path / "env"
    run(_uv(), "venv", "--quiet", "--python", sys.executable, environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    install = (_uv(), "pip", "install", "--quiet", "--python", python)
    run(*install, "--requirement", resolved, cwd=tmp_path)
    run(*install, "--no-deps", build_wheel(ROOT, tmp_path / "wheel"), cwd=tmp_path)

    away = tmp_path / "away"
    away.mkdir()
    done = run(python, "-c", CHECK, cwd=away)
    modules, experiments = map(int, re.search(r"(\d+) modules (\d+) experiments", done.stdout).groups())
    assert modules > 200
    assert experiments == len(list((ROOT / "config" / "experiment").glob("*.yaml")))
    one_thread = {"OMP_NUM_THREADS": "1"}
    run(
        environment / "bin" / "zigflow-train", "debug=cpu_tiny", "data.train_steps=2", "run_dir=run", "metrics=none",
        cwd=away, env=one_thread,
    )  # fmt: skip
    run(
        environment / "bin" / "zigflow-sample", "ckpt=run", "metrics=none", "num_fid_samples=4", "data.batch_size=4",
        "ode.sampling_method=torchdiffeq/euler", "ode.num_steps=3", cwd=away, env=one_thread,
    )  # fmt: skip
    assert len(list(away.glob("run/samples/*/*.png"))) >= 4
