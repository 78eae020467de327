"""The demo, as ``make demo`` runs it: trained, sampled, judged, with a golden beginning of the loss curve."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dis_mamba import available_backends
from zigflow.engine.log import read_metrics
from zigflow.metrics.results import read_results

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "demo_loss.json"

pytestmark = [pytest.mark.slow, pytest.mark.whole_machine]


def commands(run_dir):
    """The demo's recipe, read from the Makefile."""
    text = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", text, flags=re.M)[1]
    lines = [
        line.strip().replace("$(PY)", sys.executable).replace("$(DEMO_DIR)", run_dir)
        for line in recipe.splitlines()
    ]
    assert len(lines) == 3
    return lines


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("OMP_NUM_THREADS", None)
    printed = []
    for line in commands("outputs/demo"):
        words = [str(ROOT / w) if w in ("train_acc.py", "sample_acc.py") else w for w in line.split()]
        if words[1].endswith("train_acc.py"):
            words.append("log_every=1")
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    return folder, printed


def test_the_first_hundred_losses_are_the_golden_ones(demo):
    folder, _ = demo
    golden = json.loads(GOLDEN.read_text())
    rows = read_metrics(folder / "outputs" / "demo" / "metrics.jsonl")
    got = {r["step"]: r["loss"] for r in rows}
    assert len(golden["loss"]) == 100
    for step, want in enumerate(golden["loss"], 1):
        assert abs(got[step] - want) <= 1e-3 * want, f"step {step}: {got[step]}, golden {want}"


def test_every_threshold_is_met(demo):
    folder, _ = demo
    metrics, protocol = read_results(next(folder.glob("outputs/demo/samples/*/results.json")))
    assert protocol["n"] == 500
    assert metrics["classifier_heldout_accuracy"] >= 0.98
    assert metrics["agreement"] >= 0.95
    assert metrics["coverage"] >= 0.9
    assert metrics["nearest_train_distance_ratio"] >= 0.9
    assert metrics["frechet_ratio"] <= 1.5
    assert metrics["passed"] is True
    for key in ("guidance", "sampler", "weights_sha256", "ids_sha256", "reference", "versions", "command"):
        assert protocol[key]


def test_it_says_where_the_pictures_lie_and_they_are_pictures(demo):
    folder, printed = demo
    for label in ("sample grid", "loss curve", "results"):
        path = folder / re.search(rf"{label}\s+(\S+)", printed[-1])[1]
        assert path.is_file()
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 100
    assert len(list(folder.glob("outputs/demo/samples/*/[0-9]*.png"))) == 500


def test_the_demo_ran_on_the_fastest_backend_of_this_machine(demo):
    folder, _ = demo
    log = (folder / "outputs" / "demo" / "train.log").read_text()
    backends = {name: reason for name, reason in available_backends().items() if name in ("cpu", "torch")}
    fastest = next(name for name, reason in backends.items() if reason is None)
    assert f"selective_scan runs on backend '{fastest}'" in log
