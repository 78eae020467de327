"""The wheel, installed where no checkout is, does everything."""

import json
import zipfile

import pytest

from tests.packaging.environments import ROOT, build_wheel, empty_environment, install, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    python = empty_environment(tmp_path_factory.mktemp("environment") / "venv")
    install(python, wheel)
    return python


def test_top_level_names_shadow_nobody(wheel):
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    packages = {n for n in names if not n.endswith(".dist-info")}
    assert packages == {
        "zigflow", "scans", "dis_kernels", "dis_mamba", "dis_causal_conv1d", "model_zigma.py", "train_acc.py",
        "sample_acc.py",
    }  # fmt: skip


def test_every_yaml_and_data_source_travels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffix in (("config", "*.yaml"), ("datasets", "*.py")):
        for path in (ROOT / folder).rglob(suffix):
            assert f"zigflow/{path.relative_to(ROOT)}" in names
    for path in [*ROOT.glob("dis_*/**/csrc/*.cpp"), *ROOT.glob("dis_*/**/csrc/*.h")]:
        assert str(path.relative_to(ROOT)) in names


def test_the_wheel_trains_and_samples(python, tmp_path):
    script = "import zigflow, zigflow.datasets.digits as d; print(zigflow.__file__, d.__file__)"
    assert str(ROOT) not in run(python, "-c", script, cwd=tmp_path).stdout
    run(python.parent / "zigflow-train", "+debug=cpu_tiny", "run_dir=run", cwd=tmp_path)
    fast = ("num_fid_samples=40", "ode.sampling_method=euler", "ode.num_steps=5")
    run(python.parent / "zigflow-sample", "ckpt=run", *fast, cwd=tmp_path)
    results = list(tmp_path.glob("run/samples/*/results.json"))
    assert len(results) == 1
    assert json.loads(results[0].read_text())["metrics"]["n"] == 40
    run(python, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "train_acc", "+debug=cpu_tiny", "run_dir=launched",
        cwd=tmp_path, env={"ACCELERATE_USE_CPU": "true"})  # fmt: skip
    assert list(tmp_path.glob("launched/checkpoints/step-*"))


def test_the_wheel_draws_scans(python, tmp_path):
    run(python, "-m", "zigflow.tools", "plot-scans", "--output", "scans.png", cwd=tmp_path)
    assert (tmp_path / "scans.png").stat().st_size > 10_000
    assert "hilbert" in run(python, "-m", "zigflow.tools", "list", "scans", cwd=tmp_path).stdout
