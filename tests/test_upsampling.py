"""Commands that go to larger images: sampling with ``upsample.factor``, training that starts from a smaller model."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.assertions import assert_close
from tests.models.transformers import filled
from zigflow import plugins
from zigflow.engine.checkpoint import open_checkpoint
from zigflow.engine.evaluation import _reduce
from zigflow.engine.runtime import Runtime
from zigflow.engine.sampling_run import SamplingFolderError
from zigflow.evaluation_job import _in_loop_evaluation, build_judge
from zigflow.metrics.digit_judge import DigitJudge
from zigflow.models.dim import DiM
from zigflow.nn import interpolate_positions
from zigflow.preflight import check_training
from zigflow.sample_job import sample_from_config
from zigflow.settings import SettingsError
from zigflow.settings_sampling import UpsampleSettings
from zigflow.train_job import train_from_config
from zigflow.typed import parse

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "sampling.md").read_text()

TINY = [
    "data=synthetic", "data.image_size=4", "data.train_steps=1", "data.batch_size=4", "model.embed_dim=8",
    "model.patch_size=1", "ckpt_every=1", "log_every=1", "loop.progress=false",
]  # fmt: skip
ZIGMA = ["model.depth=2", "model.use_pe=2"]
DIM = ["model=dim_s", "model.in_channels=3", "model.img_dim=4", "model.depth=5", "model.num_classes=4",
       "model.unconditional=false", "model.class_dropout_prob=0.1"]  # fmt: skip
UVIT = ["model=uvit_small_cifar10", "model.img_dim=4", "model.depth=4", "model.num_heads=2",
        "model.num_classes=4", "+model.class_dropout_prob=0.1"]  # fmt: skip
DPM = ["sample_mode=diffusion", "diffusion.sampling_method=dpm_solver++", "diffusion.num_steps=4"]


def train(run_dir, *overrides):
    return train_from_config(plugins.compose_config([*TINY, *overrides, f"run_dir={run_dir}"]))


def sample(run_dir, target, *overrides):
    arguments = [
        f"ckpt={run_dir}", f"sample_dir={target}", "metrics=none", "loop.progress=false", "num_fid_samples=4",
        "offline_sample_local_bs=4", "ode.sampling_method=euler", "ode.num_steps=4", "sde.num_steps=4",
    ]  # fmt: skip
    sample_from_config(plugins.compose_config([*arguments, *overrides, f"run_dir={target}_log"], "sample"))
    return np.stack([np.asarray(Image.open(path)) for path in sorted(target.glob("[0-9]*.png"))])


def check(options, process="vp", *more):
    cfg = plugins.compose_config(["run_dir=unused", f"process={process}", *more])
    return plugins.checked({**plugins.plain(cfg), "upsample": options})


@pytest.mark.parametrize(
    ("options", "process", "message"),
    [
        ({"factor": 0}, "vp", "upsample.factor=0"),
        ({"factor": 2, "eta": 0.0}, "vp", r"upsample.eta=0.0 is not in \(0, 1\]"),
        ({"factor": 2, "theta": -1.0}, "vp", "upsample.theta"),
        ({"factor": 2, "matching": "published"}, "vp", "upsample.matching='published'.*as_published"),
        ({"factor": 2, "skip_tuning": "intended"}, "vp", "upsample.skip_tuning='intended'.*as_intended"),
        ({"skip_tuning": "as_intended"}, "vp", "set upsample.factor=2"),
        ({"factor": 2, "matching": "as_published"}, "vp", "upsample.matching=as_published.*matching=exact"),
        ({"factor": 2, "skip_tuning": "as_intended"}, "flow", "Flow feeds it otherwise"),
    ],
)
def test_impossible_combinations_are_named(options, process, message):
    with pytest.raises(SettingsError, match=message):
        check(options, process)


def test_only_samples_are_made_larger():
    with pytest.raises(SettingsError, match="set upsample.factor=1"):
        check({"factor": 2}, "vp", "likelihood=true")
    check({}, "vp", "likelihood=true")
    check({"factor": 2, "matching": "as_published"}, "sd_discrete")


def test_a_metric_of_one_size_judges_block_means(monkeypatch):
    monkeypatch.setattr("zigflow.evaluation_job.build_source", lambda settings, split="source", **_: None)
    data = SimpleNamespace(source={"root": "x"}, heldout={"root": "y"}, order="indexed", video_frames=0)
    for target, reduced in (("digit_judge.DigitJudge", 2), ("fid.Fid", 1)):
        chosen = SimpleNamespace(
            metrics={"_target_": f"zigflow.metrics.{target}"}, data=data, upsample=UpsampleSettings(factor=2)
        )
        monkeypatch.setattr("zigflow.evaluation_job.make", lambda key, node: METRICS[node["_target_"]])
        judge = build_judge(chosen, runtime=Runtime(), codec=None, preview=0)
        assert judge._reduced == reduced
    images = torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4)
    assert _reduce(images, 2).tolist()[0] == [[[2, 4], [10, 12]]]
    assert _reduce(images, 1) is images


def test_the_commands_of_the_page_compose():
    section = PAGE.partition("## Larger than trained")[2].partition("\n## ")[0]
    commands = [line for line in section.splitlines() if line.startswith("python ")]
    assert len(commands) == 3 and "(upsampled.png)" in section and (DOCS / "upsampled.png").is_file()
    for command in commands:
        _, script, *overrides = shlex.split(command)
        name = {"train_acc.py": "default", "sample_acc.py": "sample"}[script]
        given = OmegaConf.to_container(
            plugins.compose_config(["run_dir=unused", *overrides], name), resolve=True
        )
        if name == "default":
            settings = plugins.checked(given)
            check_training(settings)
            assert settings.process["_target_"].endswith(".VariancePreserving")
        else:
            chosen = parse(UpsampleSettings, given["upsample"], "upsample.")
            assert (chosen.factor, chosen.eta) == (2, 0.9)
    keys = {f"upsample.{field.name}" for field in fields(UpsampleSettings)}
    assert keys == set(re.findall(r"^\| `(upsample\.\w+)=", section, flags=re.M))


METRICS = {"zigflow.metrics.digit_judge.DigitJudge": DigitJudge(), "zigflow.metrics.fid.Fid": object()}


@pytest.mark.slow
@pytest.mark.parametrize("process", ["flow", "gaussian", "vp", "sd_discrete"])
def test_every_sampler_makes_larger_images(process, tmp_path):
    run_dir = train(tmp_path / "run", *ZIGMA, f"process={process}")
    modes = [[], ["sample_mode=SDE"]]
    if process != "flow":
        modes += [DPM, [*DPM[:1], "diffusion.sampling_method=ddpm", "diffusion.num_steps=4"]]
    for number, mode in enumerate(modes):
        target = tmp_path / f"samples{number}"
        images = sample(run_dir, target, "upsample.factor=2", "upsample.eta=0.6", "cfg_scale=1.5", *mode)
        assert images.shape == (4, 8, 8, 3) and images.std() > 0
    protocol = json.loads((target / "results.json").read_text())["protocol"]
    assert protocol["upsample"] == {
        "factor": 2, "eta": 0.6, "theta": 1.0, "matching": "exact", "skip_tuning": None,
        "skip_tuning_range": [0.82, 1.0],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", [DIM, UVIT], ids=["dim", "uvit"])
def test_skip_tuning_and_the_identity_of_a_folder(model, tmp_path):
    run_dir = train(tmp_path / "run", *model, "process=sd_discrete")
    options = [*DPM, "upsample.factor=3", "upsample.matching=as_published"]
    plain = sample(run_dir, tmp_path / "plain", *options)
    assert plain.shape == (4, 12, 12, 3)
    tuned = sample(run_dir, tmp_path / "tuned", *options, "upsample.skip_tuning=as_intended",
                   "upsample.skip_tuning_range=[0.2,0.3]")  # fmt: skip
    assert (tuned != plain).any()
    # A sample is the same whoever asks for it and however many others there are.
    one = sample(run_dir, tmp_path / "one", *options, "seeds=[2]")
    assert np.abs(one[0].astype(int) - plain[2]).max() <= 1
    with pytest.raises(SamplingFolderError, match="upsample"):
        sample(run_dir, tmp_path / "plain", *options, "upsample.theta=0.5")


def test_training_does_not_go_on_with_the_skips_of_sampling():
    chosen = SimpleNamespace(upsample=UpsampleSettings(factor=2, skip_tuning="as_intended"))
    with pytest.raises(SettingsError, match=r"sample_acc\.py"):
        _in_loop_evaluation(chosen, Runtime())


@pytest.mark.slow
def test_a_model_without_long_skips_is_named(tmp_path):
    run_dir = train(tmp_path / "run", *ZIGMA, "process=vp")
    with pytest.raises(SettingsError, match="ZigMa has no long skip"):
        sample(run_dir, tmp_path / "samples", "upsample.factor=2", "upsample.skip_tuning=as_intended")


LARGER = ["data.image_size=8", "model.img_dim=8", "optim.lr=1e-12", "optim.wd=0"]


@pytest.mark.slow
@pytest.mark.parametrize("model", [ZIGMA, DIM, UVIT], ids=["zigma", "dim", "uvit"])
def test_weak_to_strong_training(model, tmp_path):
    small = train(tmp_path / "small", *model, "process=vp")
    large = train(tmp_path / "large", *model, "process=vp", *LARGER, f"ckpt={small}")
    report = json.loads((large / "adapted.json").read_text())
    assert report["ckpt"] == str(small) and not report["new"] and not report["left_over"]
    assert len(report["adapted"]) == 1 and "4 x 4 -> 8 x 8" in str(report["adapted"])
    before, after = open_checkpoint(small), open_checkpoint(large)
    profile = before.trainer["ema"][0]["name"]
    averages, kept = before.tensors(f"ema_{profile}"), after.tensors(f"ema_{profile}")
    for name in report["copied"]:
        if name in averages:
            assert_close(name, kept[name], averages[name], of_max=1e-5, floor=1e-9)
    # The average goes on where it was, as old as the images that are behind it.
    assert after.trainer["counters"]["ema_images"] == before.trainer["counters"]["images_seen"] == 4
    assert after.trainer["counters"]["images_seen"] == 4
    # Again from the larger one, and then from the run itself.
    larger = ["data.image_size=16", "model.img_dim=16", *LARGER[2:], f"ckpt={large}"]
    largest = train(tmp_path / "largest", *model, "process=vp", *larger)
    assert open_checkpoint(largest).trainer["counters"]["ema_images"] == 8
    train(tmp_path / "largest", *model, "process=vp", *larger, "data.train_steps=2")
    assert open_checkpoint(largest).trainer["counters"]["ema_images"] == 8


@pytest.mark.slow
def test_weak_to_strong_training_from_a_published_file(tmp_path):
    """As DiM goes from 256 to 512: the layout of the pads changes beside the table of positions."""
    torch.manual_seed(0)
    shape = {"in_channels": 3, "img_dim": 4, "patch_size": 1, "embed_dim": 8, "depth": 5, "num_classes": 4}
    official = filled(DiM(**shape)).state_dict()
    torch.save(official, tmp_path / "nnet_ema.pth")
    start = ["model.pad_layout=rho_pad", f"ckpt={tmp_path / 'nnet_ema.pth'}"]
    large = train(tmp_path / "large", *DIM, "process=sd_discrete", *LARGER, *start)
    report = json.loads((large / "adapted.json").read_text())
    assert report["adapted"] == {"additional_embed": "4 x 4 -> 8 x 8, bilinear"} and not report["new"]
    found = open_checkpoint(large).tensors("model")
    assert_close("pads", found["a4m_adapter.pad_token"], official["a4m_adapter.pad_token"], of_max=1e-5)
    table = interpolate_positions(official["additional_embed"][:, 2:], (1, 4, 4), (1, 8, 8), mode="bilinear")
    assert_close("positions", found["additional_embed"][:, 2:], table, of_max=1e-5)


@pytest.mark.slow
def test_what_cannot_be_started_from_is_one_line(tmp_path):
    small = train(tmp_path / "small", *ZIGMA, "process=vp")
    for overrides, message in (
        ([f"ckpt={tmp_path / 'missing'}"], "holds no complete checkpoint"),
        ([f"ckpt={tmp_path / 'missing.pt'}"], r"missing\.pt does not exist: give ckpt=RUN_DIR"),
        (
            [f"ckpt={small}", "model.depth=3"],
            r"weights are another model's: model\.depth.*Drop the override, or ckpt=",
        ),
        ([f"ckpt={small}", "ckpt_patches=published"], "as_published"),
    ):
        with pytest.raises(SettingsError, match=message):
            train(tmp_path / "large", *ZIGMA, "process=vp", *overrides)


def test_what_guidance_acts_on_is_no_other_model(tmp_path):
    dit = ["model=dit_s_2", "model.in_channels=3", "model.img_dim=4", "model.depth=1", "model.num_heads=2"]
    dit += ["model.num_classes=4", "process=gaussian"]
    small = train(tmp_path / "small", *dit)
    again = train(tmp_path / "again", *dit, "+model.guided_channels=3", f"ckpt={small}")
    report = json.loads((again / "adapted.json").read_text())
    assert report["copied"] and not report["new"] and not report["adapted"]
