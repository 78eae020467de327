"""What ``sample_acc.py`` promises: chosen samples, npz, captions, videos, likelihood, several processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from zigflow import plugins
from zigflow.engine.lock import RunDirError, sole_writer
from zigflow.engine.ranks import Ranks
from zigflow.engine.sampling_run import Pipeline, SamplingFolderError
from zigflow.evaluation_job import time_facts
from zigflow.processes import Gaussian, StableDiffusion, VariancePreserving
from zigflow.sample_job import sample_from_config
from zigflow.samplers import ChainSampler, DpmSolver, OdeSampler
from zigflow.settings import SettingsError
from zigflow.train_job import train_from_config

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["ode.sampling_method=euler", "ode.num_steps=3", "loop.progress=false", "offline_sample_local_bs=4"]
SHAPES = [
    "data=synthetic", "data.image_size=4", "data.train_steps=1", "data.batch_size=4", "model.embed_dim=8",
    "model.depth=2", "model.patch_size=1", "ckpt_every=1", "log_every=1", "loop.progress=false",
]  # fmt: skip

pytestmark = pytest.mark.slow


def train(folder, name, *overrides):
    run_dir = folder / name
    train_from_config(plugins.compose_config([*SHAPES, *overrides, f"run_dir={run_dir}"]))
    return run_dir


def sample(run_dir, target, *overrides):
    arguments = [f"ckpt={run_dir}", f"sample_dir={target}", "metrics=none", *QUICK, *overrides]
    return sample_from_config(plugins.compose_config([*arguments, f"run_dir={target}_log"], "sample"))


def pngs(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))}


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A class model, a text model and a video model, one step old."""
    folder = tmp_path_factory.mktemp("runs")
    tokens = ["+data.source.tokens=[3,5]", "+data.heldout.tokens=[3,5]"]
    text = [
        "model.has_text=true",
        "model.d_context=5",
        "model.n_context_token=3",
        "model.class_dropout_prob=0",
    ]
    return {
        "class": train(folder, "class"),
        "text": train(folder, "text", *tokens, *(f"+{t}" if "drop" not in t else t for t in text)),
        "video": train(
            folder, "video", "data.video_frames=5", "+model.video_frames=5", "model.scan_type=zzvideo_st"
        ),
    }


def test_chosen_samples_and_classes(runs, tmp_path):
    whole = sample(runs["class"], tmp_path / "whole", "num_fid_samples=12")
    few = sample(runs["class"], tmp_path / "few", "seeds=[9,2]")
    assert sorted(pngs(few)) == ["000002.png", "000009.png"]
    for name, image in pngs(few).items():
        assert np.abs(image.astype(int) - pngs(whole)[name]).max() <= 1
    assert results(few)["protocol"]["seeds"] == [9, 2]
    assert results(few)["protocol"]["n"] == 2
    # Where time ended: a velocity is integrated to the data themselves, without a last step.
    assert results(few)["protocol"]["time"] == {"start": 0.0, "stop": 1.0, "last_step": None}
    # The class of a sample is all that labels= changes: sample 5 is of class 1 by itself.
    one = sample(runs["class"], tmp_path / "one", "seeds=5-8", "labels=[1,3]", "npz=true")
    with np.load(one / "samples_4x4x4x3.npz") as found:
        assert found["arr_1"].tolist() == [1, 3, 1, 3]
        assert np.array_equal(found["arr_0"], np.stack(list(pngs(one).values())))
    assert np.abs(pngs(one)["000005.png"].astype(int) - pngs(whole)["000005.png"]).max() <= 1
    like = sample(runs["class"], tmp_path / "like", "num_fid_samples=8", "labels=data", "npz=true")
    with np.load(like / "samples_8x4x4x3.npz") as found:
        assert set(found["arr_1"].tolist()) <= {0, 1, 2, 3}


def test_a_cut_stochastic_run_continues(runs, tmp_path):
    sde = ["sample_mode=SDE", "sde.num_steps=3", "num_fid_samples=10"]
    whole = sample(runs["class"], tmp_path / "whole", *sde)
    assert results(whole)["protocol"]["time"] == {"start": 0.0, "stop": 0.96, "last_step": "Tweedie"}
    cut = sample(runs["class"], tmp_path / "cut", *sde)
    for index in (3, 4, 9):
        (cut / f"{index:06d}.png").unlink()
    sample(runs["class"], tmp_path / "cut", *sde)
    assert all(np.array_equal(a, b) for a, b in zip(pngs(whole).values(), pngs(cut).values(), strict=True))
    with pytest.raises(SamplingFolderError, match="sample_mode"):
        sample(runs["class"], tmp_path / "cut", "num_fid_samples=10")


@pytest.mark.parametrize("kind", [[], ["likelihood=1", "ode.sampling_method=heun"]], ids=["samples", "bits"])
def test_a_folder_that_another_command_fills_is_refused_untouched(runs, tmp_path, kind):
    given = ["num_fid_samples=4", *kind]
    folder = sample(runs["class"], tmp_path / "a", *given)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with sole_writer(folder, Ranks(), "nothing"):
        with pytest.raises(
            RunDirError, match=f"{folder} is being written by another process .*sample_dir=PATH"
        ):
            sample(runs["class"], tmp_path / "a", *given)
        del before[folder / "lock"]
        assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert set(folder.rglob("*")) == before.keys() | {folder / "lock"}
    sample(runs["class"], tmp_path / "a", *given)


def test_debug_stops_after_four_batches(runs, tmp_path):
    assert len(pngs(sample(runs["class"], tmp_path / "a", "sample_debug=true"))) == 16
    folder = sample(runs["class"], tmp_path / "b", "sample_debug=true", "metrics=digits", "num_fid_samples=3")
    assert len(pngs(folder)) == 3
    assert results(folder)["metrics"] == {"n": 3}, "too few for the judge, which is no error here"


def test_guidance_changes_the_samples_inside_its_interval(runs, tmp_path):
    # A net whose output is not zero as it is at the start of training.
    step = train(tmp_path, "longer", "data.train_steps=30", "optim.lr=1e-2", "ckpt_every=30")
    plain = pngs(sample(step, tmp_path / "plain", "num_fid_samples=4", "weights=model"))
    strong = pngs(sample(step, tmp_path / "strong", "num_fid_samples=4", "cfg_scale=4", "weights=model"))
    never = ["num_fid_samples=4", "cfg_scale=4", "cfg_interval=[0.98,0.99]", "weights=model"]
    outside = pngs(sample(step, tmp_path / "outside", *never))
    assert any((plain[n] != strong[n]).any() for n in plain)
    assert all((plain[n] == outside[n]).all() for n in plain)


def test_no_data_is_needed(runs, tmp_path):
    for name, count in (("class", 4), ("video", 2)):
        folder = sample(runs[name], tmp_path / name, f"num_fid_samples={count}", "data=none")
        assert len(pngs(folder)) == count
    with pytest.raises(SettingsError, match="captions=FILE.npy"):
        sample(runs["text"], tmp_path / "text", "num_fid_samples=4", "data=none")
    with pytest.raises(SettingsError, match="no data to measure"):
        sample(runs["class"], tmp_path / "bits", "likelihood=true", "data=none")


def test_captions_from_a_file(runs, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "c.npy", rng.standard_normal((3, 2, 3, 5)).astype(np.float16))
    given = ["num_fid_samples=5", "data=none", f"captions={tmp_path / 'c.npy'}"]
    folder = sample(runs["text"], tmp_path / "a", *given)
    assert len(pngs(folder)) == 5
    assert len(results(folder)["protocol"]["captions"]) == 64
    assert not (folder / "samples_5x4x4x3.npz").exists()
    np.save(tmp_path / "c.npy", rng.standard_normal((3, 3, 5)))
    with pytest.raises(SamplingFolderError, match="captions"):
        sample(runs["text"], tmp_path / "a", *given)
    np.save(tmp_path / "c.npy", rng.standard_normal((3, 3, 4)))
    with pytest.raises(SettingsError, match="model.d_context is 5"):
        sample(runs["text"], tmp_path / "b", *given)
    assert len(pngs(sample(runs["text"], tmp_path / "own", "num_fid_samples=2"))) == 2
    with pytest.raises(SettingsError, match="reads text: drop labels="):
        sample(runs["text"], tmp_path / "d", "labels=[1]")
    with pytest.raises(SettingsError, match="needs a text model"):
        sample(runs["class"], tmp_path / "e", f"captions={tmp_path / 'c.npy'}")


def test_videos_are_grids_of_frames(runs, tmp_path):
    folder = sample(runs["video"], tmp_path / "a", "num_fid_samples=3", "npz=true")
    strips = pngs(folder)
    assert [strip.shape for strip in strips.values()] == [(4, 20, 3)] * 3
    with np.load(folder / "samples_3x4x4x3.npz") as found:
        assert found["arr_0"].shape == (3, 5, 4, 4, 3)
        assert np.array_equal(found["arr_0"][1, 2], strips["000001.png"][:, 8:12])
    grids = sorted((folder / "videos").glob("*.png"))
    assert [grid.name for grid in grids] == sorted(strips)
    assert np.array_equal(np.asarray(Image.open(grids[1]))[:4, :4], strips["000001.png"][:, :4])


def test_a_joint_scan_trains_and_samples_videos(tmp_path):
    video = ["data.video_frames=3", "+model.video_frames=3", "model.scan_type=zzvideo_sst"]
    run_dir = train(tmp_path, "joint", *video, "scan=hilbert3d")
    folder = sample(run_dir, tmp_path / "a", "num_fid_samples=2")
    assert [strip.shape for strip in pngs(folder).values()] == [(4, 12, 3)] * 2


def test_likelihood_and_encoding_have_folders_of_their_own_and_continue(runs, tmp_path):
    given = ["likelihood=1", "num_fid_samples=10", "ode.sampling_method=heun"]
    folder = sample(runs["class"], tmp_path / "bits", *given)
    found = results(folder)
    assert 0 < found["metrics"]["bits_per_dim"] < 30
    assert found["protocol"]["n"] == 10
    assert found["protocol"]["dequantization"] == "uniform over 256 levels"
    assert found["protocol"]["time"] == {"start": 1.0, "stop": 0.0, "last_step": None}
    before = {path: path.stat().st_mtime_ns for path in (folder / "batches").iterdir()}
    assert len(before) == 3
    lost = sorted(before)[1]
    lost.unlink()
    sample(runs["class"], tmp_path / "bits", *given)
    assert results(folder) == found
    assert {path for path in before if path.stat().st_mtime_ns != before[path]} == {lost}
    with pytest.raises(SamplingFolderError, match="another kind"):
        sample(runs["class"], tmp_path / "bits", "num_fid_samples=4")
    noise = sample(runs["class"], tmp_path / "noise", "ode.reverse=true", "num_fid_samples=6")
    assert load_file(noise / "noise.safetensors")["x0"].shape == (6, 3, 4, 4)
    with pytest.raises(SettingsError, match="drop them"):
        sample(runs["class"], tmp_path / "x", "likelihood=1", "seeds=[1]")
    named_by_itself = [f"ckpt={runs['class']}", "likelihood=1", "num_fid_samples=4", *QUICK, "run_dir=x"]
    own = sample_from_config(plugins.compose_config(named_by_itself, "sample"))
    assert own.parent == runs["class"] / "samples"
    assert own.name.startswith("likelihood_")


def test_what_cannot_be_judged_is_said_before_sampling(runs, tmp_path):
    for change, words in (
        (["num_fid_samples=3"], "3 samples are too few"),
        (["num_fid_samples=400"], "of class 0 need as many heldout images"),
        (["seeds=0-40", "labels=[2]", "+data.heldout.num_samples=40"], "41 samples of class 2"),
        (
            ["num_fid_samples=8", "data.heldout.root=/nowhere"],
            r"unknown key data\.heldout\.root: ShapesSource",
        ),
    ):
        folder = tmp_path / "refused"
        with pytest.raises(SettingsError, match=words) as caught:
            sample(runs["class"], folder, "metrics=digits", *change)
        assert "metrics=none" in str(caught.value) or "unknown key" in words
        assert "\n" not in str(caught.value)
        assert not pngs(folder)


def launch(processes, folder, *arguments):
    command = [str(ROOT / "sample_acc.py"), *arguments, *QUICK]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def without_command(folder):
    found = results(folder)
    found["protocol"].pop("command")
    return found


@pytest.mark.parametrize(
    "options, kind",
    [
        (["num_fid_samples=19", "npz=true", "labels=[1,3,2]", "metrics=none"], "png"),
        (["num_fid_samples=19", "sample_mode=SDE", "sde.num_steps=3", "metrics=none"], "png"),
        (["num_fid_samples=19", "likelihood=1"], "batches"),
        (["num_fid_samples=19", "ode.reverse=true"], "batches"),
    ],
    ids=["ode", "sde", "likelihood", "encoding"],
)
def test_two_processes_share_the_work(runs, tmp_path, options, kind):
    """Every file of one process, and each sample counted once."""
    options = [f"ckpt={runs['class']}", *options]
    one = tmp_path / "one"
    sample_from_config(plugins.compose_config([*options, *QUICK, f"sample_dir={one}", "run_dir=x"], "sample"))
    launch(2, tmp_path, *options, f"sample_dir={tmp_path / 'two'}")
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(
        str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two").rglob("*") if p.is_file()
    )
    for name in names:
        if name != "results.json":
            assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert without_command(one) == without_command(tmp_path / "two")
    assert results(one)["protocol"]["n"] == 19
    assert any(name.startswith("batches") for name in names) == (kind == "batches")
    assert ("000018.png" in names) == (kind == "png")


@pytest.mark.parametrize(
    "options, pattern",
    [
        (["sample_mode=SDE", "sde.num_steps=20", "metrics=none"], "*.png"),
        (["likelihood=1", "ode.num_steps=10"], "batches/*.safetensors"),
    ],
    ids=["sde", "likelihood"],
)
def test_killed_while_working_and_continued_equals_never_stopped(runs, tmp_path, options, pattern):
    options = [f"ckpt={runs['class']}", "num_fid_samples=80", *QUICK, *options]
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sample_acc.py"), *options, f"sample_dir={cut}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while len(list(cut.glob(pattern))) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in cut.glob(pattern) if not path.name.startswith(".")}
    assert not (cut / "results.json").exists(), "the run ended before it could be killed"
    for folder in (cut, tmp_path / "whole"):
        arguments = [*options, f"sample_dir={folder}", "run_dir=x"]
        sample_from_config(plugins.compose_config(arguments, "sample"))
    assert len(kept) >= 5
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "nothing is computed twice"
    names = sorted(str(p.relative_to(cut)) for p in cut.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    for name in names:
        if name != "results.json":
            assert (cut / name).read_bytes() == (folder / name).read_bytes(), name
    assert results(cut)["metrics"] == results(folder)["metrics"]


@pytest.mark.parametrize(
    "sampler, process, want",
    [
        (DpmSolver(), Gaussian("cosine"), (0.00392, 0.999, "data")),
        (DpmSolver(lambda_floor=None, last_step=False), Gaussian("cosine"), (0.0, 0.999, None)),
        (OdeSampler(), VariancePreserving(), (0.0, 0.9999, "data")),
        (ChainSampler("ddim", 20), StableDiffusion(), (0.0, 0.999, "data")),
    ],
)
def test_results_say_where_time_ended(sampler, process, want):
    found = json.loads(json.dumps(time_facts(Pipeline(None, process, sampler, None))))["time"]
    assert (found["start"], found["stop"]) == pytest.approx(want[:2], abs=1e-5)
    assert found["last_step"] == want[2]
