"""benchmarks/models.py at a tiny size: its arrangements compute the same, and a wrong one is not timed."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dis_kernels.tokenwise import tokenwise_backends

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "models.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script
    spec = importlib.util.spec_from_file_location("benchmark_cases", SCRIPT.with_name("cases.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


@pytest.fixture
def cases(bench):
    options = Namespace(device=torch.device("cpu"), precision="no", backend="torch")
    setting = bench.SIZES["tiny"][0]
    state = bench.weights_of(setting, options)
    return [bench.Case(setting, name, "eager", "none", state, options) for name in bench.ARRANGEMENTS]


def report_of(command, target):
    """What a benchmark writes."""
    done = subprocess.run(
        [*command, "--output", target],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


def test_the_arrangements_compute_the_same(bench, cases):
    bench.check(cases, "no")
    ours, published, _ = (case.model.state_dict().keys() for case in cases)
    assert ours == published


def test_a_wrong_arrangement_is_not_timed(bench, cases):
    mixer = cases[1].model.blocks[1].mixer
    mixer.inverse.copy_(torch.arange(len(mixer.inverse)))
    with pytest.raises(
        bench.Difference, match="published, eager, checkpoint policy none: the output differs"
    ):
        bench.check(cases, "no")


def test_an_order_without_effect_is_noticed(bench, cases):
    ours, _, plain = cases
    with torch.no_grad():
        for case in (ours, plain):
            for block in case.model.blocks:
                block.mixer.out_proj.weight.zero_()
    with pytest.raises(bench.Difference, match="does not depend on the scan order"):
        bench.check([ours, plain], "no")


@pytest.mark.parametrize("family", ["dis", "dim", "dit", "uvit"])
@pytest.mark.parametrize("width, depth", [(256, 8), (768, 24)])
def test_a_peer_has_as_many_parameters(bench, family, width, depth):
    setting = bench.Setting("", width, depth, 2, 64, 1)
    sizes = {
        name: bench.parameters(bench.build(setting, name, "auto", torch.device("meta")))
        for name in ("ours", family)
    }
    # Half a block of the peer, of which there are a few.
    assert sizes[family] == pytest.approx(sizes["ours"], rel=0.04 if width == 768 else 0.16)


@pytest.mark.slow
def test_it_runs_and_writes_what_it_measured(bench, tmp_path):
    target = tmp_path / "result.json"
    command = [
        sys.executable,
        SCRIPT,
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--backend",
        "torch",
        "--modes",
        "eager",
    ]
    report = report_of([*command, "--repeats", "2", "--threads", "1", "--note", "a test"], target)
    for key in ("commit", "hardware", "load_average", "versions", "peak_tflop_per_second", "what"):
        assert report[key], key
    assert report["threads"] == 1
    assert report["note"] == "a test"
    assert "benchmarks/models.py --size tiny" in report["command"]
    # The keyword of mixers says nothing of what runs around them.
    around = "cpu" if tokenwise_backends()["cpu"] is None else "torch"
    assert report["backends"] == {
        "selective_scan": "torch", "causal_conv1d": "torch", "add_norm_modulate": around, "gated_add": around,
    }  # fmt: skip
    (setting,) = report["settings"]
    assert setting["tokens"] == 16
    rows = {(r["arrangement"], r["checkpoint_policy"]): r for r in setting["rows"]}
    assert set(rows) == {
        ("ours", "none"),
        ("published", "none"),
        ("none", "none"),
        *((family, "none") for family in bench.PEERS),
        ("ours", "block"),
        ("ours", "selective"),
    }
    for row in rows.values():
        assert row["mode"] == "eager"
        assert row["state_mib"] > 0
        assert row["train"]["images_per_second"] == pytest.approx(2e3 / row["train"]["step_ms"], rel=0.05)
        assert row["train"]["mfu"] >= 0
        assert ("inference" in row) == (row["checkpoint_policy"] == "none")
    compared = (
        "with_order_over_none",
        "published_over_ours",
        *(f"{name}_over_ours" for name in bench.PEERS),
    )
    for ratios in (setting[name] for name in compared):
        assert set(ratios) == {"eager train", "eager inference"}
        for ratio in ratios.values():
            assert ratio["range"][0] <= ratio["median"] <= ratio["range"][1]


@pytest.mark.slow
def test_every_backend_is_timed_after_it_was_compared(tmp_path):
    target = tmp_path / "result.json"
    sizes = ["--width", "32", "--depth", "3", "--side", "4", "--repeats", "1", "--threads", "1"]
    command = [sys.executable, SCRIPT.with_name("backends.py"), "--backends", "torch", "reference", *sizes]
    report = report_of([*command, "--device", "cpu"], target)
    assert report["tokens"] == 16
    assert set(report["families"]) == {"zigma", "dis", "dim"}
    for family in report["families"].values():
        assert list(family["backends"]) == ["reference", "torch"]
        for kinds in family["backends"].values():
            assert all(kinds[kind]["step_ms"] > 0 for kind in ("train", "inference"))
