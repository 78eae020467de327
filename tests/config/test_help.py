"""``--help`` shows what can be typed and what it means, without torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from zigflow import plugins
from zigflow.command_help import PRESETS, help_text, keys_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["default", "sample"])
def shown(request):
    plugins.prepare()
    return request.param, help_text(plugins._parser().parse_args([]), request.param)


def test_every_top_level_key_is_shown_with_its_meaning(shown):
    name, text = shown
    cfg = plugins.compose_config(["run_dir=x"], name)
    about = {key.path: key.about.text for key in keys_of(name)}
    for key in cfg:
        assert re.search(rf"^  {key} .*  {re.escape(about[key])}$", text, flags=re.M), key
    assert "seeds" in about if name == "sample" else "seeds" not in about


def test_groups_of_one_file_are_no_choices(shown):
    _, text = shown
    groups = re.findall(r"^  (\w+): ", text.partition("Presets")[0], flags=re.M)
    assert {"data", "model", "scan", "process", "optim", "codec", "metrics"} <= set(groups)
    assert not {"ode", "sde", "loop", "wandb", "dist", "diffusion", "upsample", "recipe", "accelerate"} & set(
        groups
    )
    offered = re.search(r"^  codec: .*\n    (.*)$", text, flags=re.M)[1]
    assert "sd_vae" in offered and "imagenet256" not in offered


def test_presets_and_plain_values_are_shown(shown):
    name, text = shown
    assert all(f"  {preset}: " in text for preset in PRESETS) and "zigma_celebamm256_zigzag8" in text
    assert re.search(r"^  ode\.num_steps +250 +grid points", text, flags=re.M)
    # A training has no checkpoint to take a model from.
    assert ("from_checkpoint" in text.partition("Keys (")[0]) == (name == "sample")


def test_help_takes_overrides_and_presets_without_a_sign(tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train_acc.py', '--help', 'debug=cpu_tiny', 'data.name=mine']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train_acc.py')!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  data\.train_steps +8 ", done.stdout, flags=re.M)
    assert re.search(r"^  data\.name +mine ", done.stdout, flags=re.M)
    assert list(tmp_path.iterdir()) == []
