"""Every family under every process: one small model trains, resumes and samples, by every sampler that fits.

A family is a class that some file of config/model names; a new one is found by that file.
"""

import functools
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from zigflow import plugins
from zigflow.paths import config_dir
from zigflow.sample_job import sample_from_config
from zigflow.train_job import train_from_config

COMMON = [
    "data=synthetic", "data.image_size=4", "data.batch_size=4", "ckpt_every=1", "log_every=1", "loop.progress=false",
    "loop.device=cpu",
]  # fmt: skip
TINY = [*COMMON, "model.embed_dim=8", "model.depth=2", "model.patch_size=1"]
# What a family's file may have, and how small it gets; num_heads divides embed_dim.
SMALL = {
    "in_channels": 3, "img_dim": 4, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4,
    "video_frames": 0,
}  # fmt: skip
PROCESSES = {
    "flow-velocity": ["process=flow"],
    "flow-score": ["process=flow", "train.path_type=VP", "train.prediction=score"],
    "gaussian": ["process=gaussian"],
    "vp": ["process=vp"],
    "sd-discrete": ["process=sd_discrete", "process.min_snr_gamma=5"],
    "v-prediction": ["process=vp", "process.prediction=v"],
}


@functools.cache
def families():
    """A family's class -> the first file of config/model that builds it for classes of images."""
    found = {}
    for path in sorted((config_dir() / "model").glob("*.yaml")):
        node = yaml.safe_load(path.read_text())
        plain = not node.get("has_text") and not node.get("video_frames") and not node.get("drop_sigma")
        if "_target_" in node and plain:
            found.setdefault(node["_target_"].rpartition(".")[2], (path.stem, node))
    return found


def tiny(family, process):
    """Overrides that make a family's file a small model for the synthetic data under a process."""
    name, node = families()[family]
    small = {key: value for key, value in SMALL.items() if key in node}
    if process.startswith("flow") and node.get("learn_sigma"):
        small["learn_sigma"] = False
    return [*COMMON, f"model={name}", *(f"model.{key}={value}" for key, value in small.items())]


def train(run_dir, steps, overrides, small=TINY):
    arguments = [*small, *overrides, f"data.train_steps={steps}", f"run_dir={run_dir}"]
    train_from_config(plugins.compose_config(arguments))
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def sample(run_dir, target, *overrides):
    arguments = [
        f"ckpt={run_dir}", f"sample_dir={target}", "metrics=none", "loop.progress=false", "num_fid_samples=4",
        "offline_sample_local_bs=4", "ode.sampling_method=euler", "ode.num_steps=3", "sde.num_steps=3",
        "loop.device=cpu",
    ]  # fmt: skip
    sample_from_config(plugins.compose_config([*arguments, *overrides, f"run_dir={target}_log"], "sample"))
    return [np.asarray(Image.open(path)) for path in sorted(target.glob("[0-9]*.png"))]


def samplers(process):
    """The sampling modes of a process, each as overrides."""
    modes = [["sample_mode=ODE"], ["sample_mode=SDE"]]
    if not process.startswith("flow"):
        methods = ("ddpm", "ddim", "dpm_solver", "dpm_solver++")
        common = ["sample_mode=diffusion", "diffusion.num_steps=3"]
        modes += [[*common, f"diffusion.sampling_method={method}"] for method in methods]
    return modes


def pairs():
    """Every family and process; of the processes each family has two in the fast tests, the next one the next two."""
    for place, family in enumerate(families()):
        for number, process in enumerate(PROCESSES):
            quick = number in (2 * place % len(PROCESSES), (2 * place + 1) % len(PROCESSES))
            yield pytest.param(family, process, marks=() if quick else pytest.mark.slow)


def test_families_are_found_by_their_files():
    assert set(families()) >= {"ZigMa", "DiT", "UViT"}


@pytest.mark.parametrize("family, process", list(pairs()))
def test_a_model_trains_resumes_and_samples(family, process, tmp_path):
    small, overrides = tiny(family, process), PROCESSES[process]
    whole = train(tmp_path / "whole", 2, overrides, small)
    train(tmp_path / "cut", 1, overrides, small)
    cut = train(tmp_path / "cut", 2, overrides, small)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (whole, cut)]
    assert len(losses[0]) == 2 and np.isfinite(losses[0]).all()
    assert losses[0] == losses[1], "resuming equals never having stopped"
    # The first family samples in every way that fits, the others in two.
    modes, place = samplers(process), list(families()).index(family)
    chosen = [modes[0], modes[1 + place % (len(modes) - 1)]] if place else modes
    seen = []
    for number, mode in enumerate(chosen):
        images = sample(tmp_path / "cut", tmp_path / f"samples{number}", *mode)
        assert len(images) == 4 and all(image.shape == (4, 4, 3) for image in images)
        seen.append(np.stack(images))
    assert any((a != seen[0]).any() for a in seen[1:])


def test_data_are_measured_and_inverted_under_a_diffusion(tmp_path):
    train(tmp_path / "run", 1, PROCESSES["gaussian"])
    sample(tmp_path / "run", tmp_path / "bits", "likelihood=true")
    bits = json.loads((tmp_path / "bits" / "results.json").read_text())["metrics"]["bits_per_dim"]
    assert 0 < bits < 30
    chain = [
        "likelihood=true",
        "sample_mode=diffusion",
        "diffusion.sampling_method=ddpm",
        "diffusion.num_steps=4",
    ]
    sample(tmp_path / "run", tmp_path / "bound", *chain)
    found = json.loads((tmp_path / "bound" / "results.json").read_text())
    assert found["metrics"]["bits_per_dim"] > 0 and found["protocol"]["n"] == 4
    assert found["protocol"]["estimate"] == "variational bound over 4 steps"
    ddim = ["sample_mode=diffusion", "diffusion.num_steps=ddim5", "ode.reverse=true"]
    sample(tmp_path / "run", tmp_path / "noise", *ddim)
    assert load_file(tmp_path / "noise" / "noise.safetensors")["x0"].shape == (4, 3, 4, 4)
