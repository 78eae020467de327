"""docs/migration_dim.md: our commands compose, the published files they name are sampled, the names it gives exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.models.transformers import filled
from tests.zigma_shards import save_autoencoder
from zigflow import plugins
from zigflow.engine.sample_plan import SampleOptions
from zigflow.models.dim import DiM
from zigflow.preflight import check_training
from zigflow.settings import Settings
from zigflow.stored_config import complete_from_defaults
from zigflow.tools import convert_checkpoint

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration_dim.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.M | re.S)
OURS = [line for language, body in BLOCKS if not language for line in body.splitlines()]
THEIRS = [line for language, body in BLOCKS if language == "text" for line in body.splitlines()]
CHOICE = re.compile(r"^\+?(data|model|scan|codec|experiment)=(\w+)$")
# What the README gives each configuration for.
COMMANDS = {
    "imagenet256_H_DiM": 3, "imagenet512_H_DiM_ft": 2, "imagenet512_H_DiM_upsample_test": 1,
    "imagenet512_H_DiM_upsample_3x_test": 1,
}  # fmt: skip
EXPERIMENTS = {
    "dim_cifar10_s": "cifar10_S_DiM", "dim_imagenet256_l": "imagenet256_L_DiM",
    "dim_imagenet256_h": "imagenet256_H_DiM", "dim_imagenet512_h": "imagenet512_H_DiM_ft",
}  # fmt: skip
UPSAMPLED = {2: "imagenet512_H_DiM_upsample_test", 3: "imagenet512_H_DiM_upsample_3x_test"}
MANIFESTS = Path(__file__).parents[1] / "parity" / "fixtures" / "dis_dim" / "manifests"
TINY = {"embed_dim": 16, "depth": 3, "img_dim": 4, "num_classes": 3}


def overrides_of(command):
    words = shlex.split(command)
    return words[next(i for i, word in enumerate(words) if word.endswith("_acc.py")) + 1 :]


def compose(overrides, name):
    cfg = plugins.compose_config(["run_dir=unused", *overrides], name)
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What the commands name: a folder of tars, and an autoencoder as far as its description goes."""
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDER", "sd-vae-ft-ema"):
        Path(name).mkdir()
    Path("FOLDER/train-000000.tar").touch()
    Path("sd-vae-ft-ema/config.json").write_text('{"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}')


def test_every_command_of_the_readme_is_there():
    found = [re.search(r"configs/(\w+)\.py", line)[1] for line in THEIRS]
    assert {name: found.count(name) for name in found} == COMMANDS
    assert len(OURS) >= 10


@pytest.mark.parametrize("experiment, published", EXPERIMENTS.items())
def test_experiments_have_the_published_hyper_parameters(experiment, published):
    stored = json.loads((MANIFESTS / f"DiM_{published}_config.json").read_text())
    found = Settings.from_mapping(compose([f"experiment={experiment}"], "default"))
    optimizer, train = stored["optimizer"], stored["train"]
    own = (found.optim.lr, found.optim.wd, list(found.optim.betas), found.optim.eps, found.optim.warmup_steps)
    assert own == (
        optimizer["lr"], optimizer["weight_decay"], optimizer["betas"], optimizer.get("eps", 1e-8),
        stored["lr_scheduler"]["warmup_steps"],
    )  # fmt: skip
    assert (found.optim.schedule, found.ema_rate) == ("constant", 0.9999)
    assert (found.data.train_steps, found.ckpt_every) == (train["n_steps"], train["save_interval"])
    # The README starts eight processes.
    assert 8 * found.data.batch_size * found.grad_accum == train["batch_size"]
    assert found.max_grad_norm == stored.get("max_grad_norm")
    assert found.model["class_dropout_prob"] == stored["dataset"].get("p_uncond", 0.0)
    assert found.model["img_dim"] == stored["nnet"]["sample_size"]
    assert found.num_fid_samples == stored["sample"]["n_samples"]
    assert found.cfg_scale == pytest.approx(1 + stored["sample"].get("scale", 0.0))
    solver = found.sde if found.sample_mode == "SDE" else found.diffusion
    assert int(solver.num_steps) == stored["sample"]["sample_steps"]


@pytest.mark.parametrize("command", [c for c in OURS if "train_acc.py" in c])
def test_training_commands_pass_every_check_before_the_device(command, folders):
    settings = Settings.from_mapping(compose(overrides_of(command), "default"))
    check_training(settings)
    assert settings.model["_target_"] == "zigflow.models.dim.DiM"


@pytest.mark.parametrize("command", [c for c in OURS if "sample_acc.py" in c])
def test_sampling_commands_compose(command, folders):
    given = compose(overrides_of(command), "sample")
    given.pop("weights")
    SampleOptions.take_from(given)
    larger = {"dim_imagenet1024_h": 2, "dim_imagenet1536_h": 3}
    factor = next((larger[name] for name in larger if name in command), None)
    method = "dpm_solver" if factor else "dpm_solver++"
    assert (given["sample_mode"], given["diffusion"]["sampling_method"]) == ("diffusion", method)
    if factor:
        stored = json.loads((MANIFESTS / f"DiM_{UPSAMPLED[factor]}_config.json").read_text())
        settings = Settings.from_mapping(complete_from_defaults(given, given["ckpt"]))
        assert settings.upsample.factor == stored["nnet"]["multi_times"] == factor
        assert (settings.upsample.eta, settings.upsample.theta) == (stored["ug_eta"], stored["ug_theta"])
        assert list(settings.upsample.skip_tuning_range) == list(stored["nnet"]["skip_tune_param"])
        assert settings.cfg_scale == 1 + stored["sample"]["scale"]
        assert settings.model["img_dim"] * factor == stored["nnet"]["sample_size"]
        assert int(settings.diffusion.num_steps) == stored["sample"]["sample_steps"]
        assert settings.num_fid_samples == stored["sample"]["n_samples"]
    elif given["ckpt"].endswith(".pth"):
        settings = Settings.from_mapping(complete_from_defaults(given, given["ckpt"]))
        assert settings.codec["scale"] == 0.18215
        assert settings.cfg_scale == (1.7 if "512" in command else 1.4)
        assert settings.num_fid_samples == 50_000


@pytest.mark.slow
def test_a_published_file_is_sampled_and_converted_as_shown(tmp_path, monkeypatch):
    from zigflow.sample_job import sample_from_config

    monkeypatch.chdir(tmp_path)
    save_autoencoder(tmp_path / "sd-vae-ft-ema")
    file = tmp_path / "425000.ckpt" / "nnet_ema.pth"
    file.parent.mkdir()
    torch.save(filled(DiM(**TINY)).state_dict(), file)
    small = [f"model.{key}={value}" for key, value in TINY.items()]
    shown = next(c for c in OURS if "sample_acc.py" in c and "dim_imagenet256_h" in c)
    given = [o for o in overrides_of(shown) if not o.startswith("ckpt=")]
    few = ["num_fid_samples=3", "diffusion.num_steps=4", "offline_sample_local_bs=3", "loop.progress=false"]

    def pictures(*overrides):
        arguments = [*overrides, *few, "metrics=none", "loop.device=cpu", "run_dir=unused"]
        folder = sample_from_config(plugins.compose_config(arguments, "sample"))
        return [path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))]

    direct = pictures(*given, *small, f"ckpt={file}")
    assert len(set(direct)) == 3
    converted = next(c for c in OURS if "convert-checkpoint" in c)
    assert convert_checkpoint.main([*shlex.split(converted)[4:], *small]) == 0
    own = overrides_of(next(c for c in OURS if "sample_acc.py ckpt=outputs/dim_h" in c))
    assert pictures(*own) == direct


def test_names_in_the_text_exist():
    for code in re.findall(r"`([^`]+)`", PAGE):
        match = CHOICE.match(code)
        if match:
            assert match[2] in plugins.group_choices(match[1]), code
    names = re.search(r"`model=` names: (.*?)\. ", PAGE, flags=re.S)
    models = set(re.findall(r"\w+", names[1]))
    assert models == {m for m in plugins.group_choices("model") if m.startswith("dim_")}
