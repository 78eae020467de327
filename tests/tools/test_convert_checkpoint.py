"""Official files of DiT, SiT, U-ViT and DiS become checkpoints of ours, which sample like the files themselves."""

import argparse
import json

import numpy as np
import pytest
import torch

from tests.models.transformers import filled
from zigflow import plugins
from zigflow.engine import checkpoint as checkpoints
from zigflow.models import dis
from zigflow.models.dis import DiS
from zigflow.models.dit import DiT
from zigflow.models.uvit import UViT
from zigflow.sample_job import sample_from_config
from zigflow.settings import SettingsError
from zigflow.tools.__main__ import main

SIZE = {"in_channels": 3, "img_dim": 4, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
SIZED = [f"model.{key}={value}" for key, value in SIZE.items()]
LABELS = ["model.num_classes=3"]
TEXT = ["model.d_context=6", "model.n_context_token=5"]


def convert(file, output, *arguments, code=0):
    assert main(["convert-checkpoint", str(file), *arguments, "--output", str(output)]) == code
    if code:
        return None
    return checkpoints.open_checkpoint(output)


def sampled(*overrides):
    folder = sample_from_config(
        plugins.compose_config(
            ["ode.sampling_method=euler", "ode.num_steps=3", "num_fid_samples=3", "offline_sample_local_bs=3",
             "loop.progress=false", "loop.device=cpu", "run_dir=unused", "cfg_scale=2", *overrides], "sample",
        )
    )  # fmt: skip
    return [path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))]


def save(file, model, **more):
    torch.save({"ema": model.state_dict(), **more} if more else model.state_dict(), file)
    return file


DIS = ["model=dis_s_2", "process=gaussian", *LABELS]
CASES = {
    "dis": (DiS, {"num_classes": 3, "class_dropout_prob": 0.1}, DIS, 3),
    "dit": (
        DiT,
        {"num_classes": 3, "learn_sigma": False},
        ["model=dit_s_2", "model.learn_sigma=false", *LABELS],
        3,
    ),
    "sit": (DiT, {"num_classes": 3}, ["model=sit_s_2", *LABELS], 3),
    "uvit": (
        UViT,
        {"num_classes": 3, "class_dropout_prob": 0.1},
        ["model=uvit_small", "process=vp", *LABELS],
        None,
    ),
}
PROCESSES = {"dis": "Gaussian", "dit": "Gaussian", "sit": "Flow", "uvit": "VariancePreserving"}


@pytest.mark.parametrize("case", CASES)
def test_a_converted_file_samples_like_the_file(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family, options, overrides, guided = CASES[case]
    # Heads are of the transformers alone.
    size = {k: v for k, v in SIZE.items() if k != "num_heads" or family is not DiS}
    sized = [f"model.{key}={value}" for key, value in size.items()]
    file = save(tmp_path / "released.pt", filled(family(**size, **options)))
    stored = convert(file, tmp_path / "run", *overrides, *sized)
    assert stored.config["model"].get("guided_channels") == guided
    assert stored.config["process"]["_target_"].rpartition(".")[2] == PROCESSES[case]
    assert json.loads((stored.path / "trainer.json").read_text())["converted_from"]["family"] == case
    direct = sampled(f"ckpt={file}", "data=none", "data.channels=3", "data.image_size=4", *overrides, *sized)
    assert len(set(direct)) == 3
    assert sampled(f"ckpt={tmp_path / 'run'}") == direct


def test_a_file_of_dits_training_says_what_it_is(tmp_path, capsys):
    args = argparse.Namespace(model="DiT-S/8", image_size=16, num_classes=3)
    kwargs = {"img_dim": 2, "patch_size": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    small = DiT(**kwargs, num_classes=3)
    file = save(tmp_path / "0000010.pt", small, args=args, opt={})
    # The weights are those of another size than the arguments say.
    convert(file, tmp_path / "run", "--family", "dit", code=1)
    assert "not divisible into patches of 8 x 8" in capsys.readouterr().err
    convert(file, tmp_path / "run", code=1)
    assert "argparse.Namespace, which zigma files do not need" in capsys.readouterr().err
    convert(file, tmp_path / "run", "model=dit_s_2", "--family", "uvit", code=1)
    assert "--family uvit is not a family of model=dit_s_2" in capsys.readouterr().err


def test_the_process_that_a_file_was_trained_under_is_known_or_asked_for(tmp_path, capsys):
    file = save(tmp_path / "nnet_ema.pth", filled(UViT(**SIZE, num_classes=3)))
    chosen = ["model=uvit_small", *SIZED, *LABELS, "model.class_dropout_prob=0"]
    convert(file, tmp_path / "run", *chosen, code=1)
    assert "process=vp or process=sd_discrete" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="process is missing: .*process=vp or process=sd_discrete"):
        sampled(f"ckpt={file}", "data=none", *chosen)
    stored = convert(file, tmp_path / "other", "+experiment=uvit_imagenet64_mid", *chosen[1:-1])
    assert stored.config["process"]["_target_"].endswith(".VariancePreserving")
    stored = convert(file, tmp_path / "run", *chosen, "process=sd_discrete")
    assert stored.config["process"]["_target_"].endswith(".StableDiffusion")
    # One that is named is taken as it is, and a flow's path and prediction are the published ones.
    file = save(tmp_path / "released.pt", filled(DiT(**SIZE, num_classes=3, learn_sigma=False)))
    chosen = ["model=dit_s_2", "model.learn_sigma=false", *SIZED, *LABELS]
    assert sampled(f"ckpt={file}", "data=none", *chosen, "process=flow", f"sample_dir={tmp_path / 'flow'}")
    made = json.loads((tmp_path / "flow" / "results.json").read_text())["protocol"]
    assert (made["process"]["path_type"], made["process"]["prediction"]) == ("Linear", "velocity")


def test_a_file_of_diss_training_needs_no_model(tmp_path, monkeypatch):
    """Its arguments say the size, and whether it is one of latents."""
    monkeypatch.setitem(dis.SIZES, "s", (16, 2))
    args = argparse.Namespace(model="DiS-S/2", image_size=32, num_classes=3, latent_space=True)
    source = filled(DiS(in_channels=4, img_dim=4, patch_size=2, embed_dim=16, depth=2, num_classes=3,
                        class_dropout_prob=0.1))  # fmt: skip
    file = save(tmp_path / "0000010.pt", source, args=args, opt={})
    stored = convert(file, tmp_path / "run", "--family", "dis", "process=gaussian", "codec=sd_vae")
    assert stored.config["model"] == {
        "name": "0000010", "_target_": "zigflow.models.dis.DiS", "img_dim": 4, "patch_size": 2, "embed_dim": 16,
        "depth": 2, "in_channels": 4, "num_classes": 3, "class_dropout_prob": 0.1, "guided_channels": 3,
    }  # fmt: skip
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in stored.tensors("model").items())


def test_a_text_model_takes_its_null_text_along(tmp_path, capsys):
    options = {"has_text": True, "d_context": 6, "n_context_token": 5}
    file = save(tmp_path / "nnet_ema.pth", filled(UViT(**SIZE, **options)))
    chosen = ["model=uvit_small_coco", *SIZED, *TEXT]
    convert(file, tmp_path / "run", *chosen, code=1)
    assert "convert-checkpoint --null-text" in capsys.readouterr().err
    empty = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    np.save(tmp_path / "empty_context.npy", empty)
    stored = convert(file, tmp_path / "run", *chosen, "--null-text", str(tmp_path / "empty_context.npy"))
    weights = stored.tensors("model")
    assert np.array_equal(weights["null_text"].numpy(), empty)
    np.save(tmp_path / "empty_context.npy", np.array([{"a": 1}], dtype=object))
    convert(file, tmp_path / "other", *chosen, "--null-text", str(tmp_path / "empty_context.npy"), code=1)
    assert "pickle" in capsys.readouterr().err


def test_a_model_without_official_files_is_told(tmp_path):
    file = save(tmp_path / "released.pt", torch.nn.Linear(1, 1))
    with pytest.raises((SettingsError, ValueError), match=r"no official checkpoints of torch\.nn\.Linear"):
        sampled(f"ckpt={file}", "data=none", "model=dit_s_2", "model._target_=torch.nn.Linear")
