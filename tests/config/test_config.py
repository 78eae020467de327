"""Every YAML composes and validates; every mistake is answered in one line; nothing heavy is imported early."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from scans import list_scans
from zigflow import build, chosen, nodes, plugins, sources
from zigflow.data.tar import ShardError
from zigflow.overrides import check_keywords
from zigflow.paths import config_dir
from zigflow.plugins import compose_config
from zigflow.settings import Settings, SettingsError
from zigflow.tools.schema import schema

ROOT = Path(__file__).resolve().parents[2]
GROUPS = sorted(
    p.name for p in config_dir().iterdir() if p.is_dir() and p.name not in ("accelerate", "hydra")
)
CHOICES = [(g, p.stem) for g in GROUPS for p in sorted((config_dir() / g).rglob("*.yaml"))]
PRESETS = ("experiment", "debug")


def plain(overrides=(), name="default"):
    cfg = compose_config(["run_dir=outputs/test", *overrides], name)
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    "given, parts",
    [
        (["optim.name=adamWW"], ["optim.name", "adamw"]),
        (["optim.name=lbfgs"], ["optim.name", "LBFGS", "several times"]),
        (["+optim._target_=torch.optim.Sophia"], ["optim._target_", "Sophia"]),
        (["+optim._target_=torch.optim.LBFGS"], ["optim._target_", "several times"]),
        (["+optim._target_=math.pi"], ["optim._target_=math.pi", "function of a model"]),
    ],
)
def test_an_optimizer_that_does_not_exist_is_refused_before_a_device_is_touched(given, parts):
    settings = Settings.from_mapping(plain(given))
    with pytest.raises(SettingsError) as refused:
        chosen.check_optimizer(settings)
    assert all(part in str(refused.value) for part in parts) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "given, parts",
    [
        (["optim.name=sgd", "+optim.args.momentun=0.9"], ["optim: ", "momentun", "momentum"]),
        (["optim.name=rprop", "optim.wd=0.1"], ["Rprop has no weight decay", "optim.wd=0"]),
        (["optim.name=adagrad", "+optim.args.lr_decay=-1"], ["optim: ", "lr_decay"]),
    ],
)
def test_settings_that_an_optimizer_does_not_have_are_refused_in_one_line(given, parts):
    settings = Settings.from_mapping(plain(given))
    with pytest.raises(SettingsError) as refused:
        build.make_optimizer(settings, torch.nn.Linear(2, 2))
    assert all(part in str(refused.value) for part in parts)


def test_any_class_is_an_optimizer_by_its_target():
    settings = Settings.from_mapping(
        plain(["+optim._target_=torch.optim.NAdam", "+optim.args.momentum_decay=0.01"])
    )
    made = build.make_optimizer(settings, torch.nn.Linear(2, 2))
    assert isinstance(made, torch.optim.NAdam) and made.defaults["momentum_decay"] == 0.01


def message(overrides, name="default"):
    """The one line that the command would print."""
    with pytest.raises(Exception) as refused:
        plugins.checked(plain(overrides, name))
    line = plugins.explain(refused.value, name)
    assert line is not None, f"{refused.type.__name__} is not explained: {refused.value}"
    assert "\n" not in line
    return line


def test_the_default_validates():
    settings = Settings.from_mapping(plain())
    assert settings.data.name == "digits"
    assert settings.max_grad_norm == 2.0


@functools.cache
def training_schema():
    return jsonschema.Draft202012Validator(schema("default"))


def choice_overrides(group, choice):
    if group in PRESETS:
        return [f"+{group}={choice}"]
    if group == "recipe":
        return [f"data={choice}"]
    video = ["data.video_frames=16"] if choice.startswith("3d_") else []
    if group == "data" and "is_video: true" in (config_dir() / group / f"{choice}.yaml").read_text():
        video = ["model=3d_sweep2_b2"]
    file = (config_dir() / group / f"{choice}.yaml").read_text()
    # A variance is read by the processes of diffusion alone.
    process = ["process=gaussian"] if group == "model" and "\nlearn_sigma: true" in file else []
    return [f"{group}={choice}", *video, *process]


@pytest.mark.parametrize("group, choice", [c for c in CHOICES if c[1] != "from_checkpoint"])
def test_every_choice_composes_and_validates(group, choice):
    text = (config_dir() / group / f"{choice}.yaml").read_text()
    if "for: sample" in text:
        plain(choice_overrides(group, choice), "sample")
        return
    values = plain(choice_overrides(group, choice))
    plugins.checked(values)
    training_schema().validate(values)
    for node in ("model", "process", "codec", "metrics"):
        if values[node].get("_target_"):
            check_keywords(node, values[node]["_target_"], values[node])


@pytest.mark.parametrize("group, choice", CHOICES)
def test_every_choice_composes_for_sampling(group, choice):
    plain(choice_overrides(group, choice), "sample")


@pytest.mark.parametrize("choice", [c for g, c in CHOICES if g == "model" and c != "from_checkpoint"])
def test_every_model_builds_and_runs_without_memory(choice):
    config = plain(choice_overrides("model", choice))["model"]
    config.pop("name")
    with torch.device("meta"):
        model = instantiate(config, _convert_="all")
        frames = (model.video_frames,) if model.video_frames else ()
        x = torch.empty(1, *frames, model.in_channels, *model.img_dim)
        y = torch.zeros(1, dtype=torch.int64) if model.num_classes > 0 else None
        shape = (*x.shape[:-3], getattr(model, "out_channels", model.in_channels), *model.img_dim)
        assert model(x, torch.empty(1), y).shape == shape


@pytest.mark.parametrize("name", list_scans())
def test_every_registered_scan_is_a_choice(name):
    assert plain([f"scan={name}"])["scan"] == {"name": name}


@pytest.mark.parametrize("model", ["dit_s_2", "uvit_small"])
def test_a_scan_for_a_model_without_one_is_refused(model):
    settings = Settings.from_mapping(plain([f"model={model}", "scan=hilbert", "data=none"]))
    with pytest.raises(SettingsError, match=rf"scan=hilbert: model={model} .*drop scan=.*dim"):
        build.model_arguments(settings)


def test_the_recipe_follows_the_data_and_official_defaults_stay():
    digits = plain()
    assert digits["optim"]["lr"] == 8e-3
    other = plain(["data=none"])
    assert other["optim"] == {**other["optim"], "lr": 1e-4, "schedule": "constant", "betas": [0.9, 0.999]}
    assert other["ckpt_every"] == 50_000
    assert plain(["optim.lr=1"])["optim"]["lr"] == 1


def test_codec_and_metrics_follow_the_data_unless_they_are_named():
    assert plain()["metrics"]["_target_"].endswith("DigitJudge")
    assert plain(["data=synthetic"])["metrics"]["_target_"] is None
    latents = plain(["data=celebamm256_uncond"])
    assert latents["codec"] == {
        "_target_": "zigflow.codec.AutoencoderKLCodec",
        "path": None,
        "scale": 0.18215,
        "shift": None,
        "own_scale": None,
    }
    assert (latents["is_latent"], latents["use_latent"]) == (True, True)
    assert plain(["data=celebamm256_uncond", "codec=pixels"])["codec"] == plain()["codec"]
    # Not of published data: what the autoencoder says.
    assert plain(["codec=sd_vae"])["codec"] == {**latents["codec"], "scale": None}


def test_presets_and_command_line_take_precedence_in_this_order():
    assert plain(["+debug=cpu_tiny"])["data"]["train_steps"] == 8
    assert plain(["+debug=cpu_tiny", "data.train_steps=3"])["data"]["train_steps"] == 3


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["data.bath_size=3"], ["data.bath_size", "data.batch_size"]),
        (["ckpt_evry=3"], ["ckpt_evry", "ckpt_every"]),
        (["optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (["model=zigzag8_b"], ["model=zigzag8_b", "zigzag8_b1"]),
        (["scan=hilbrt"], ["scan=hilbrt", "hilbert"]),
        (["data=digit"], ["data=digit", "digits"]),
        (["codec=sd_va"], ["codec=sd_va", "sd_vae"]),
        (["metrics=digit"], ["metrics=digit", "digits"]),
        (["+data.is_video=true"], ["data.is_video", "data.video_frames=0"]),
        (["data.batch_size=many"], ["data.batch_size", "integer"]),
        (["data.batch_size=0"], ["data.batch_size", "at least 1"]),
        (["data.batch_size=1.5"], ["data.batch_size", "integer"]),
        (["optim.lr=fast"], ["optim.lr", "number"]),
        (["optim.lr=-1"], ["optim.lr", "greater than 0"]),
        (["optim.eps=0"], ["optim.eps", "greater than 0"]),
        (["optim.betas=[0.9,1]"], ["optim.betas", "[0, 1)"]),
        (["loop.ema_ramp=-1"], ["loop.ema_ramp", "negative"]),
        (["global_seed=99999999999999999999"], ["global_seed", "2^63"]),
        (["run_dir=''"], ["run_dir is empty"]),
        (["sample_dir=''"], ["sample_dir is empty"]),
        (["sde.last_step_size=1"], ["sde.last_step_size", "[0, 1)"]),
        (["loop.compile=2"], ["loop.compile", "true or false"]),
        (["sample_mode=OED"], ["sample_mode", "ODE"]),
        (["mixed_precision=fp8"], ["mixed_precision", "fp16"]),
        (["cfg_scale=2", "model.class_dropout_prob=0"], ["cfg_scale", "model.class_dropout_prob"]),
        (["use_latent=1"], ["use_latent", "digits"]),
        (["wandb.mode=onlin"], ["wandb.mode", "online"]),
        (["+wandb.key=hush"], ["wandb.key", "WANDB_API_KEY"]),
        (["loop.peak_flops=0"], ["loop.peak_flops", "greater than 0"]),
        (["data.sample_fid_n=0"], ["data.sample_fid_n", "at least 1"]),
        (["model=3d_sweep2_b2"], ["model.video_frames", "data.video_frames"]) ,
        (["data.video_frames=4"], ["model.video_frames", "data.video_frames"]),
        (["ode.num_steps=1"], ["ode.num_steps"]),
        (["optim.betas=[0.9]"], ["optim.betas", "2"]),
        (["cfg_interval=[0.9,0.1]"], ["cfg_interval"]),
        (["sample_mode=diffusion"], ["sample_mode=diffusion", "process=gaussian"]),
        (["process=vp", "sample_mode=diffusion", "diffusion.num_steps=ddim50"], ["diffusion.num_steps=ddim50"]),
        (["diffusion.sampling_method=dim"], ["diffusion.sampling_method", "ddim"]),
        (["diffusion.sampling_method=dpm_solver", "diffusion.num_steps=2"], ["diffusion.num_steps=2", "order"]),
        (["diffusion.sampling_method=dpm_solver", "diffusion.eta=0.5"], ["diffusion.eta=0.5", "ddim"]),
        (["process.betas=cosin", "process=gaussian"], ["process.betas='cosin'", "cosine"]),
        (["process.time_law=normal"], ["process.time_law='normal'", "logit_normal"]),
        (["diffusion.eta=2"], ["diffusion.eta"]),
        (["diffusion.sampling_method=ddpm", "diffusion.eta=1"], ["diffusion.eta", "ddim"]),
        (["diffusion.sampling_method=ddim", "diffusion.last_step=false"], ["diffusion.last_step=false", "ddim"]),
        (["diffusion.lambda_floor=5"], ["diffusion.lambda_floor", "null"]),
        (["diffusion.variant=fast_spans"], ["diffusion.variant", "fast_equal_spans"]),
        (["process=gaussian", "sample_mode=diffusion", "likelihood=1"], ["likelihood", "ODE"]),
        (["process=gaussian", "sample_mode=diffusion", "likelihood=1"], ["diffusion.sampling_method=ddpm", "bound"]),
        (
            ["process=vp", "sample_mode=diffusion", "likelihood=1", "diffusion.sampling_method=ddpm"],
            ["variational bound", "process=gaussian", "VariancePreserving", "sample_mode=ODE"],
        ),
        (["likelihood=1", "sample_mode=SDE"], ["likelihood", "ODE"]),
        (["likelihood=1", "cfg_scale=2"], ["likelihood", "cfg_scale"]),
        (["ode.reverse=1", "sample_mode=SDE"], ["ode.reverse", "ODE"]),
        (["train.path_type=Lineer"], ["train.path_type", "Linear"]),
        (["train.prediction=x"], ["train.prediction", "velocity"]),
        (["train.loss_weight=velosity"], ["train.loss_weight", "velocity"]),
        (["ode.sampling_method=heunn"], ["ode.sampling_method", "heun"]),
        (["sde.diffusion_form=sigmas"], ["sde.diffusion_form", "sigma"]),
        (["data.train_steps=20"], ["optim.warmup_steps=50", "data.train_steps=20"]),
        (["optim.min_lr=1"], ["optim.min_lr=1", "optim.lr=0.008"]),
        (["optim.min_lr=1e-6", "optim.schedule=constant"], ["optim.min_lr", "optim.schedule=cosine"]),
        (["model.scan_type=zigzagN9"], ["model.scan_type", "9", "8"]),
        (["model.scan_type=zigzg"], ["model.scan_type", "zigzag"]),
        (["+nonsense=1"], ["nonsense"]),
    ],
)  # fmt: skip
def test_mistakes_are_answered_in_one_line(overrides, parts):
    if overrides == ["model=3d_sweep2_b2"]:
        overrides = ["model=3d_sweep2_b2", "model.video_frames=16"]
    line = message(overrides)
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize(
    "given, match",
    [
        (["data.limit=900"], "data.limit=900 of a source with 899 samples; give 1..899"),
        (["model.drop_path_rate=1"], r"drop_path_rate lies in \[0, 1\), got 1"),
        (["model.patch_size=0"], "patch_size must be at least 1, got 0"),
    ],
)
def test_what_only_the_object_knows_is_a_mistake_too(given, match):
    settings = Settings.from_mapping(plain(given))
    with pytest.raises(SettingsError, match=match):
        sources.build_source(settings)
        build.build_model(settings)


def test_official_spellings_are_accepted():
    settings = Settings.from_mapping(
        plain(["ckpt_every=10_000", "data.sample_fid_n=5_000", "use_latent=0", "sample_debug=0", "note=_"])
    )
    assert settings.ckpt_every == 10_000
    assert settings.use_latent is False
    assert settings.note == "_"


def test_frozen():
    settings = Settings.from_mapping(plain())
    with pytest.raises(AttributeError):
        settings.grad_accum = 2
    with pytest.raises(SettingsError):
        Settings.from_mapping({**plain(), "grad_accum": True})


@pytest.mark.parametrize("script", ["train_acc.py", "sample_acc.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_help_and_config_do_not_import_torch(script, flags, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, *{flags!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'accelerate', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout or "from_checkpoint" in done.stdout


@pytest.mark.parametrize(
    "override, line",
    [
        ("scan=[1]", "scan=[1]: a group takes the name of a choice"),
        (
            "run_dir='${HOME}/x'",
            "run_dir: ${HOME} is no key of the configuration: for the environment variable write",
        ),
        ("data.source.root='${NOT_SET}'", "data.source.root: ${NOT_SET} is no key of the configuration"),
    ],
)
def test_what_hydra_says_badly_is_said_in_one_line(override, line):
    with pytest.raises(Exception) as refused:
        plugins.check_command_line([override], "default")
    assert plugins.explain(refused.value, "default").startswith(line)
    assert plugins.is_mistake(refused.value)


def test_the_command_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_acc.py"), "data.bath_size=3"],
        cwd=tmp_path, capture_output=True, text=True, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: unknown key data.bath_size: did you mean data.batch_size?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides, code, part",
    [
        (["model.embed_dim=abc"], 2, "model"),
        pytest.param(["model.use_pe=7"], 2, "use_pe", marks=pytest.mark.slow),
        pytest.param(["process.time_law=uniformm"], 2, "uniform", marks=pytest.mark.slow),
        (["data.image_size=9"], 2, "divisible"),
    ],
)
def test_mistakes_found_while_building_are_one_line_too(overrides, code, part, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_acc.py"), *overrides],
        cwd=tmp_path, capture_output=True, text=True, env=_environment(),
    )  # fmt: skip
    assert done.returncode == code
    last = done.stderr.strip().splitlines()
    assert len([line for line in last if line.startswith("error: ")]) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert part in last[-1]


@pytest.mark.parametrize(
    "overrides, line",
    [
        (
            ["model=dit_s_2", "model.num_head=3"],
            r"model\.num_head: did you mean model\.num_heads\?$",
        ),
        (
            ["model=dim_s", "model.qqqqqqqqqqqqqqqqq=1"],
            r"known here: model\._target_, .*model\.pad_layout, model\.patch_size, model\.unconditional$",
        ),
        (["process=gaussian", "process.respacng=7"], r"did you mean process\.respacing\?"),
    ],
)
def test_unknown_keys_are_held_against_the_choice_that_was_made(overrides, line):
    with pytest.raises(Exception, match="not in struct|Could not override") as refused:
        plugins.compose_config([*overrides, "run_dir=unused"])
    assert re.search(line, plugins.explain(refused.value, "default"))


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_an_error_of_a_data_worker_is_told_in_its_own_words():
    text = (
        "Caught ShardError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "worker.py", line 1, in loop\nzigflow.data.tar.ShardError: a.tar, offset 512: the tar is truncated\n'
    )
    assert plugins.explain(ShardError(text), "default") == "a.tar, offset 512: the tar is truncated"


def test_a_missing_folder_of_shards_is_told_with_its_key():
    with pytest.raises(
        SettingsError, match=r"data\.source \(.*ShardSource\): .*is no local folder.*make-shards"
    ):
        nodes.make("data.source", {"_target_": "zigflow.datasets.shards.ShardSource", "root": "nowhere"})
