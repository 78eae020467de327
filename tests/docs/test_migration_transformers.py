"""docs/migration_dit.md and docs/migration_uvit.md: every published command stands there, every one of ours runs.

All of ours are composed and checked as the commands do before they touch a device; one of each kind is run, small.
"""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.zigma_shards import save_autoencoder
from zigflow import plugins
from zigflow.engine.sample_plan import SampleOptions
from zigflow.latents import LatentScale
from zigflow.official import family_of, process_of
from zigflow.preflight import check_decoding, check_training
from zigflow.sample_job import sample_from_config
from zigflow.settings import Settings
from zigflow.stored_config import complete_from_defaults
from zigflow.tools import __main__ as tools

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {name: (DOCS / f"migration_{name}.md").read_text() for name in ("dit", "uvit")}


def commands(language):
    return [
        line
        for page in PAGES.values()
        for found, body in re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.M | re.S)
        for line in body.splitlines()
        if found == language
    ]


OURS, THEIRS = commands(""), commands("text")
# Script and configuration of each command in the two READMEs; the first page of DiT's is that of the original code.
PUBLISHED = {
    "dit": [
        "sample.py --image-size 512 --seed 1", "sample.py --model DiT-L/4", "sample_ddp.py --model DiT-XL/2",
        "train.py --model DiT-XL/2", "sample.py ODE", "sample_ddp.py SDE", "train.py --model SiT-XL/2",
        "train_pl.py --coco_dataset_path", "sample_gradio.py --ckpt",
    ],
    "uvit": [
        f"{script}.py --config=configs/{config}.py{rest}"
        for kind in ("train", "eval")
        for suffix, config, depth in (
            ("", "cifar10_uvit_small", ""), ("", "celeba64_uvit_small", ""), ("", "imagenet64_uvit_mid", ""),
            ("", "imagenet64_uvit_large", ""), ("_ldm", "imagenet256_uvit_large", ""),
            ("_ldm", "imagenet512_uvit_large", ""), ("_t2i_discrete", "mscoco_uvit_small", ""),
            ("_t2i_discrete", "mscoco_uvit_small", " --config.nnet.depth=16"),
        )
        for script, rest in [(kind + suffix, depth + (" --nnet_path=" if kind == "eval" else ""))]
    ],
}  # fmt: skip


def overrides_of(command):
    words = shlex.split(command)
    return words[next(i for i, word in enumerate(words) if word.endswith("_acc.py")) + 1 :]


def compose(overrides, name):
    return OmegaConf.to_container(plugins.compose_config(["run_dir=unused", *overrides], name), resolve=True)


@pytest.mark.parametrize("page", PUBLISHED)
def test_every_published_command_stands_beside_ours(page):
    for script in PUBLISHED[page]:
        assert any(script in line for line in THEIRS), script
    assert len(THEIRS) == sum(map(len, PUBLISHED.values()))


def test_every_command_of_ours_is_checked_below():
    kinds = ("train_acc.py", "sample_acc.py", "python -m zigflow.tools ")
    assert all(any(kind in line for kind in kinds) for line in OURS)
    assert len(OURS) > 40


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the commands name, as far as its description goes."""
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet256", "imagenet64", "celeba64", "cifar10"):
        Path("data", name).mkdir(parents=True)
        Path("data", name, "train-000000.tar").touch()
    for name in ("sd-vae-ft-ema", "sd-vae-ft-mse"):
        Path(name).mkdir()
        Path(name, "config.json").write_text('{"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}')
    for name in ("autoencoder_kl.pth", "autoencoder_kl_ema.pth"):
        Path(name).touch()


@pytest.mark.parametrize("command", [c for c in OURS if "train_acc.py" in c])
def test_training_commands_pass_every_check_before_the_device(command, files):
    settings = Settings.from_mapping(compose(overrides_of(command), "default"))
    check_training(settings)
    assert (settings.max_grad_norm, settings.ema_rate) == (None, 0.9999), "as published"


@pytest.mark.parametrize("command", [c for c in OURS if "sample_acc.py" in c])
def test_sampling_commands_pass_every_check_before_the_device(command, files):
    given = compose(overrides_of(command), "sample")
    given.pop("weights")
    SampleOptions.take_from(given)
    if not given["ckpt"].endswith((".pt", ".pth")):
        assert given["ckpt"].startswith("outputs/")
        return
    family = family_of(given["model"])
    named = given["process"].get("_target_")
    settings = Settings.from_mapping(
        complete_from_defaults(given, given["ckpt"], process="flow" if named else process_of(family))
    )
    check_decoding(settings)
    process = {"dit": ("Gaussian",), "sit": ("Flow",), "uvit": ("VariancePreserving", "StableDiffusion")}[
        family
    ]
    assert settings.process["_target_"].rpartition(".")[2] in process
    # Null is what the autoencoder says of itself, without one 0.18215.
    stated = settings.codec.get("scale", 0.18215)
    assert stated == 0.18215 or (stated is None and LatentScale.of(None).scale == 0.18215)


@pytest.mark.parametrize("command", [c for c in OURS if "zigflow.tools" in c])
def test_tools_exist_and_their_overrides_compose(command):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "zigflow.tools"] and words[3] in tools.COMMANDS
    overrides = [w for w in words[4:] if "=" in w and not w.startswith(("samples=", "--"))]
    compose(overrides, "default")


SMALL = ["model.embed_dim=16", "model.depth=2", "model.num_heads=2", "model.patch_size=8"]
SIZE = {"img_dim": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
QUICK = [
    "loop.progress=false", "loop.device=cpu", "diffusion.num_steps=3", "sde.num_steps=3", "offline_sample_local_bs=2",
    "run_dir=log",
]  # fmt: skip
TOY = "+metrics.features._target_=tests.metrics.test_fid.ToyFeatures"


def ours(*words):
    (found,) = [line for line in OURS if all(word in line for word in words)]
    return found


def sample(command, *more, count=2):
    given = [o for o in overrides_of(command) if not o.startswith("num_fid_samples=")]
    cfg = plugins.compose_config([*given, f"num_fid_samples={count}", *QUICK, *more], "sample")
    return sample_from_config(cfg)


def statistics(name):
    np.savez(name, mu=np.zeros(6), sigma=np.eye(6))


def test_a_published_dit_is_sampled_by_class_into_an_npz_and_judged(tmp_path, monkeypatch):
    """`sample.py`, `sample_ddp.py` and the ADM evaluation in one; the weights are small, everything else as typed."""
    from zigflow.models.dit import DiT

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DiT(in_channels=4, **SIZE)
    for name in ("DiT-XL-2-256x256.pt", "model.pt"):
        torch.save(model.state_dict(), name)
    # An autoencoder of half the factor: the images are small.
    for name in ("sd-vae-ft-ema", "sd-vae-ft-mse"):
        save_autoencoder(Path(name), 2)
    statistics("VIRTUAL_imagenet256_labeled.npz")
    eight = sample(ours("ckpt=model.pt"), *SMALL, count=8)
    made = json.loads((eight / "results.json").read_text())["protocol"]
    assert made["labels"] == [207, 360, 387, 974, 88, 979, 417, 279]
    assert (made["process"]["_target_"], made["guidance"]["scale"]) == (
        "zigflow.processes.gaussian.Gaussian",
        4,
    )
    folder = sample(ours("npz=true", "experiment=dit_imagenet256_xl_2"), *SMALL, "metrics=none")
    (archive,) = folder.glob("samples_2x64x64x3.npz")
    archive.rename("samples_50000x256x256x3.npz")
    words = shlex.split(ours("evaluate samples="))[3:]
    assert tools.main([*words, TOY, "data=none"]) == 0
    judged = json.loads(Path("samples_50000x256x256x3.results.json").read_text())
    assert judged["protocol"]["n"] == 2 and judged["metrics"]["fid"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment",
    ["uvit_cifar10_small", "uvit_imagenet64_mid", "uvit_imagenet256_large", "uvit_imagenet256_huge"],
)
def test_a_published_uvit_is_evaluated(experiment, tmp_path, monkeypatch):
    from tests.engine.test_compvis import random_weights
    from zigflow.models.uvit import UViT

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    command = ours("sample_acc.py", f"experiment={experiment}")
    given = compose(overrides_of(command), "sample")
    node = {k: v for k, v in given["model"].items() if k not in ("name", "_target_")}
    model = UViT(**{**node, **SIZE, "img_dim": node["img_dim"]})
    torch.save(model.state_dict(), given["ckpt"])
    for name in ("autoencoder_kl.pth", "autoencoder_kl_ema.pth"):
        torch.save(random_weights((32, 32, 32, 32), 1), name)
    statistics(given["metrics"]["reference_stats"])
    results = json.loads((sample(command, *SMALL, TOY) / "results.json").read_text())
    assert results["metrics"]["fid"] > 0
    assert results["protocol"]["sample_mode"] == ("SDE" if "cifar" in experiment else "diffusion")


@pytest.mark.slow
def test_published_files_are_converted_and_sampled(tmp_path, monkeypatch):
    from tests.engine.test_compvis import random_weights
    from zigflow.models.dit import DiT
    from zigflow.models.uvit import UViT

    monkeypatch.chdir(tmp_path)
    text = {"has_text": True, "d_context": 768, "n_context_token": 77}
    torch.save(UViT(in_channels=4, **SIZE, **text).state_dict(), "mscoco_uvit_small.pth")
    torch.save(DiT(in_channels=4, **SIZE).state_dict(), "DiT-XL-2-256x256.pt")
    torch.save(random_weights((32, 32, 32, 32), 1), "autoencoder_kl.pth")
    save_autoencoder(Path("sd-vae-ft-ema"), 2)
    Path("coco256_features/run_vis").mkdir(parents=True)
    np.save("coco256_features/empty_context.npy", np.zeros((77, 768), np.float32))
    prompt = np.empty(2, dtype=object)
    prompt[:] = ["a cat", np.ones((77, 768), np.float32)]
    np.save("coco256_features/run_vis/0.npy", prompt, allow_pickle=True)
    for words in (("convert-checkpoint", "uvit_coco_small "), ("convert-checkpoint", "dit_xl_2")):
        assert tools.main([*shlex.split(ours(*words))[3:], *SMALL]) == 0
    pictures = sample(ours("ckpt=outputs/uvit_coco ", "run_vis"), *SMALL)
    made = json.loads((pictures / "results.json").read_text())["protocol"]
    assert (made["guidance"]["scale"], made["codec_scale"]) == (2, 0.2301)
    made = json.loads((sample(ours("ckpt=outputs/dit ")) / "results.json").read_text())["protocol"]
    assert made["process"]["_target_"] == "zigflow.processes.gaussian.Gaussian"
