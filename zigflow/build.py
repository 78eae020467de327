"""The one place where a configuration becomes objects; everything below it takes plain arguments."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from zigflow import plugins
from zigflow.codec import IdentityCodec, to_uint8
from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import evaluation_loader, training_loader
from zigflow.data.order import DataOrder
from zigflow.data.subset import Subset
from zigflow.engine import checkpoint as checkpoints
from zigflow.engine.ema import EmaProfile
from zigflow.engine.log import read_metrics
from zigflow.engine.optim import Schedule, build_optimizer
from zigflow.engine.options import TrainOptions
from zigflow.engine.ranks import Ranks
from zigflow.engine.run_state import load_model_state, load_weights, versions
from zigflow.engine.sampling_run import SamplingRun, weights_hash
from zigflow.engine.trainer import Trainer, make_accelerator
from zigflow.keyed import KeyedDraws
from zigflow.metrics.base import SampleIds
from zigflow.metrics.pictures import save_loss_curve, save_sample_grid
from zigflow.metrics.results import write_results
from zigflow.official import load_official, read_official
from zigflow.samplers import Guided, OdeSampler, SdeSampler
from zigflow.settings import Settings, SettingsError
from zigflow.stored_config import complete_from_checkpoint, complete_from_defaults

log = logging.getLogger(__name__)

OFFICIAL_SUFFIXES = (".pt", ".pth", ".ckpt")


def model_arguments(settings: Settings) -> dict[str, Any]:
    """The model's node with the choice of ``scan=`` in it, without the label ``name``."""
    node = {k: v for k, v in settings.model.items() if k != "name"}
    scan = settings.scan.get("name", "from_model")
    if scan != "from_model":
        node["scan"] = scan
    return node


def build_model(settings: Settings) -> torch.nn.Module:
    """The model with its initial weights, which follow from ``global_seed``."""
    torch.manual_seed(settings.global_seed)
    return _make("model", model_arguments(settings))


def build_source(settings: Settings, split: str = "source"):
    """The data source of ``data.source`` or ``data.heldout``, cut to ``data.limit`` samples if that is set."""
    node = getattr(settings.data, split)
    if not node:
        return None
    source = _make(f"data.{split}", node)
    limit = settings.data.limit
    return source if limit is None or split != "source" else Subset(source, limit)


def build_sampler(settings: Settings):
    """The sampler that ``sample_mode`` and the groups ``ode`` and ``sde`` describe."""
    if settings.sample_mode == "SDE":
        sde = settings.sde
        return SdeSampler(
            method=sde.sampling_method, num_steps=sde.num_steps, diffusion_form=sde.diffusion_form,
            diffusion_norm=sde.diffusion_norm, last_step=sde.last_step, last_step_size=sde.last_step_size,
        )  # fmt: skip
    ode = settings.ode
    return OdeSampler(method=ode.sampling_method, num_steps=ode.num_steps, atol=ode.atol, rtol=ode.rtol)


def _make(key: str, node: Mapping[str, Any]) -> Any:
    """Instantiate a node; a mistake in its keywords becomes one line that names the key."""
    try:
        return instantiate(dict(node), _convert_="all")
    except Exception as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        if isinstance(cause, (ValueError, TypeError, KeyError, ImportError, FileNotFoundError)):
            raise SettingsError(f"{key} ({node.get('_target_')}): {cause}") from error
        raise


def _ema_profiles(settings: Settings) -> tuple[EmaProfile, ...]:
    if settings.ema_rate is not None:
        return (EmaProfile("rate", rate=settings.ema_rate),)
    return tuple(
        EmaProfile(f"half_life_{h}", half_life=h, ramp=settings.loop.ema_ramp)
        for h in settings.loop.ema_half_life
    )


def _check_fit(settings: Settings, model: Any, source: Any) -> None:
    """Refuse data that the model cannot read, before the first step."""
    frames = (model.video_frames,) if getattr(model, "video_frames", 0) else ()
    wanted = (*frames, model.in_channels, *model.img_dim)
    if tuple(source.image_shape) != wanted:
        raise SettingsError(
            f"data={settings.data.name} has samples of shape {tuple(source.image_shape)}, "
            f"model={settings.model.get('name')} reads {wanted}: choose fitting data.image_size, data.channels, model"
        )
    classes = getattr(model, "num_classes", -1)
    if classes > 0 and source.num_classes > classes:
        raise SettingsError(
            f"data={settings.data.name} has {source.num_classes} classes, model.num_classes is {classes}: "
            f"set model.num_classes={source.num_classes}"
        )


def train_from_config(cfg: DictConfig) -> Path:
    """Train as configured; returns the run directory."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    settings = Settings.from_mapping(plain)
    plugin_names = plugins.load_plugins()
    if settings.loop.threads is not None:
        torch.set_num_threads(settings.loop.threads)
    accelerator = make_accelerator(settings.mixed_precision, cpu=settings.loop.device == "cpu")
    source = build_source(settings)
    if source is None:
        raise SettingsError(f"data={settings.data.name} has no source to train on: choose another data=NAME")
    model = build_model(settings)
    _check_fit(settings, model, source)
    size = settings.data.batch_size * settings.grad_accum * accelerator.num_processes
    if len(source) < size:
        raise SettingsError(
            f"data={settings.data.name} has {len(source)} samples, fewer than one global batch of {size}: "
            f"lower data.batch_size or grad_accum"
        )
    if settings.ckpt is not None:
        _start_from(settings.ckpt, model)
    order = DataOrder(source.shard_sizes, settings.global_seed)
    batch = GlobalBatch(size, accelerator.num_processes, accelerator.process_index, settings.grad_accum)

    def loader(start: int):
        return training_loader(source, order, batch, start_step=start, num_workers=settings.data.num_workers)

    optim = settings.optim

    def optimizer(placed: torch.nn.Module):
        return build_optimizer(
            optim.name, placed, lr=optim.lr, betas=optim.betas, weight_decay=optim.wd, eps=optim.eps,
            exclude_tagged=optim.exclude_tagged_from_decay,
        )  # fmt: skip

    trainer = Trainer(
        model=model,
        process=_make("process", settings.process),
        codec=_make("codec", settings.codec),
        loader_factory=loader,
        optimizer=optimizer,
        options=TrainOptions(
            train_steps=settings.data.train_steps,
            batch_size=settings.data.batch_size,
            run_dir=Path(settings.run_dir),
            grad_accum=settings.grad_accum,
            max_grad_norm=settings.max_grad_norm,
            log_every=settings.log_every,
            ckpt_every=settings.ckpt_every,
            keep_last=settings.loop.keep_last,
            seed=settings.global_seed,
            mixed_precision=settings.mixed_precision,
            ema=_ema_profiles(settings),
            resume=settings.resume,
            compile=settings.loop.compile,
            checkpoint_policy=settings.loop.checkpoint_policy,
            progress=settings.loop.progress,
        ),
        schedule=Schedule(optim.schedule, warmup=optim.warmup_steps, total=settings.data.train_steps),
        config=plain,
        epoch_size=len(source),
        accelerator=accelerator,
        plugins=plugin_names,
    )
    trainer.fit()
    run_dir = Path(settings.run_dir)
    if accelerator.is_main_process:
        curve = run_dir / "loss.png"
        rows = [(r["step"], r["images_seen"], r["loss"]) for r in read_metrics(run_dir / "metrics.jsonl")]
        save_loss_curve(curve, rows)
        log.info("trained: %s, loss curve %s", run_dir, curve)
    return run_dir


def _start_from(ckpt: str, model: torch.nn.Module) -> None:
    """Weights only: a run that starts from a checkpoint is a new run, with its own optimizer and step 0."""
    if Path(ckpt).suffix in OFFICIAL_SUFFIXES:
        load_model_state(model, read_official(ckpt, "zigma").state_dict)
    else:
        load_weights(model, checkpoints.open_checkpoint(ckpt))
    log.info("starting from the weights of %s", ckpt)


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
        arguments = {k: v for k, v in model_arguments(settings).items() if k != "_target_"}
        model = load_official("zigma", arguments, file.state_dict)
        return _Trained(settings, model, "official", file.step, Path("samples") / Path(ckpt).stem)
    stored = checkpoints.open_checkpoint(ckpt)
    settings = Settings.from_mapping(complete_from_checkpoint(given, stored.config, ckpt))
    model = build_model(settings)
    weights = load_weights(model, stored, wanted)
    path = Path(stored.path)
    root = path.parent.parent if path.parent.name == "checkpoints" else path
    return _Trained(settings, model, weights, stored.step, root / "samples")


def _sampling_facts(trained: _Trained, ckpt: str) -> tuple[str, dict[str, Any]]:
    """The folder's name, and what the samples follow from."""
    settings = trained.settings
    chosen = settings.sde if settings.sample_mode == "SDE" else settings.ode
    solver = chosen.sampling_method.replace("/", "-")
    step = "" if trained.step is None else f"_{trained.step}"
    name = (
        f"{trained.weights}{step}_{settings.sample_mode}_{solver}_{chosen.num_steps}"
        f"_w{settings.cfg_scale:g}_seed{settings.global_seed}"
    )
    return name, {
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


def sample_from_config(cfg: DictConfig) -> Path:
    """Sample and judge as configured; returns the folder of samples."""
    given = OmegaConf.to_container(cfg, resolve=True)
    ckpt, wanted = given.get("ckpt"), given.pop("weights", None)
    batch_size = given.pop("offline_sample_local_bs")
    if ckpt is None:
        raise SettingsError("ckpt is missing: give ckpt=RUN_DIR, a checkpoint in it, or an official .pt file")
    plugins.load_plugins()
    trained = _open_trained(given, str(ckpt), wanted)
    settings = trained.settings
    if settings.loop.threads is not None:
        torch.set_num_threads(settings.loop.threads)
    accelerator = make_accelerator(settings.mixed_precision, cpu=settings.loop.device == "cpu")
    model = trained.model.to(accelerator.device).eval()
    process, sampler = _make("process", settings.process), build_sampler(settings)
    name, facts = _sampling_facts(trained, str(ckpt))
    folder = Path(settings.sample_dir) if settings.sample_dir else trained.folder / name
    if settings.likelihood:
        return _likelihood(settings, model, process, sampler, folder, facts, batch_size, accelerator.device)

    codec = _make("codec", settings.codec)
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
        batch_size=min(batch_size, count),
        seed=settings.global_seed,
        folder=folder,
        num_classes=max(model.num_classes, 0),
        guide=lambda m: Guided(m, settings.cfg_scale, interval=settings.cfg_interval),
        identity={k: v for k, v in facts.items() if k != "ckpt"},
        device=accelerator.device,
        ranks=Ranks(accelerator.device if accelerator.device.type == "cuda" else "cpu"),
        mixed_precision=settings.mixed_precision or "no",
        progress=settings.loop.progress,
    )
    result = run.run()
    # Rows of ten for a model without classes.
    rows = result.labels if result.labels is not None else result.ids[:100] // 10
    grid = save_sample_grid(folder / "grid.png", result.images[: len(rows)], rows)
    metrics, protocol = _judge(settings, result)
    facts |= {
        "weights_sha256": result.identity["weights"],
        "function_evaluations": result.function_evaluations,
    }
    results = write_results(
        folder / "results.json", metrics, {**_protocol(settings, facts, result.ids), **protocol}
    )
    log.info("sampled %d images: %s, grid %s, results %s", len(result.ids), folder, grid, results)
    return folder


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
    metric = _make("metrics", node)
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


def _likelihood(settings, model, process, sampler, folder, facts, batch_size, device) -> Path:
    """Bits per dimension of held-out data under the model's ODE.

    Pixels are 256 grey levels: each value is spread evenly over its level (uniform dequantization, Theis et
    al. 2016), which makes the result an upper bound for the discrete data. Latents have no levels; theirs is a
    density.
    """
    source = build_source(settings, "heldout") or build_source(settings)
    if source is None:
        raise SettingsError(f"likelihood=true needs data to measure, data={settings.data.name} has none")
    if settings.sample_mode != "ODE":
        raise SettingsError("likelihood=true needs the ODE: set sample_mode=ODE")
    count = min(settings.num_fid_samples, len(source))
    codec = _make("codec", settings.codec)
    level = 2 / 255 if isinstance(codec, IdentityCodec) and not settings.is_latent else None
    bits, ids = [], []
    for batch in evaluation_loader(source, batch_size, num_samples=count):
        batch = batch.to(device)
        draws = KeyedDraws(settings.global_seed, batch.ids)
        x1 = codec.encode(batch)
        if level is not None:
            x1 = x1 + codec.scale * level * (
                draws.uniform("likelihood.dequantize", tuple(x1.shape[1:])) - 0.5
            )
        width = 1.0 if level is None else codec.scale * level
        found = sampler.log_likelihood(process, model, x1, batch.labels, draws=draws, bin_width=width)
        bits.append(found.bits_per_dim.cpu())
        ids.append(batch.ids.cpu())
    values = torch.cat(bits).double()
    metrics = {"bits_per_dim": float(values.mean()), "bits_per_dim_std": float(values.std(correction=0))}
    kind = {
        "dequantization": None if level is None else "uniform over 256 levels",
        "trace": "one Hutchinson probe",
    }
    facts = {**facts, **kind, "weights_sha256": weights_hash(model)}
    results = write_results(folder / "likelihood.json", metrics, _protocol(settings, facts, torch.cat(ids)))
    log.info("bits per dimension %.4f over %d samples: %s", metrics["bits_per_dim"], len(values), results)
    return folder
