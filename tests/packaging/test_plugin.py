"""A scan order from a separately installed package is found with no change of ours."""

import json

import pytest

from tests.packaging.environments import ROOT, build_wheel, empty_environment, install, run

pytestmark = pytest.mark.slow

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "columns-down"
version = "1.0"

[project.entry-points."zigflow.scans"]
columns_down = "columns_down"

[project.entry-points."zigflow.plugins"]
columns_down = "columns_down_plugin"

[tool.setuptools]
packages = ["columns_down", "columns_down_plugin"]

[tool.setuptools.package-data]
columns_down_plugin = ["config/**/*.yaml"]
"""

SCAN = """
import sys
import numpy as np
from scans import register_scan

assert "torch" not in sys.modules, "a scan plug-in is loaded before torch"


@register_scan("columns_down")
def columns_down(h, w):
    return [np.arange(h * w).reshape(h, w).T.reshape(-1)]
"""

MODEL_YAML = """
name: from_a_plugin
_target_: model_zigma.ZigMa
in_channels: 1
img_dim: 8
patch_size: 2
embed_dim: 16
depth: 2
scan_type: columns_down
num_classes: 10
"""

DATA_YAML = """
name: data_from_a_plugin
train_steps: 4
batch_size: 4
image_size: 8
channels: 1
num_classes: 10
source:
  _target_: zigflow.datasets.synthetic.ShapesSource
  num_samples: 16
  size: ${data.image_size}
  channels: ${data.channels}
  num_classes: ${data.num_classes}
"""

RECIPE_YAML = """
# @package _global_
optim:
  lr: 3e-3
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "package"
    (source / "columns_down").mkdir(parents=True)
    config = source / "columns_down_plugin" / "config"
    for group in ("model", "data", "recipe"):
        (config / group).mkdir(parents=True)
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "columns_down" / "__init__.py").write_text(SCAN)
    (source / "columns_down_plugin" / "__init__.py").write_text("LOADED = True\n")
    (config / "model" / "from_a_plugin.yaml").write_text(MODEL_YAML)
    (config / "data" / "data_from_a_plugin.yaml").write_text(DATA_YAML)
    (config / "recipe" / "data_from_a_plugin.yaml").write_text(RECIPE_YAML)
    python = empty_environment(folder / "venv")
    install(python, build_wheel(ROOT, folder / "ours"))
    install(python, build_wheel(source, folder / "theirs"))
    return python


def test_the_scan_is_listed_drawn_and_a_choice(python, tmp_path):
    assert "columns_down" in run(python, "-m", "zigflow.tools", "list", "scans", cwd=tmp_path).stdout
    run(
        python,
        "-m",
        "zigflow.tools",
        "plot-scans",
        "--scan",
        "columns_down",
        "--output",
        "one.png",
        cwd=tmp_path,
    )
    assert (tmp_path / "one.png").is_file()
    help_text = run(python.parent / "zigflow-train", "--help", cwd=tmp_path).stdout
    assert "columns_down" in help_text
    assert "from_a_plugin" in help_text
    assert "data_from_a_plugin" in help_text


def test_data_of_a_plugin_are_trained_on_by_their_own_recipe(python, tmp_path):
    options = ("data=data_from_a_plugin", "model=from_a_plugin", "loop.progress=false", "run_dir=c")
    run(python.parent / "zigflow-train", *options, cwd=tmp_path)
    stored = json.loads(next(tmp_path.glob("c/checkpoints/step-0000004/config.json")).read_text())
    assert stored["data"]["name"] == "data_from_a_plugin"
    assert stored["optim"]["lr"] == 3e-3
    # No codec and no metrics of that name: pixels, and samples that are not judged.
    assert stored["codec"] == {"_target_": "zigflow.codec.IdentityCodec"}
    assert stored["metrics"] == {"_target_": None}
    mistake = run(python.parent / "zigflow-train", "data=data_from_a_plugn", cwd=tmp_path, check=False)
    assert mistake.returncode == 2
    assert "did you mean data_from_a_plugin" in mistake.stderr


def test_a_run_with_the_scan_and_the_plugin_model(python, tmp_path):
    run(python.parent / "zigflow-train", "+debug=cpu_tiny", "scan=columns_down", "run_dir=a", cwd=tmp_path)
    run(python.parent / "zigflow-train", "+debug=cpu_tiny", "model=from_a_plugin", "run_dir=b", cwd=tmp_path)
    for name in ("a", "b"):
        trainer = next(tmp_path.glob(f"{name}/checkpoints/step-*/trainer.json"))
        assert json.loads(trainer.read_text())["plugins"] == ["columns_down"]


def test_without_the_plugin_the_answer_names_known_scans(tmp_path):
    import sys

    done = run(sys.executable, ROOT / "train_acc.py", "scan=columns_down", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "scan=columns_down does not exist" in done.stderr
    assert "zigzag" in done.stderr
