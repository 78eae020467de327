"""Every experiment file: it says what was published, composes for both commands, fits its data, and trains when shrunk.

A new file is found by its name alone. What the files of a family must repeat from its paper is checked below.
"""

import copy
import functools
import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.zigma_shards import save_autoencoder
from zigflow import plugins
from zigflow.paths import config_dir
from zigflow.preflight import check_training
from zigflow.settings import Settings
from zigflow.stored_config import complete_from_defaults
from zigflow.train_job import train_from_config

FILES = {path.stem: path.read_text() for path in sorted((config_dir() / "experiment").glob("*.yaml"))}
EXPERIMENTS = [name for name, text in FILES.items() if "for: sample" not in text]
# One of each kind of data and process; the others differ in numbers.
QUICK = (
    "dis_celeba32_s_2", "dit_clipped_coco", "dit_imagenet256_xl_2", "sit_imagenet256_xl_2", "uvit_cifar10_small",
    "uvit_imagenet256_huge",
    "zigma_churches256_zigzag8",
)  # fmt: skip
FACTOR = 2  # of the tiny autoencoder


def compose(experiment, *overrides, name="default"):
    return plugins.compose_config([f"+experiment={experiment}", "run_dir=unused", *overrides], name)


@functools.cache
def _plain(experiment, name):
    return OmegaConf.to_container(compose(experiment, name=name), resolve=True)


def plain(experiment, name="default"):
    return copy.deepcopy(_plain(experiment, name))


class TinySource:
    """Two samples with the fields that an experiment's data have, at a small size."""

    fingerprint = "tiny"
    shard_sizes = (2,)

    def __init__(self, field: str, shape: list[int], num_classes: int, tokens: list[int] | None):
        self.field, self.image_shape, self.num_classes = field, tuple(shape), max(num_classes, 0)
        self.tokens = tokens

    def __len__(self):
        return 2

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        sample = {"key": str(index), self.field: torch.rand(self.image_shape, generator=generator) * 2 - 1}
        if self.num_classes:
            sample["labels"] = index
        if self.tokens:
            sample["tokens"] = torch.randn(2, *self.tokens, generator=generator)
        return sample


def shrink(cfg, autoencoder):
    """The run with a small model, image and number of steps; everything else stays as the file says."""
    OmegaConf.set_struct(cfg, False)
    model, data = cfg.model, cfg.data
    side = 4 * (model.get("patch_size") or 1)
    small = {
        "embed_dim": 16, "depth": 2, "num_heads": 2, "img_dim": side, "d_context": 8, "n_context_token": 5,
        "use_checkpoint": False,
    }  # fmt: skip
    cfg.model = {**model, **{key: value for key, value in small.items() if model.get(key)}}
    frames = [4] if data.video_frames else []
    if frames:
        cfg.model.video_frames = data.video_frames = 4
    encoded = cfg.use_latent and not cfg.is_latent
    shape = (
        [*frames, 3, FACTOR * side, FACTOR * side] if encoded else [*frames, model.in_channels, side, side]
    )
    tokens = [5, 8] if model.get("has_text") else None
    if tokens:
        data.d_context = 8
    data.source = {
        "_target_": "tests.test_experiments.TinySource", "field": "latents" if cfg.is_latent else "pixels",
        "shape": shape, "num_classes": data.num_classes, "tokens": tokens,
    }  # fmt: skip
    data.heldout, data.prepare, data.image_size = None, "", 8 * side if cfg.is_latent else shape[-1]
    if encoded:
        cfg.codec.path = str(autoencoder())
    data.train_steps, data.batch_size, data.num_workers, data.sample_fid_every = 2, 2, 0, 0
    cfg.grad_accum, cfg.log_every, cfg.optim.warmup_steps = 1, 1, min(cfg.optim.warmup_steps, 1)
    cfg.loop.progress, cfg.loop.device = False, "cpu"
    return cfg


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return functools.cache(lambda: save_autoencoder(tmp_path_factory.mktemp("autoencoder"), FACTOR))


def test_the_quick_ones_are_there():
    assert set(QUICK) <= set(EXPERIMENTS) and len(EXPERIMENTS) >= 40


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_header_states_result_and_source(experiment):
    head = FILES[experiment].partition("defaults:")[0]
    assert re.search(r"# Published: .*(\d\.\d|a checkpoint|no number)", head)
    assert re.search(r"Source: .*(arXiv:\d{4}\.\d{5}|README)", head)


SOME = [e if e in QUICK else pytest.param(e, marks=pytest.mark.slow) for e in EXPERIMENTS]


@pytest.mark.parametrize("experiment", SOME)
def test_data_model_and_process_fit(experiment, tmp_path):
    (tmp_path / "train-000000.tar").touch()
    given = plain(experiment)
    given["data"]["source"]["root"] = str(tmp_path)
    if given["use_latent"] and not given["is_latent"]:
        (tmp_path / "config.json").write_text('{"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}')
        given["codec"]["path"] = str(tmp_path)
    check_training(plugins.checked(given))


@pytest.mark.parametrize("experiment", SOME)
def test_a_published_file_is_sampled_as_it_was_trained(experiment):
    given = plain(experiment)
    sampled = complete_from_defaults(plain(experiment, name="sample"), "published.pt")
    same = ("process", "sample_mode", "sde", "diffusion", "cfg_scale", "num_fid_samples")
    assert {k: sampled[k] for k in same} == {k: given[k] for k in same}
    assert sampled["codec"]["_target_"] == given["codec"]["_target_"]
    assert sampled["model"] == {k: v for k, v in given["model"].items() if v is not None}


@pytest.mark.parametrize("experiment", SOME)
def test_it_trains_at_a_tiny_size(experiment, autoencoder, tmp_path):
    cfg = shrink(compose(experiment, f"run_dir={tmp_path / 'run'}"), autoencoder)
    rate = cfg.optim.lr
    train_from_config(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2] and np.isfinite(
        [line["loss"] for line in losses]
    ).all()
    assert losses[0]["lr"] == rate


# Rows of the U-ViT configurations: images, patch, channels, width, depth, heads, classes, rate, betas, thousands of
# steps, batch, warm-up, network calls, published guidance.
UVIT = {
    "cifar10_small": (32, 2, 3, 512, 12, 8, -1, 2e-4, (0.99, 0.999), 500, 128, 2500, 1000, None),
    "celeba64_small": (64, 4, 3, 512, 12, 8, -1, 2e-4, (0.99, 0.99), 500, 128, 5000, 1000, None),
    "imagenet64_mid": (64, 4, 3, 768, 16, 12, 1000, 3e-4, (0.99, 0.99), 300, 1024, 5000, 50, None),
    "imagenet64_large": (64, 4, 3, 1024, 20, 16, 1000, 3e-4, (0.99, 0.99), 300, 1024, 5000, 50, None),
    "imagenet256_large": (32, 2, 4, 1024, 20, 16, 1000, 2e-4, (0.99, 0.99), 300, 1024, 5000, 50, 0.4),
    "imagenet256_huge": (32, 2, 4, 1152, 28, 16, 1000, 2e-4, (0.99, 0.99), 500, 1024, 5000, 50, 0.4),
    "imagenet512_large": (64, 4, 4, 1024, 20, 16, 1000, 2e-4, (0.99, 0.99), 500, 1024, 5000, 50, 0.7),
    "imagenet512_huge": (64, 4, 4, 1152, 28, 16, 1000, 2e-4, (0.99, 0.99), 500, 1024, 5000, 50, 0.7),
    "coco_small": (32, 2, 4, 512, 12, 8, -1, 2e-4, (0.9, 0.9), 1000, 256, 5000, 50, 1.0),
    "coco_small_deep": (32, 2, 4, 512, 16, 8, -1, 2e-4, (0.9, 0.9), 1000, 256, 5000, 50, 1.0),
}  # fmt: skip


def test_every_row_of_u_vits_table_is_there():
    assert {f"uvit_{row}" for row in UVIT} == {e for e in EXPERIMENTS if e.startswith("uvit_")}


@pytest.mark.parametrize("row", UVIT)
def test_u_vits_hyper_parameters(row):
    side, patch, channels, width, depth, heads, classes, lr, betas, steps, batch, warmup, calls, s = UVIT[row]
    settings = Settings.from_mapping(plain(f"uvit_{row}"))
    model, optim, data = settings.model, settings.optim, settings.data
    shape = ("img_dim", "patch_size", "in_channels", "embed_dim", "depth", "num_heads")
    assert tuple(model[key] for key in shape) == (side, patch, channels, width, depth, heads)
    assert model.get("num_classes", -1) == classes
    assert (optim.lr, optim.wd, optim.betas, optim.warmup_steps) == (lr, 0.03, betas, warmup)
    assert (optim.schedule, settings.max_grad_norm, settings.ema_rate) == ("constant", None, 0.9999)
    assert data.train_steps == steps * 1000
    assert _global_batch(f"uvit_{row}", settings) == batch
    solver = settings.sde if settings.sample_mode == "SDE" else settings.diffusion
    assert int(solver.num_steps) == calls
    assert settings.cfg_scale == pytest.approx(1 + (s or 0.0))
    assert (model.get("class_dropout_prob", 0) > 0) == (s is not None)
    assert settings.codec.get("scale", 1.0) == {3: 1.0, 4: 0.2301 if "coco" in row else 0.18215}[channels]


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if re.match(r"[ds]it_imagenet", e)])
def test_dits_hyper_parameters(experiment):
    settings = Settings.from_mapping(plain(experiment))
    assert (settings.optim.lr, settings.optim.wd, settings.optim.betas) == (1e-4, 0, (0.9, 0.999))
    assert (settings.optim.schedule, settings.optim.warmup_steps) == ("constant", 0)
    assert (settings.max_grad_norm, settings.ema_rate, settings.codec["scale"]) == (None, 0.9999, 0.18215)
    assert _global_batch(experiment, settings) == 256
    assert settings.data.random_flip and settings.model["class_dropout_prob"] == 0.1
    guided = "400k" not in experiment
    assert settings.cfg_scale == (1.5 if guided else 1.0)
    assert settings.model.get("guided_channels") == (3 if guided else None)
    assert settings.data.train_steps == (
        400_000 if not guided else 3_000_000 if "512" in experiment else 7_000_000
    )
    if experiment.startswith("dit"):
        assert (settings.diffusion.sampling_method, settings.diffusion.num_steps) == ("ddpm", "250")


def _global_batch(experiment, settings):
    """Processes come from the launcher; the header says how many were published."""
    total, processes = re.search(r"Global batch (\d+): (\d+) process", FILES[experiment]).groups()
    assert int(processes) * settings.data.batch_size * settings.grad_accum == int(total)
    return int(total)
