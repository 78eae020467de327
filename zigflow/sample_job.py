"""What ``sample_acc.py`` does: open a checkpoint, sample or measure, judge, write results with their protocol."""

import hashlib
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from zigflow import plugins
from zigflow.build import (
    OFFICIAL_SUFFIXES,
    build_codec,
    build_model,
    build_sampler,
    build_source,
    make,
    model_arguments,
)
from zigflow.codec import IdentityCodec, to_uint8
from zigflow.data.loader import evaluation_loader
from zigflow.engine import checkpoint as checkpoints
from zigflow.engine.launch import make_accelerator
from zigflow.engine.measure import bits_per_dim, encode_data
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_state import load_weights, versions
from zigflow.engine.sampling_run import SamplingRun, weights_hash
from zigflow.engine.tensors import save_tensors
from zigflow.metrics.base import SampleIds
from zigflow.metrics.pictures import save_sample_grid
from zigflow.metrics.results import write_results
from zigflow.official import load_official, read_official
from zigflow.preflight import check_decoding
from zigflow.samplers import Guided
from zigflow.settings import Settings, SettingsError, convert
from zigflow.stored_config import complete_from_checkpoint, complete_from_defaults

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Trained:
    """A checkpoint brought to life for sampling."""

    settings: Settings
    model: torch.nn.Module
    weights: str
    step: int | None
    folder: Path


def _open_trained(given: dict[str, Any], ckpt: str, wanted: str | None) -> _Trained:
    """The model of a checkpoint, ours or official, and the configuration completed by it."""
    if Path(ckpt).suffix in OFFICIAL_SUFFIXES:
        file = read_official(ckpt, "zigma")
        settings = Settings.from_mapping(complete_from_defaults(given, ckpt, file.ctor_kwargs))
        _check_before_building(settings)
        arguments = {k: v for k, v in model_arguments(settings).items() if k != "_target_"}
        seed = {k: arguments.pop(k) for k in ("scan_seed",) if k in arguments}
        model = load_official("zigma", arguments, file.state_dict, **seed)
        return _Trained(settings, model, "official", file.step, Path("samples") / Path(ckpt).stem)
    stored = checkpoints.open_checkpoint(ckpt)
    settings = Settings.from_mapping(complete_from_checkpoint(given, stored.config, ckpt))
    _check_before_building(settings)
    model = build_model(settings)
    weights = load_weights(model, stored, wanted)
    path = Path(stored.path)
    root = path.parent.parent if path.parent.name == "checkpoints" else path
    return _Trained(settings, model, weights, stored.step, root / "samples")


def _check_before_building(settings: Settings) -> None:
    """Encoding stored latents and measuring their likelihood need no autoencoder, pictures do."""
    if not (settings.likelihood or settings.ode.likelihood or settings.ode.reverse):
        check_decoding(settings)


def _sampling_facts(trained: _Trained, ckpt: str, batch_size: int) -> tuple[str, dict[str, Any]]:
    """The folder's name, which tells every other way of sampling apart, and what the samples follow from."""
    settings = trained.settings
    chosen = settings.sde if settings.sample_mode == "SDE" else settings.ode
    solver = chosen.sampling_method.replace("/", "-")
    step = "" if trained.step is None else f"_{trained.step}"
    facts = {
        "ckpt": ckpt,
        "weights": trained.weights,
        "step": trained.step,
        "sample_mode": settings.sample_mode,
        "sampler": asdict(chosen),
        "guidance": {"scale": settings.cfg_scale, "interval": list(settings.cfg_interval)},
        "process": dict(settings.process),
        "codec": dict(settings.codec),
        "precision": settings.mixed_precision or "no",
    }
    rest = json.dumps(
        [{k: v for k, v in facts.items() if k != "ckpt"}, batch_size], sort_keys=True, default=str
    )
    name = (
        f"{trained.weights}{step}_{settings.sample_mode}_{solver}_{chosen.num_steps}_w{settings.cfg_scale:g}"
        f"_seed{settings.global_seed}_{hashlib.sha256(rest.encode()).hexdigest()[:6]}"
    )
    return name, facts


def sample_from_config(cfg: DictConfig) -> Path:
    """Sample and judge as configured; returns the folder of samples."""
    given = OmegaConf.to_container(cfg, resolve=True)
    ckpt, wanted = given.get("ckpt"), given.pop("weights", None)
    batch_size = convert("offline_sample_local_bs", given.pop("offline_sample_local_bs"), int)
    if batch_size < 1:
        raise SettingsError(f"offline_sample_local_bs={batch_size} must be at least 1")
    if ckpt is None:
        raise SettingsError("ckpt is missing: give ckpt=RUN_DIR, a checkpoint in it, or an official .pt file")
    plugins.load_plugins()
    trained = _open_trained(given, str(ckpt), wanted)
    settings = trained.settings
    accelerator = make_accelerator(cpu=settings.loop.device == "cpu")
    # After accelerate, which counts the threads of several CPU processes itself.
    if settings.loop.threads is not None:
        torch.set_num_threads(settings.loop.threads)
    model = trained.model.to(accelerator.device).eval()
    process, sampler = make("process", settings.process), build_sampler(settings)
    name, facts = _sampling_facts(trained, str(ckpt), batch_size)
    folder = Path(settings.sample_dir) if settings.sample_dir else trained.folder / name
    ranks = Ranks(accelerator.device if accelerator.device.type == "cuda" else "cpu")
    if settings.likelihood or settings.ode.likelihood or settings.ode.reverse:
        if ranks.is_main:
            measure_data(settings, model, process, sampler, folder, facts, batch_size, accelerator.device)
        ranks.barrier()
        return folder

    codec = build_codec(settings, accelerator.device)
    if isinstance(codec, IdentityCodec) and model.in_channels not in (1, 3):
        raise SettingsError(
            f"the model makes latents of {model.in_channels} channels and codec={settings.codec['_target_']} does "
            "not decode them: sample with codec=sd_vae codec.path=FOLDER"
        )
    frames = (model.video_frames,) if getattr(model, "video_frames", 0) else ()
    count = 4 * batch_size if settings.sample_debug else settings.num_fid_samples
    run = SamplingRun(
        model=model,
        process=process,
        sampler=sampler,
        codec=codec,
        shape=(*frames, model.in_channels, *model.img_dim),
        num_samples=count,
        batch_size=batch_size,
        seed=settings.global_seed,
        folder=folder,
        num_classes=max(model.num_classes, 0),
        label_of=_text_conditions(settings) if model.has_text else None,
        guide=lambda m: Guided(m, settings.cfg_scale, interval=settings.cfg_interval),
        identity={k: v for k, v in facts.items() if k != "ckpt"},
        device=accelerator.device,
        ranks=ranks,
        mixed_precision=settings.mixed_precision or "no",
        progress=settings.loop.progress,
    )
    result = run.run()
    ranks.barrier()
    if not ranks.is_main:
        return folder
    if ranks.size > 1:
        result = run.collect()
    # Rows of ten for a model without classes.
    rows = result.labels if result.labels is not None else result.ids[:100] // 10
    grid = save_sample_grid(folder / "grid.png", result.images[: len(rows)], rows)
    try:
        metrics, protocol = _judge(settings, result)
    except ValueError as error:
        raise SettingsError(
            f"the samples are in {folder}, but metrics ({settings.metrics['_target_']}) cannot judge them: {error}; "
            "give metrics=none, or another num_fid_samples"
        ) from error
    facts |= {
        "weights_sha256": result.identity["weights"],
        "function_evaluations": result.function_evaluations,
    }
    results = write_results(
        folder / "results.json", metrics, {**_protocol(settings, facts, result.ids), **protocol}
    )
    log.info("sampled %d images: %s, grid %s, results %s", len(result.ids), folder, grid, results)
    return folder


def _text_conditions(settings: Settings):
    """Sample i is conditioned on the text of held-out sample i modulo their number."""
    source = build_source(settings, "heldout") or build_source(settings)
    if source is None:
        raise SettingsError(f"a text model needs texts to sample from, data={settings.data.name} has none")

    def tokens_of(ids: torch.Tensor) -> torch.Tensor:
        tokens = [source[int(i) % len(source)]["tokens"] for i in ids]
        return torch.stack([t[0] if t.ndim == 3 else t for t in tokens])

    return tokens_of


def _reference(source: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All images of a source as uint8 (N, C, H, W), and their labels."""
    batches = list(evaluation_loader(source, 256))
    images = torch.cat([to_uint8(b.pixels) for b in batches])
    return images, torch.cat([b.labels for b in batches]) if batches[0].labels is not None else None


def _judge(settings: Settings, result: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metric's numbers and protocol; empty without a metric."""
    node = {k: v for k, v in (settings.metrics or {}).items() if k != "name"}
    if not node.get("_target_") or not settings.data.source:
        return {"n": len(result.ids)}, {"metric": None}
    metric = make("metrics", node)
    heldout = build_source(settings, "heldout")
    metric.set_reference(
        _reference(build_source(settings)), _reference(heldout) if heldout is not None else None
    )
    labels = None if result.labels is None else torch.as_tensor(result.labels)
    metric.update(torch.as_tensor(result.images), labels, torch.as_tensor(result.ids))
    return metric.compute(), metric.protocol()


def _protocol(settings: Settings, facts: Mapping[str, Any], ids: Any) -> dict[str, Any]:
    """How a number came about, for any of our results."""
    counted = SampleIds()
    counted.add(torch.as_tensor(ids))
    return {
        **facts,
        "n": len(counted),
        "ids_sha256": counted.sha256(),
        "seed": settings.global_seed,
        "steps": facts["sampler"]["num_steps"],
        "codec_scale": settings.codec.get("scale", 1.0),
        "reference": {"train": settings.data.source, "heldout": settings.data.heldout},
        "versions": versions(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def measure_data(settings, model, process, sampler, folder, facts, batch_size, device) -> None:
    """Instead of sampling: bits per dimension of held-out data, or the noise that it is encoded into."""
    source = build_source(settings, "heldout") or build_source(settings)
    if source is None:
        raise SettingsError(f"there is no data to measure: data={settings.data.name} has none")
    codec = build_codec(settings, device)
    common = {
        "seed": settings.global_seed, "count": settings.num_fid_samples, "batch_size": batch_size, "device": device
    }  # fmt: skip
    facts = {**facts, "precision": "no", "weights_sha256": weights_hash(model)}
    if settings.ode.reverse:
        x0, ids = encode_data(source, codec, model, process, sampler, **common)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "noise.safetensors", {"x0": x0, "ids": ids})
        metrics = {"noise_mean": float(x0.mean()), "noise_std": float(x0.std())}
        results = write_results(folder / "encoding.json", metrics, _protocol(settings, facts, ids))
        log.info("encoded %d samples: %s, %s", len(ids), folder / "noise.safetensors", results)
        return
    # Grey levels of 8-bit images in [-1, 1] are 2/255 apart; latents have no levels.
    level = codec.scale * 2 / 255 if isinstance(codec, IdentityCodec) and not settings.is_latent else None
    bits, ids = bits_per_dim(source, codec, model, process, sampler, level=level, **common)
    metrics = {"bits_per_dim": float(bits.mean()), "bits_per_dim_std": float(bits.std(correction=0))}
    facts["dequantization"] = None if level is None else "uniform over 256 levels"
    facts["trace"] = "one Hutchinson probe"
    results = write_results(folder / "likelihood.json", metrics, _protocol(settings, facts, ids))
    log.info("bits per dimension %.4f over %d samples: %s", metrics["bits_per_dim"], len(ids), results)
