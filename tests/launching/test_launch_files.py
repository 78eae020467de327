"""The launch files and the README's lines: each starts what it says, on a machine without a GPU too."""

import json
import re

import pytest

from tests.launching.commands import ROOT, finish, free_port, run, start

FILES = sorted((ROOT / "config" / "accelerate").glob("*.yaml"))
README = (ROOT / "README.md").read_text()
TINY = "+debug=cpu_tiny loop.progress=false log_every=1"
LINES = re.findall(r"^accelerate launch --config_file .*train_acc\.py.*$", README, flags=re.M)


def line_of(name):
    """The README's lines with a launch file, in the size of a test."""
    found = [line.partition("  #")[0].strip() for line in LINES if f"/{name}.yaml" in line]
    return [re.sub(r"train_acc\.py.*", f"train_acc.py {TINY}", line) for line in found]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_accelerate_reads_it_and_the_documents_name_it(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    several = config.num_processes > 1
    assert config.distributed_type.value == ("MULTI_GPU" if several else "NO")
    assert config.num_machines == (2 if file.stem == "two_nodes" else 1)
    assert config.mixed_precision == ("bf16" if file.stem == "bf16" else "no")
    numbers = {"cpu2": 2, "gpu1": 1, "bf16": 1, "gpu8": 8, "two_nodes": 16}
    assert config.num_processes == numbers[file.stem]
    assert line_of(file.stem), f"the README has no line with {file.name}"
    assert file.name in (ROOT / "docs" / "launching.md").read_text()
    assert "accelerate launch --config_file config/accelerate/" + file.name in file.read_text()


def test_every_launch_file_that_the_documents_name_exists():
    documents = README + (ROOT / "docs" / "launching.md").read_text()
    named = set(re.findall(r"config/accelerate/(\w+\.yaml)", documents))
    assert named == {file.name for file in FILES}


def the_run(folder):
    """The one run directory that a command has made, with its metrics."""
    (run_dir,) = (folder / "outputs" / "train").iterdir()
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return run_dir, metrics


def ranks_of(run_dir):
    return sorted(p.name for p in run_dir.glob("checkpoints/step-0000008/rank_*.safetensors"))


TWO = ["rank_0000.safetensors", "rank_0001.safetensors"]


@pytest.fixture(scope="module")
def two_cpu_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu2")
    run(line_of("cpu2")[0], folder)
    return the_run(folder)


@pytest.mark.slow
def test_cpu2_starts_two_processes_of_one_run(two_cpu_processes):
    run_dir, metrics = two_cpu_processes
    assert ranks_of(run_dir) == TWO
    assert metrics[-1]["images_seen"] == 8 * 16 * 2
    assert {p.name for p in run_dir.glob("*.log")} == {"train.log", "train-1.log"}


@pytest.mark.slow
def test_torchrun_without_any_setting_is_the_same_run(two_cpu_processes, tmp_path):
    """Sharded, compiled, recomputed: the same losses; no ACCELERATE_USE_CPU needed."""
    options = "loop.shard=true loop.compile=true loop.checkpoint_policy=selective"
    run(f"torchrun --nproc_per_node 2 train_acc.py {TINY} {options}", tmp_path)
    run_dir, metrics = the_run(tmp_path)
    assert ranks_of(run_dir) == TWO
    for got, want in zip(metrics, two_cpu_processes[1], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu1", "bf16"])
def test_one_process(name, tmp_path):
    run(line_of(name)[0], tmp_path)
    run_dir, _ = the_run(tmp_path)
    assert ranks_of(run_dir) == TWO[:1]
    stored = json.loads((run_dir / "checkpoints/step-0000008/trainer.json").read_text())
    assert stored["mixed_precision"] == ("bf16" if name == "bf16" else "no")


@pytest.mark.slow
def test_gpu8_with_another_number(tmp_path):
    (line,) = line_of("gpu8")
    run(line.replace(" train_acc.py", " --num_processes 2 train_acc.py"), tmp_path)
    assert ranks_of(the_run(tmp_path)[0]) == TWO


@pytest.mark.slow
def test_two_machines_make_one_run(tmp_path):
    """The README's two lines, both machines being this one with a process each."""
    lines, port = line_of("two_nodes"), free_port()
    assert [re.search(r"--machine_rank (\d)", line)[1] for line in lines] == ["0", "1"]
    small = f"--num_processes 2 --main_process_ip 127.0.0.1 --main_process_port {port}"
    lines = [re.sub(r"--main_process_ip \S+", small, line) for line in lines]
    for line in lines:
        # Without a name for the run both refuse, so that neither waits for the other.
        assert "RUN_ID" in README.partition(line)[0]
    machines = [start(line, tmp_path, RUN_ID="both") for line in lines]
    for machine in machines:
        finish(machine)
    run_dir, metrics = the_run(tmp_path)
    assert run_dir.name == "both"
    assert ranks_of(run_dir) == TWO
    assert metrics[-1]["images_seen"] == 8 * 16 * 2


@pytest.mark.slow
def test_accelerate_s_own_way_to_two_cpu_processes_is_refused(tmp_path):
    """It starts one process in silence."""
    line = (
        "accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    )
    output = run(f"{line} train_acc.py {TINY}", tmp_path, expected=1)
    assert "error: MASTER_ADDR set without WORLD_SIZE" in output
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_what_the_launcher_is_told_reaches_the_run(tmp_path):
    """accelerate itself forgets gradient accumulation without DeepSpeed."""
    (line,) = line_of("gpu1")
    told = "--gradient_accumulation_steps 2 --mixed_precision bf16 train_acc.py"
    run(line.replace("train_acc.py", told), tmp_path)
    run_dir, metrics = the_run(tmp_path)
    stored = json.loads((run_dir / "checkpoints/step-0000008/config.json").read_text())
    assert (stored["grad_accum"], stored["loop"]["compile"]) == (2, False)
    assert metrics[-1]["images_seen"] == 8 * 16 * 2
    refused = run(line.replace("train_acc.py", f"{told} grad_accum=3"), tmp_path, expected=1)
    assert (
        "error: grad_accum=3, but the launcher was told ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2" in refused
    )
    sampled = f"{told.replace('train_acc', 'sample_acc')} ckpt={run_dir} metrics=none num_fid_samples=2"
    run(re.sub(r"train_acc\.py.*", sampled, line), tmp_path)
    (results,) = run_dir.glob("samples/*/results.json")
    assert json.loads(results.read_text())["protocol"]["precision"] == "bf16"
    sampled = f"--dynamo_backend inductor {sampled}"
    refused = run(re.sub(r"train_acc\.py.*", sampled, line), tmp_path, expected=1)
    assert "error: loop.compile=true compiles training" in refused
