"""One small model under every process: it trains, resumes and samples, by every sampler that fits."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from zigflow import plugins
from zigflow.build import train_from_config
from zigflow.sample_job import sample_from_config

TINY = [
    "data=synthetic", "data.image_size=4", "data.batch_size=4", "model.embed_dim=8", "model.depth=2",
    "model.patch_size=1", "ckpt_every=1", "log_every=1", "loop.progress=false",
]  # fmt: skip
PROCESSES = {
    "flow-velocity": ["process=flow"],
    "flow-score": ["process=flow", "train.path_type=VP", "train.prediction=score"],
    "gaussian": ["process=gaussian"],
    "vp": ["process=vp", "process.prediction=v"],
    "sd_discrete": ["process=sd_discrete", "process.min_snr_gamma=5"],
}


def train(run_dir, steps, overrides):
    arguments = [*TINY, *overrides, f"data.train_steps={steps}", f"run_dir={run_dir}"]
    train_from_config(plugins.compose_config(arguments))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def sample(run_dir, target, *overrides):
    arguments = [
        f"ckpt={run_dir}", f"sample_dir={target}", "metrics=none", "loop.progress=false", "num_fid_samples=4",
        "offline_sample_local_bs=4", "ode.sampling_method=euler", "ode.num_steps=3", "sde.num_steps=3",
    ]  # fmt: skip
    sample_from_config(plugins.compose_config([*arguments, *overrides, f"run_dir={target}_log"], "sample"))
    return [np.asarray(Image.open(path)) for path in sorted(target.glob("[0-9]*.png"))]


@pytest.mark.parametrize(
    "name", [n if n in ("gaussian", "vp") else pytest.param(n, marks=pytest.mark.slow) for n in PROCESSES]
)
def test_a_model_trains_resumes_and_samples(name, tmp_path):
    overrides = PROCESSES[name]
    whole = train(tmp_path / "whole", 2, overrides)
    train(tmp_path / "cut", 1, overrides)
    cut = train(tmp_path / "cut", 2, overrides)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (whole, cut)]
    assert len(losses[0]) == 2 and np.isfinite(losses[0]).all()
    assert losses[0] == losses[1], "resuming equals never having stopped"
    modes = [[], ["sample_mode=SDE"]]
    if not name.startswith("flow"):
        diffusion = ["sample_mode=diffusion", "diffusion.num_steps=3"]
        modes += [
            [*diffusion, f"diffusion.sampling_method={method}"]
            for method in ("ddpm", "ddim", "dpm_solver", "dpm_solver++")
        ]
    seen = []
    for number, mode in enumerate(modes):
        images = sample(tmp_path / "cut", tmp_path / f"samples{number}", *mode)
        assert len(images) == 4 and all(image.shape == (4, 4, 3) for image in images)
        seen.append(np.stack(images))
    assert any((a != seen[0]).any() for a in seen[1:])


def test_data_are_measured_and_inverted_under_a_diffusion(tmp_path):
    train(tmp_path / "run", 1, PROCESSES["gaussian"])
    sample(tmp_path / "run", tmp_path / "bits", "likelihood=true")
    bits = json.loads((tmp_path / "bits" / "results.json").read_text())["metrics"]["bits_per_dim"]
    assert 0 < bits < 30
    ddim = ["sample_mode=diffusion", "diffusion.num_steps=ddim5", "ode.reverse=true"]
    sample(tmp_path / "run", tmp_path / "noise", *ddim)
    assert load_file(tmp_path / "noise" / "noise.safetensors")["x0"].shape == (4, 3, 4, 4)
