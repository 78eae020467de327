"""docs/formats.md: its commands run, on files of the true shapes and with models of hardly any weights."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.test_compvis import random_weights
from zigflow import plugins
from zigflow.sample_job import sample_from_config
from zigflow.tools import __main__ as tools
from zigflow.train_job import train_from_config

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text()
COMMANDS = [
    line for body in re.findall(r"^```\n(.*?)^```", PAGE, flags=re.M | re.S) for line in body.splitlines()
]
TINY = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2", "model.patch_size=8"]
QUICK = ["loop.progress=false", "loop.device=cpu"]


def of(*words):
    found = [command for command in COMMANDS if all(word in command for word in words)]
    assert found, words
    return found


def pair(first, second):
    out = np.empty(2, dtype=object)
    out[:] = [first, second]
    return out


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folders that the commands name, three images each."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def moments(side):
        return rng.standard_normal((8, side, side), dtype=np.float32)

    for folder, side in (("imagenet256_features", 32), ("imagenet512_features", 64)):
        Path(folder).mkdir()
        for index in range(3):
            np.save(f"{folder}/{index}.npy", pair(moments(side), np.int64(index * 499)), allow_pickle=True)
    for split in ("train", "val"):
        Path("coco256_features", split).mkdir(parents=True)
        for index in range(3):
            np.save(f"coco256_features/{split}/{index}.npy", moments(32))
            for caption in range(1 + index):
                text = rng.standard_normal((77, 768), dtype=np.float32)
                np.save(f"coco256_features/{split}/{index}_{caption}.npy", text)
    np.save("coco256_features/empty_context.npy", np.zeros((77, 768), np.float32))
    Path("coco256_features/run_vis").mkdir()
    np.save(
        "coco256_features/run_vis/0.npy", pair("a cat", np.ones((77, 768), np.float32)), allow_pickle=True
    )


def train(command, run_dir):
    words = shlex.split(command)
    assert words[:2] == ["python", "train_acc.py"]
    given = [*words[2:], *TINY, *QUICK, "data.train_steps=1", "data.batch_size=3", "data.num_workers=0"]
    train_from_config(plugins.compose_config([*given, f"run_dir={run_dir}"]))
    assert (Path(run_dir) / "checkpoints").is_dir()


def tool(command, *more):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "zigflow.tools"]
    assert tools.main([*words[3:], *more]) == 0


def test_every_command_is_of_a_kind_that_is_run():
    kinds = (
        "train_acc.py data=",
        "make-shards",
        "verify-shards",
        "convert-checkpoint",
        "sample_acc.py ckpt=",
    )
    assert all(any(kind in command for kind in kinds) for command in COMMANDS)
    assert len(COMMANDS) == 11


@pytest.mark.slow
def test_features_and_their_shards_train(files):
    for number, command in enumerate(of("train_acc.py", "_features")):
        train(command, f"outputs/features{number}")
    for command in (*of("make-shards"), *of("verify-shards")):
        tool(command)
    for number, command in enumerate(of("train_acc.py", "data=shards")):
        train(command, f"outputs/shards{number}")


@pytest.mark.slow
def test_official_files_sample_with_the_published_autoencoder_and_statistics(files):
    from zigflow.models.uvit import UViT

    size = {"img_dim": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    text = UViT(in_channels=4, **size, has_text=True, d_context=768, n_context_token=77)
    torch.save(text.state_dict(), "mscoco_uvit_small.pth")
    classes = UViT(in_channels=4, **size, num_classes=1000, class_dropout_prob=0.15)
    torch.save(classes.state_dict(), "imagenet256_uvit_large.pth")
    torch.save(random_weights((32, 32, 32, 32), 1), "autoencoder_kl.pth")
    np.savez("fid_stats_imagenet256_guided_diffusion.npz", mu=np.zeros(6), sigma=np.eye(6))

    (convert,) = of("convert-checkpoint")
    tool(convert, *TINY)
    coco, imagenet = of("sample_acc.py")
    few = [*QUICK, "diffusion.num_steps=3", "offline_sample_local_bs=2", "num_fid_samples=2"]

    def sample(command, *more):
        words = [word for word in shlex.split(command)[2:] if not word.startswith("num_fid_samples")]
        return sample_from_config(plugins.compose_config([*words, *few, *more, "run_dir=log"], "sample"))

    folder = sample(coco, "metrics=none")
    assert len(list(folder.glob("00*.png"))) == 2
    # The Inception network is not at hand: six sums over the pixels stand in for it.
    toy = ["+metrics.features._target_=tests.metrics.test_fid.ToyFeatures"]
    folder = sample(imagenet, *TINY, *toy)
    assert '"fid"' in (folder / "results.json").read_text()
