"""The commands of the DiS README beside ours of docs/migration_dis.md: ours mean the same and run."""

import argparse
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from scans import list_scans
from tests.models.transformers import filled
from tests.zigma_shards import save_autoencoder
from zigflow import plugins
from zigflow.engine.sample_plan import SampleOptions
from zigflow.models import dis
from zigflow.preflight import check_decoding, check_training
from zigflow.sample_job import sample_from_config
from zigflow.settings import Settings
from zigflow.stored_config import complete_from_defaults
from zigflow.tools.__main__ import main as tools
from zigflow.train_job import train_from_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "migration_dis.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.M | re.S)
OURS = [line for language, body in BLOCKS if not language for line in body.splitlines()]
THEIRS = [line for language, body in BLOCKS if language == "text" for line in body.splitlines()]

# As they stand in the README of DiS, without the line breaks, each with its counterpart among ours.
README = {
    "torchrun --nnodes=1 --nproc_per_node=N train.py --model DiS-H/2 --dataset-type imagenet --data-path "
    "/path/to/imagenet/train --image-size 512 --latent_space True --task-type class-cond --vae_path /path/to/vae "
    "--num-classes 1000": "experiment=dis_imagenet512_h_2 data.tar_base=data/imagenet512 codec.path=sd-vae-ft-ema "
    "grad_accum=8",
    "torchrun --nnodes=1 --nproc_per_node=N train.py --model DiS-S/2 --dataset-type celeba --data-path "
    "/path/to/imagenet/train --image-size 32 --latent_space False --task-type uncond":
    "experiment=dis_celeba32_s_2 data.source.root=data/celeba32 data.batch_size=128",
    "python sample.py --model DiS-L/2 --dataset-type imagenet --ckpt /path/to/model --image-size 256 --num-classes "
    "1000 --cfg-scale 1.5": "experiment=dis_imagenet256_l_2 ckpt=0005000.pt codec.path=sd-vae-ft-ema "
    "num_fid_samples=8 global_seed=42",
}  # fmt: skip
EXPERIMENTS = sorted(path.stem for path in (ROOT / "config" / "experiment").glob("dis_*.yaml"))


def flags_of(command):
    """What a published command says, ``--latent_space False`` read as it is meant."""
    words = shlex.split(command)
    words = words[next(i for i, word in enumerate(words) if word in ("train.py", "sample.py")) + 1 :]
    parser = argparse.ArgumentParser()
    for name in ("model", "dataset-type", "data-path", "task-type", "vae_path", "ckpt"):
        parser.add_argument(f"--{name}")
    for name, default in (("image-size", 256), ("num-classes", -1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--latent_space", type=lambda text: text == "True", default=True)
    parser.add_argument("--cfg-scale", type=float)
    return parser.parse_args(words)


def overrides_of(command):
    words = shlex.split(command)
    return words[next(i for i, word in enumerate(words) if word.endswith("_acc.py")) + 1 :]


def compose(overrides, name="default"):
    return OmegaConf.to_container(plugins.compose_config(["run_dir=unused", *overrides], name), resolve=True)


def sampling_settings(overrides):
    given = compose(overrides, "sample")
    given.pop("weights")
    SampleOptions.take_from(given)
    return Settings.from_mapping(complete_from_defaults(given, given["ckpt"]))


def test_every_command_of_the_readme_stands_beside_ours():
    assert list(README) == THEIRS
    plain = [" ".join(overrides_of(line)) for line in OURS if line.startswith("python") and "_acc.py" in line]
    assert all(ours in plain for ours in README.values())
    assert len(OURS) >= 14


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What the commands name: shards, and an autoencoder as far as its description goes."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/imagenet512", "data/imagenet256", "data/celeba32", "sd-vae-ft-ema"):
        Path(name).mkdir(parents=True)
        Path(name, "train-000000.tar").touch()
    Path("sd-vae-ft-ema/config.json").write_text('{"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}')


@pytest.mark.parametrize("command", THEIRS)
def test_ours_means_what_theirs_says(command, folders):
    flags, ours = flags_of(command), README[command].split()
    sampled = flags.ckpt is not None
    settings = sampling_settings(ours) if sampled else Settings.from_mapping(compose(ours))
    model, factor = settings.model, 8 if flags.latent_space else 1
    with torch.device("meta"):
        built = dis.DiS(**{k: v for k, v in model.items() if k not in ("name", "_target_")})
    size, _, patch = flags.model.removeprefix("DiS-").partition("/")
    assert (built.embed_dim, built.depth) == dis.SIZES[size.lower()]
    assert (built.patch_size, built.num_classes) == (int(patch), flags.num_classes)
    assert built.img_dim == (flags.image_size // factor,) * 2
    assert (built.in_channels, built.out_channels) == ((4, 8) if flags.latent_space else (3, 6))
    assert built.class_dropout_prob == (0.1 if flags.num_classes > 0 else 0)
    assert model["official_backward_dt_init"] is True
    assert settings.process["_target_"].endswith(".Gaussian")
    assert settings.sample_mode == "diffusion" and settings.diffusion.sampling_method == "ddpm"
    if sampled:
        assert (settings.cfg_scale, settings.diffusion.num_steps) == (flags.cfg_scale, "250")
        assert (settings.global_seed, settings.num_fid_samples) == (42, 8)
        assert settings.codec["scale"] == 0.18215
    else:
        check_training(settings)
        assert settings.data.batch_size * settings.grad_accum == 128
        assert settings.use_latent == flags.latent_space
        assert settings.data.image_size == flags.image_size


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_hyper_parameters_are_those_of_the_training_script(experiment):
    settings = Settings.from_mapping(compose([f"experiment={experiment}"]))
    epoch = {"imagenet": 1_281_167, "celeba32": 162_770}[re.search("imagenet|celeba32", experiment)[0]] // 128
    optim = settings.optim
    assert (optim.name, optim.lr, optim.wd, optim.betas) == ("adamw", 1e-4, 0, (0.9, 0.999))
    assert (optim.schedule, optim.min_lr, optim.warmup_steps) == ("cosine", 1e-6, 5 * epoch)
    assert (settings.data.train_steps, 8 * settings.data.batch_size) == (1000 * epoch, 128)
    assert (settings.max_grad_norm, settings.ema_rate, settings.ckpt_every) == (1.0, 0.9999, 5000)
    assert settings.global_seed == 420 and settings.data.random_flip
    assert (settings.diffusion.sampling_method, settings.diffusion.num_steps) == ("ddpm", "250")
    assert settings.cfg_scale == (1.5 if settings.use_latent else 1)
    assert settings.model.get("guided_channels") == (3 if settings.use_latent else None)


@pytest.mark.parametrize("command", [c for c in OURS if "train_acc.py" in c])
def test_training_commands_pass_every_check_before_the_device(command, folders):
    check_training(Settings.from_mapping(compose(overrides_of(command))))


@pytest.mark.parametrize("command", [c for c in OURS if "sample_acc.py" in c])
def test_sampling_commands_compose(command, folders):
    overrides = overrides_of(command)
    if "ckpt=0005000.pt" in overrides:
        check_decoding(sampling_settings(overrides))
    else:
        assert compose(overrides, "sample")["model"]["name"] == "from_checkpoint"


def test_names_and_keys_in_the_text_exist():
    known = compose(["model=dis_s_2", "data=imagenet256", "codec=sd_vae"])
    keys = 0
    for word in " ".join(re.findall(r"`([^`]+)`", PAGE)).split():
        key, _, value = word.strip("`,").removeprefix("+").partition("=")
        if (
            key in ("data", "model", "scan", "codec", "experiment", "process")
            and value
            and "..." not in value
        ):
            assert value in plugins.group_choices(key) or (key == "scan" and value in list_scans()), word
        elif re.fullmatch(r"(data|optim|diffusion|model|loop|codec)\.[a-z_.]+", key):
            keys += 1
            if key != "model.guided_channels":
                assert OmegaConf.select(OmegaConf.create(known), key, default="none") != "none", word
    assert keys > 20
    names = re.search(r"`model=` names: (.*?), each", PAGE, flags=re.S)
    sizes = {f"dis_{size}_{patch}" for size in dis.SIZES for patch in (2, 4)}
    assert set(re.findall(r"\w+", names[1])) == sizes <= set(plugins.group_choices("model"))
    assert all(name in PAGE for name in EXPERIMENTS)


SHRUNK = [
    "model.depth=2", "model.embed_dim=16", "data.train_steps=2", "data.batch_size=2", "data.num_workers=0",
    "optim.warmup_steps=1", "grad_accum=1", "log_every=1", "loop.progress=false", "loop.device=cpu",
]  # fmt: skip
FEW = [
    "diffusion.num_steps=3",
    "num_fid_samples=2",
    "loop.progress=false",
    "loop.device=cpu",
    "run_dir=unused",
]


def shrunk(command):
    """The published sizes of images replaced by ones that a test can afford; what the command does stays the same."""
    return [
        word.replace("=512", "=32").replace("=256", "=32").replace("num_steps=20", "num_steps=3")
        for word in overrides_of(command)
    ]


def run_tool(command):
    assert tools(shlex.split(command.replace("--resize 512", "--resize 32"))[3:]) == 0


def write_images(folder, classes):
    rng = np.random.default_rng(0)
    for index in range(4):
        target = folder / (f"n{index % classes}" if classes else "")
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(target / f"{index}.png")


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("[0-9]*.png"))]


def trained(command, *more):
    train_from_config(plugins.compose_config([*shrunk(command), *SHRUNK, *more, "run_dir=run"]))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.slow
def test_the_latent_commands_run(tmp_path, monkeypatch):
    """Shards, training on encoded pixels, the picture while training, sampling."""
    monkeypatch.chdir(tmp_path)
    write_images(Path("imagenet/train"), classes=2)
    save_autoencoder(tmp_path / "sd-vae-ft-ema")
    run_tool(next(c for c in OURS if "make-shards" in c and "imagenet" in c))
    command = next(c for c in OURS if "dis_imagenet512_h_2" in c)
    trained(command, "data.image_size=32", "model.img_dim=4", "data.sample_fid_every=2", "data.sample_fid_n=2",
            "data.sample_fid_bs=2", "diffusion.num_steps=2", "data.num_classes=2", "model.num_classes=2")  # fmt: skip
    assert Path("run/eval/step-0000002.png").is_file()
    again = next(c for c in OURS if "ckpt=outputs/dis" in c and "ddpm" in c).replace("outputs/dis", "run")
    found = pictures(sample_from_config(plugins.compose_config([*shrunk(again), *FEW], "sample")))
    assert [image.shape for image in found] == [(32, 32, 3)] * 2


@pytest.mark.slow
def test_the_pixel_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("celeba/train"), classes=0)
    run_tool(next(c for c in OURS if "make-shards" in c and "celeba" in c))
    trained(next(c for c in OURS if "dis_celeba32_s_2" in c), "data.sample_fid_every=0")
    command = next(c for c in OURS if "ckpt=outputs/celeba" in c).replace("outputs/celeba", "run")
    found = pictures(sample_from_config(plugins.compose_config([*shrunk(command), *FEW], "sample")))
    assert [image.shape for image in found] == [(32, 32, 3)] * 2


@pytest.mark.slow
def test_a_file_of_the_training_script_is_sampled_and_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dis.SIZES, "l", (16, 2))
    save_autoencoder(tmp_path / "sd-vae-ft-ema")
    torch.manual_seed(0)
    model = filled(dis.DiS(in_channels=4, img_dim=4, patch_size=2, embed_dim=16, depth=2, num_classes=1000,
                           class_dropout_prob=0.1))  # fmt: skip
    args = argparse.Namespace(model="DiS-L/2", image_size=32, num_classes=1000, latent_space=True)
    torch.save({"model": {}, "ema": model.state_dict(), "opt": {}, "args": args}, "0005000.pt")
    direct, own = (
        next(c for c in OURS if part in c)
        for part in ("sample_acc.py experiment=dis_imagenet256_l_2", "ckpt=outputs/dis codec.path")
    )
    size = ["model.embed_dim=16", "model.depth=2", "model.img_dim=4"]
    first = pictures(sample_from_config(plugins.compose_config([*shrunk(direct), *size, *FEW], "sample")))
    run_tool(next(c for c in OURS if "convert-checkpoint" in c))
    second = pictures(
        sample_from_config(plugins.compose_config([*shrunk(own), *FEW, "global_seed=42"], "sample"))
    )
    assert np.array_equal(first, second)
    fast = next(c for c in OURS if "dpm_solver++" in c)
    third = pictures(sample_from_config(plugins.compose_config([*shrunk(fast), *FEW], "sample")))
    assert [image.shape for image in third] == [(32, 32, 3)] * 2
