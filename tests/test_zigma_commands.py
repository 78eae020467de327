"""The commands of the ZigMa README, word for word: they compose, are checked early, train and sample."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.zigma_shards import LAYOUTS, save_autoencoder, write_shards
from zigflow import plugins
from zigflow.engine.sample_plan import SampleOptions
from zigflow.preflight import check_decoding, check_training
from zigflow.settings import Settings, SettingsError
from zigflow.stored_config import complete_from_defaults

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = ROOT / "tests" / "parity" / "fixtures" / "zigma" / "checkpoint" / "0000010.pt"

# As they stand in the README of ZigMa (Apache-2.0), without the line breaks.
COMMANDS = {
    "celeba-sweep": "accelerate launch  --num_processes 1 --num_machines 1  --mixed_precision fp16    train_acc.py  "
    "model=sweep2_b1  use_latent=1   data=celebamm256_uncond  ckpt_every=10_000 data.sample_fid_n=5_000 "
    "data.sample_fid_bs=4 data.sample_fid_every=10_000  data.batch_size=8   note=_ ",
    "celeba-zigzag": "CUDA_VISIBLE_DEVICES=4 accelerate launch  --num_processes 1 --num_machines 1  "
    "--mixed_precision fp16  --main_process_ip 127.0.0.1 --main_process_port 8868  train_acc.py  model=zigzag8_b1  "
    "use_latent=1   data=celebamm256_uncond  ckpt_every=10_000 data.sample_fid_n=5_000 data.sample_fid_bs=4 "
    "data.sample_fid_every=10_000  data.batch_size=4   note=_ ",
    "ucf-baseline": 'CUDA_VISIBLE_DEVICES="0,1,2,3" accelerate launch  --num_processes 4 --num_machines 1 --multi_gpu '
    "--mixed_precision fp16  --main_process_ip 127.0.0.1 --main_process_port 8868  train_acc.py  model=3d_sweep2_b2  "
    "use_latent=1 data=ucf101  ckpt_every=10_000  data.sample_fid_n=20_0 data.sample_fid_bs=4 "
    "data.sample_fid_every=10_000  data.batch_size=4   note=_ ",
    "ucf-sst": 'CUDA_VISIBLE_DEVICES="0,1,2,3" accelerate launch  --num_processes 4 --num_machines 1 --multi_gpu '
    "--mixed_precision fp16  --main_process_ip 127.0.0.1 --main_process_port 8868  train_acc.py  "
    "model=3d_zigzag8sst_b2  use_latent=1 data=ucf101  ckpt_every=10_000  data.sample_fid_n=20_0 "
    "data.sample_fid_bs=4 data.sample_fid_every=10_000  data.batch_size=4   note=_ ",
    "faceshq-sampling": 'CUDA_VISIBLE_DEVICES="2" accelerate launch  --num_processes 1 --num_machines 1     '
    "sample_acc.py  model=s1024_zigzag8_b2_old  use_latent=1   data=facehq_1024  ckpt_every=10_000 "
    "data.sample_fid_n=5_000 data.sample_fid_bs=4 data.sample_fid_every=10_000  data.batch_size=8  sample_mode=ODE "
    "likelihood=0  num_fid_samples=5_000 sample_debug=0  ckpt=checkpoints/faceshq1024_0060000.pt  ",
}
# The README's table of published checkpoints; its last row says mode= for model=.
TABLE = [
    ("faceshq1024_0090000.pt", "s1024_zigzag8_b2_old", "facehq_1024"),
    ("landscape1024_0210000.pt", "s1024_zigzag8_b2_old", "landscapehq_1024"),
    ("churches256_0280000.pt", "zigzag8_b1_pe2", "churches256"),
    ("zigzagN8_b1_pe2_coco14_bs48_0400000.pt", "zigzag8_b1_pe2", "coco14"),
]
TRAINING = [name for name, command in COMMANDS.items() if "train_acc.py" in command]
MODELS = {
    "sweep2_b1": "v2", "sweep2_b1_pe2": "v2", "zigzag8_b1": "zigzagN8", "zigzag8_b1_pe2": "zigzagN8",
    "3d_sweep2_b2": "v2", "3d_zigzag8sst_b2": "zzvideo_sst", "s1024_zigzag8_b2_old": "zigzagN8",
}  # fmt: skip
SHRUNK = ["model.depth=2", "model.embed_dim=32", "loop.progress=false", "log_every=1"]


def overrides_of(command):
    """What follows the script: the overrides as they are typed."""
    words = shlex.split(command)
    return words[next(i for i, word in enumerate(words) if word.endswith("_acc.py")) + 1 :]


def compose(overrides, name="default"):
    cfg = plugins.compose_config(["run_dir=unused", *overrides], name)
    return OmegaConf.to_container(cfg, resolve=True)


def sampling_settings(overrides):
    given = compose(overrides, "sample")
    given.pop("weights")
    SampleOptions.take_from(given)
    return Settings.from_mapping(complete_from_defaults(given, given["ckpt"]))


@pytest.fixture
def shards(tmp_path):
    return lambda data, samples=4: write_shards(tmp_path / f"shards-{data}-{samples}", data, samples)


@pytest.mark.parametrize("name", TRAINING)
def test_training_commands_compose_word_for_word(name, shards):
    overrides = overrides_of(COMMANDS[name])
    data = next(o.removeprefix("data=") for o in overrides if o.startswith("data="))
    settings = Settings.from_mapping(compose(overrides))
    typed = dict(o.split("=") for o in overrides)
    assert (settings.ckpt_every, settings.note, settings.use_latent) == (10_000, "_", True)
    assert settings.model["name"] == typed["model"]
    assert settings.data.batch_size == int(typed["data.batch_size"])
    assert settings.data.sample_fid_n == int(typed["data.sample_fid_n"])
    assert (settings.data.sample_fid_every, settings.data.sample_fid_bs) == (10_000, 4)
    assert settings.codec["scale"] == 0.18215
    with pytest.raises(
        SettingsError, match=rf"data={data} finds no shards in .*make tars of .*data\.tar_base=FOLDER"
    ):
        check_training(settings)
    check_training(Settings.from_mapping(compose([*overrides, f"data.tar_base={shards(data)}"])))


@pytest.mark.parametrize(
    "overrides",
    [overrides_of(COMMANDS["faceshq-sampling"])]
    + [[f"ckpt={file}", f"model={model}", f"data={data}"] for file, model, data in TABLE],
    ids=lambda o: o[-1],
)
def test_sampling_commands_compose_word_for_word(overrides, tmp_path):
    settings = sampling_settings(overrides)
    assert (settings.is_latent, settings.use_latent) == (True, True)
    assert settings.codec["scale"] == 0.18215
    assert settings.model.get("has_text") == ("data=coco14" in overrides)
    with pytest.raises(SettingsError, match=r"codec\.path is missing.*sd-vae-ft-ema"):
        check_decoding(settings)
    with pytest.raises(SettingsError, match=r"no config\.json"):
        check_decoding(sampling_settings([*overrides, f"codec.path={tmp_path}"]))


@pytest.mark.parametrize("model", MODELS)
def test_model_names_are_the_published_models(model):
    video = ["data=ucf101"] if model.startswith("3d_") else ["data=celebamm256_uncond"]
    node = compose([f"model={model}", *video])["model"]
    assert (node["scan_type"], node["embed_dim"], node["depth"]) == (MODELS[model], 768, 24)
    assert node["use_pe"] == (2 if "_pe2" in model or model.startswith("3d_") else 0)
    manifest = OFFICIAL.parents[1] / "manifests" / f"{model}.json"
    if manifest.is_file():
        official = json.loads(manifest.read_text())["ctor_kwargs"]
        assert {key: node[key] for key in official} == official


@pytest.mark.parametrize("data", LAYOUTS)
def test_data_names_hold_the_published_shapes(data, shards):
    from zigflow.sources import build_source

    settings = Settings.from_mapping(
        compose([*model_for(data), f"data={data}", f"data.tar_base={shards(data)}"])
    )
    check_training(settings)
    source = build_source(settings)
    assert source.image_shape == LAYOUTS[data][1]
    sample = source[1]
    assert ("tokens" in sample) == settings.data.has_text == settings.model.get("has_text", False)
    if settings.data.has_text:
        assert tuple(sample["tokens"].shape) == (2, 77, 768)
    if data == "ucf101":
        assert (sample["labels"], source.num_classes) == (33, 101)
    assert build_source(settings, "heldout") is None


def model_for(data):
    """A published model for each data set; 512 x 512 is read by the 256 model at another size."""
    if data == "ucf101":
        return ["model=3d_zigzag8sst_b2"]
    if data.endswith("1024"):
        return ["model=s1024_zigzag8_b2_old"]
    return ["model=zigzag8_b1", *(["model.img_dim=64"] if "512" in data else [])]


EXPERIMENTS = sorted(path.stem for path in (ROOT / "config" / "experiment").glob("zigma_*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_published_runs_state_their_number_and_fit_their_data(experiment, tmp_path):
    head = (ROOT / "config" / "experiment" / f"{experiment}.yaml").read_text().partition("defaults:")[0]
    assert re.search(r"# Published: .*(\d\.\d|a checkpoint)", head)
    assert re.search(r"Source: .*(arXiv:2403\.13802|README)", head)
    (tmp_path / "train-000000.tar").touch()
    settings = Settings.from_mapping(compose([f"+experiment={experiment}", f"data.tar_base={tmp_path}"]))
    check_training(settings)
    assert (settings.optim.lr, settings.optim.wd, settings.ema_rate, settings.train.path_type) == (
        1e-4,
        0,
        0.9999,
        "Linear",
    )


def test_every_published_model_and_data_set_has_a_run():
    composed = [compose([f"+experiment={name}"]) for name in EXPERIMENTS]
    assert {c["data"]["name"] for c in composed} == set(LAYOUTS) - {
        "coco", "celebamm256", "celebamm512",
    }  # fmt: skip
    assert {c["model"]["name"] for c in composed} == set(MODELS)


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["model=zigzag8_b1", "data=celebamm512_uncond"], ["(4, 64, 64)", "(4, 32, 32)", "model.img_dim=64"]),
        (["model=zigzag8_b1", "data=facehq_1024"], ["(4, 128, 128)", "(4, 32, 32)"]),
        (["model=s1024_zigzag8_b2_old", "data=celebamm256"], ["(4, 32, 32)", "(4, 128, 128)"]),
        (["model=zigzag8_b1", "data=ucf101"], ["model.video_frames=0", "data.video_frames=16"]),
        (["model=3d_sweep2_b2", "data=ucf101", "model.num_classes=10"], ["101 classes", "model.num_classes is 10"]),
        (["model=zigzag8_b1", "data=celebamm256", "model.d_context=512"], ["model.d_context=512", "768"]),
        (["model=zigzag8_b1"], ["(1, 8, 8)", "(4, 32, 32)"]),
        (["model=zigzag8_b1", "data=celebamm256", "use_latent=0"], ["use_latent=false", "codec=pixels"]),
        (["model=zigzag8_b1", "data=celebamm256", "use_latent=0", "codec=pixels"], ["data.source.rename"]),
        (["data=image_folder", "use_latent=1", "codec=sd_vae"], ["codec.path=FOLDER"]),
        (["data=image_folder", "use_latent=1"], ["use_latent", "codec=sd_vae"]),
        (["data=image_folder", "use_latent=1", "codec=sd_vae", "codec.path=/nowhere"], ["/nowhere", "config.json"]),
        (["data=none"], ["data=none", "no source"]),
        (["data=ucf101", "model=3d_sweep2_b2", "data.video_frames=0"], ["data.is_video=True"]),
        (["data=celebamm256", "model=zigzag8_b1", "data.tar_base=null"], ["no source"]),
    ],
)  # fmt: skip
def test_contradictions_are_one_line_before_a_device_is_touched(overrides, parts):
    with pytest.raises(SettingsError) as error:
        plugins.check_command_line(overrides, "default")
    line = plugins.explain(error.value, "default")
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_side_lengths_that_the_autoencoder_cannot_halve_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"latent_channels": 16, "block_out_channels": [8, 8, 8]})
    )
    common = [
        "data=image_folder",
        "use_latent=1",
        "codec=sd_vae",
        f"codec.path={tmp_path}",
        "model=zigzag8_b1",
    ]
    with pytest.raises(SettingsError, match=r"data\.image_size.*divisible by 4"):
        plugins.check_command_line([*common, "data.image_size=30"], "default")
    # The folder's own numbers count, not Stable Diffusion's.
    with pytest.raises(SettingsError, match=r"\(16, 8, 8\).*\(4, 32, 32\)"):
        plugins.check_command_line([*common, "data.image_size=32"], "default")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"codec\.path: .*config\.json"):
        plugins.check_command_line([*common, "data.image_size=32"], "default")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder"))


def train(run_dir, *overrides):
    from zigflow.train_job import train_from_config

    train_from_config(plugins.compose_config([*overrides, f"run_dir={run_dir}", "loop.device=cpu"]))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)


def sample(*overrides):
    from zigflow.sample_job import sample_from_config

    return sample_from_config(
        plugins.compose_config(
            ["ode.sampling_method=euler", "ode.num_steps=3", "num_fid_samples=2", "offline_sample_local_bs=2",
             "loop.progress=false", "loop.device=cpu", "run_dir=unused", *overrides], "sample",
        )
    )  # fmt: skip


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))]


@pytest.mark.slow
@pytest.mark.parametrize("data", [d for d in LAYOUTS if d != "coco"])
def test_each_data_set_trains_and_samples_at_its_true_shape(data, shards, autoencoder, tmp_path):
    root = shards(data)
    train(
        tmp_path / "run", *model_for(data), f"data={data}", f"data.tar_base={root}", "data.train_steps=2",
        "data.batch_size=2", "data.num_workers=0", *SHRUNK,
        # With it as it is published: without an autoencoder there is no evaluation, and training goes on.
        *(["data.sample_fid_every=0"] if data != "celebamm256_uncond" else []),
    )  # fmt: skip
    found = pictures(sample(f"ckpt={tmp_path / 'run'}", f"codec.path={autoencoder}"))
    *frames, _, height, width = LAYOUTS[data][1]
    assert [image.shape for image in found] == [(8 * height, 8 * width * (frames or [1])[0], 3)] * 2
    if data == "churches256":
        # The density of stored latents needs no autoencoder.
        measured = json.loads(
            (sample(f"ckpt={tmp_path / 'run'}", "likelihood=1") / "results.json").read_text()
        )
        assert np.isfinite(measured["metrics"]["bits_per_dim"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_training_commands_train_with_their_own_options(name, shards, tmp_path):
    overrides = overrides_of(COMMANDS[name])
    data = next(o.removeprefix("data=") for o in overrides if o.startswith("data="))
    # The batch is the README's own; evaluation at step 10,000 lies beyond the two steps.
    train(
        tmp_path / "run", *overrides, f"data.tar_base={shards(data, 8)}", "data.train_steps=2", "data.num_workers=0",
        *SHRUNK,
    )  # fmt: skip


@pytest.mark.slow
def test_zigzag8_b1_trains_at_full_size(shards, tmp_path):
    overrides = [o for o in overrides_of(COMMANDS["celeba-zigzag"]) if not o.startswith("data.batch_size")]
    train(
        tmp_path / "run", *overrides, f"data.tar_base={shards('celebamm256_uncond')}", "data.train_steps=2",
        "data.batch_size=1", "data.num_workers=0", "loop.progress=false", "log_every=1",
    )  # fmt: skip
    config = json.loads(next(tmp_path.glob("run/checkpoints/*/config.json")).read_text())
    assert (config["model"]["embed_dim"], config["model"]["depth"]) == (768, 24)


@pytest.mark.slow
def test_pixels_are_encoded_on_the_fly(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / f"images/a/{index}.png"
        )
    vae = save_autoencoder(tmp_path / "vae", factor=2)
    train(
        tmp_path / "run", "data=image_folder", f"data.source.root={tmp_path / 'images'}", "data.num_classes=1",
        "data.image_size=16", "model=zigzag8_b1", "model.img_dim=8", "use_latent=1", "codec=sd_vae",
        f"codec.path={vae}", "data.train_steps=2", "data.batch_size=2", "data.num_workers=0", *SHRUNK,
    )  # fmt: skip
    stored = json.loads(next(tmp_path.glob("run/checkpoints/*/config.json")).read_text())
    assert stored["codec"]["scale"] == 0.18215
    assert [image.shape for image in pictures(sample(f"ckpt={tmp_path / 'run'}"))] == [(16, 16, 3)] * 2
    with pytest.raises(SettingsError, match=r"codec\.scale=1\.0 contradicts"):
        sample(f"ckpt={tmp_path / 'run'}", "codec=sd_vae", "codec.scale=1.0")


@pytest.mark.slow
def test_a_sampling_command_takes_an_official_file(autoencoder, tmp_path, monkeypatch):
    """The README's command; the stored file is smaller than the one published, so the model is given its size."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(OFFICIAL, tmp_path / "checkpoints" / "faceshq1024_0060000.pt")
    typed = [
        re.sub(r"^num_fid_samples=.*", "num_fid_samples=2", o)
        for o in overrides_of(COMMANDS["faceshq-sampling"])
    ]
    size = ["model.img_dim=4", "model.embed_dim=16", "model.depth=1", "model.patch_size=1", "model.use_pe=2"]
    folder = sample(*typed, *size, f"codec.path={autoencoder}")
    assert [image.shape for image in pictures(folder)] == [(32, 32, 3)] * 2
    protocol = json.loads((folder / "results.json").read_text())["protocol"]
    assert (protocol["weights"], protocol["step"], protocol["codec_scale"]) == ("official", 10, 0.18215)
    with pytest.raises(ValueError, match="do not fit zigma"):
        sample(*typed, f"codec.path={autoencoder}", "sample_dir=other")
