"""The one place where a configuration becomes objects; everything below it takes plain arguments."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from zigflow import plugin_files, plugins
from zigflow.chosen import build_process, check_optimizer
from zigflow.data.contents import contents_of
from zigflow.data.global_batch import GlobalBatch
from zigflow.data.loader import training_loader
from zigflow.data.skipped import SkippedSamples
from zigflow.data.streaming import StreamSource, check_readers, streaming_loader
from zigflow.engine import checkpoint as checkpoints
from zigflow.engine import signals
from zigflow.engine.elastic import Split, split_for
from zigflow.engine.ema import EmaProfile
from zigflow.engine.launch import check_same, launched_precision, make_accelerator
from zigflow.engine.log import read_metrics
from zigflow.engine.optim import Schedule, build_optimizer
from zigflow.engine.options import TrainOptions
from zigflow.engine.ranks import Ranks
from zigflow.engine.skips import SkipBudget
from zigflow.engine.trackers import Trackers
from zigflow.engine.trainer import Trainer
from zigflow.metrics.pictures import save_loss_curve
from zigflow.nn import check_denoiser
from zigflow.nodes import make
from zigflow.preflight import check_training, scaled_codec
from zigflow.real_sets import check_evaluation
from zigflow.settings import Settings, SettingsError
from zigflow.sources import (
    as_continued,
    build_source,
    build_stream,
    check_fit,
    check_shape,
    settled,
    without_classes,
)
from zigflow.start_job import build_order, start_from
from zigflow.stored_config import fix_roots

log = logging.getLogger(__name__)


def model_arguments(settings: Settings) -> dict[str, Any]:
    """The model's node with the choice of ``scan=`` in it, without the label ``name``.

    Raises:
        SettingsError: a scan for a model that walks along none.
    """
    node = {k: v for k, v in settings.model.items() if k != "name"}
    _known_before_data(settings, node)
    without_classes(node)
    scan = settings.scan.get("name", "from_model")
    if scan != "from_model":
        if not _takes_scan(str(node["_target_"])):
            raise SettingsError(
                f"scan={scan}: model={settings.model.get('name')} ({node['_target_']}) reads its tokens in no order of "
                "scans: drop scan=, or choose a state-space model (zigma, dis, dim)"
            )
        node["scan"] = scan
    return node


def _known_before_data(settings: Settings, node: Mapping[str, Any]) -> None:
    """Refuse to build a model whose size follows from data that is not read.

    Raises:
        SettingsError: the key to give.
    """
    follows = {
        "img_dim": "data.image_size",
        "in_channels": "data.channels",
        "num_classes": "data.num_classes",
    }
    for key, given in follows.items():
        if key in node and node[key] is None:
            raise SettingsError(
                f"model.{key} follows from data={settings.data.name}, which is not read here: give {given}=VALUE"
            )


def _takes_scan(target: str) -> bool:
    try:
        keywords = inspect.signature(get_object(target)).parameters.values()
    except Exception:
        # What is wrong with it is told where it is built.
        return True
    return any(k.name == "scan" or k.kind is k.VAR_KEYWORD for k in keywords)


def build_model(settings: Settings) -> torch.nn.Module:
    """The model with its initial weights, which follow from ``global_seed``.

    Raises:
        SettingsError: it is no model that the engine can train, see ``zigflow.nn.Denoiser``.
    """
    torch.manual_seed(settings.global_seed)
    model = make("model", model_arguments(settings))
    try:
        check_denoiser(model)
    except ValueError as error:
        raise SettingsError(f"model={settings.model.get('name')}: {error}") from error
    return model


def build_codec(settings: Settings, device: Any) -> Any:
    """The codec, its autoencoder where it has one on ``device``."""
    codec = make("codec", settings.codec)
    return codec.to(device) if hasattr(codec, "to") else codec


def make_optimizer(settings: Settings, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters of ``model``.

    Raises:
        SettingsError: a setting that it does not have, or one out of range.
    """
    optim = settings.optim
    common = {
        "lr": optim.lr,
        "weight_decay": optim.wd,
        "betas": optim.betas,
        "eps": optim.eps,
        "exclude_tagged": optim.exclude_tagged_from_decay,
    }
    try:
        return build_optimizer(check_optimizer(settings), model, common=common, **optim.args)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"optim: {error}") from error


def _ema_profiles(settings: Settings) -> tuple[EmaProfile, ...]:
    if settings.ema_rate is not None:
        return (EmaProfile("rate", rate=settings.ema_rate),)
    return tuple(
        EmaProfile(f"half_life_{h}", half_life=h, ramp=settings.loop.ema_ramp)
        for h in settings.loop.ema_half_life
    )


def _continued(plain: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of the checkpoint that a run in this directory will continue from."""
    if plain.get("resume") == "never" or not plain.get("run_dir"):
        return None
    latest = checkpoints.find_latest(Path(str(plain["run_dir"])) / "checkpoints")
    return None if latest is None else latest.config


def _training_data(
    cfg: DictConfig, settings: Settings, plain: dict[str, Any], codec: Any, stored: Mapping[str, Any] | None
) -> tuple[Any, dict[str, Any]]:
    """What is trained on, and the configuration with what follows from it."""
    node = settings.data.source
    stream = settings.data.order == "streaming" and node
    source = build_stream(settings, node) if stream else build_source(settings)
    if source is None:
        raise SettingsError(f"data={settings.data.name} has no source to train on: choose another data=NAME")
    typed = OmegaConf.to_container(cfg.model, resolve=False)
    follows = "${data.num_classes}" in str(typed.get("num_classes"))  # type: ignore[union-attr]
    plain = settled(plain, source, codec, stored, follows)
    if hasattr(source, "limit_classes") and not source.num_classes and plain["data"]["num_classes"] > 0:
        source.limit_classes(plain["data"]["num_classes"])
    return source, plain


def _check_heldout(settings: Settings, model: torch.nn.Module, codec: Any) -> None:
    """Say what the held-out set holds and refuse one that does not fit, where it is on this machine."""
    root = (settings.data.heldout or {}).get("root")
    if root is None or "://" in str(root):
        return
    if not Path(str(root)).exists():
        log.warning(
            "data.heldout.root=%s does not exist here: the held-out set is not checked, and metrics that need it can "
            "only be taken on a machine that has it", root,
        )  # fmt: skip
        return
    heldout = build_source(settings, "heldout")
    if heldout is not None:
        check_shape(settings, model, heldout, codec, "heldout")


def _split(settings: Settings, processes: int) -> Split:
    try:
        return split_for(Path(settings.run_dir), settings.data.batch_size, settings.grad_accum, processes)
    except ValueError as error:
        raise SettingsError(str(error)) from error


@dataclass(frozen=True)
class Watched:
    """What looks on while a run trains, as keywords of the trainer: trackers, evaluation, what utilization needs."""

    trackers: Trackers | None = None
    hooks: tuple[Any, ...] = ()
    training_flops: float | None = None
    peak_flops: float | None = None


def train_from_config(
    cfg: DictConfig, watch: Callable[[Settings, Any, Accelerator], Watched] | None = None
) -> Path:
    """Train as configured; returns the run directory. ``watch`` says what looks on, given model and accelerator."""
    # As it was given: machines may keep their data in different places.
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    configuration = json.dumps({**given, "run_dir": None}, sort_keys=True, default=str)
    plain = plugins.plain(cfg)
    # The checkpoint is sampled and judged from other working directories, and may be moved with its data.
    roots = fix_roots(plain)
    plugin_names = plugins.load_plugins()
    files = plugin_files.use(plain)
    stored = _continued(plain)
    plain = as_continued(plain, stored)
    check_training(plugins.checked(plain))
    # Stated in the checkpoint, wherever the autoencoder may lie later.
    plain["codec"] = scaled_codec(plain["codec"])
    settings = Settings.from_mapping(plain)
    check_evaluation(settings)
    accelerator = make_accelerator(cpu=settings.loop.device == "cpu")
    # After accelerate, which counts the threads of several CPU processes itself.
    if settings.loop.threads is not None:
        torch.set_num_threads(settings.loop.threads)
    if accelerator.num_processes > 1:
        # The processes have met: one that left by itself would leave the others waiting.
        signals.stop.wait()
    ranks = Ranks(accelerator.device if accelerator.device.type == "cuda" else "cpu")
    check_same(
        ranks, "run_dir", str(Path(settings.run_dir).resolve()), "give run_dir=FOLDER, or export RUN_ID=NAME"
    )
    check_same(ranks, "configuration", configuration, "give each of them the same arguments")
    contents = " ".join(file["sha256"] for file in files)
    check_same(ranks, "plug-in files", contents, "give each of them the same files")
    codec = make("codec", settings.codec)
    source, plain = _training_data(cfg, settings, plain, codec, stored)
    settings = Settings.from_mapping(plain)
    check_training(settings)
    model = build_model(settings)
    check_fit(settings, model, source, codec)
    _check_heldout(settings, model, codec)
    split = _split(settings, accelerator.num_processes)
    if isinstance(source, StreamSource):
        try:
            check_readers(source, accelerator.num_processes, settings.data.num_workers)
        except ValueError as error:
            raise SettingsError(f"data={settings.data.name}: {error}") from error
    elif len(source) < split.global_batch:
        raise SettingsError(
            f"data={settings.data.name} has {len(source)} samples, fewer than one global batch of "
            f"{split.global_batch}: lower data.batch_size or grad_accum"
        )
    # A run that continues has weights of its own.
    start = None
    if settings.ckpt is not None and not checkpoints.list_complete(Path(settings.run_dir) / "checkpoints"):
        start = start_from(settings, model, plain, write=accelerator.is_main_process)
    seed, workers = settings.global_seed, settings.data.num_workers
    batch = GlobalBatch(split.global_batch, split.processes, accelerator.process_index, split.grad_accum)
    skipped = SkippedSamples(settings.data.max_skipped)
    if isinstance(source, StreamSource):
        epoch_size, identity = None, source.identity(seed)

        def loader(start: int):
            batches = streaming_loader(source, batch, seed, start_step=start, num_workers=workers)
            return skipped.watch(batches)
    else:
        order = build_order(settings, source)
        epoch_size, identity = len(source), order.identity()

        def loader(start: int):
            return skipped.watch(
                training_loader(
                    source, order, batch, start_step=start, num_workers=workers,
                    max_skipped=settings.data.max_skipped, caption_seed=seed,
                )
            )  # fmt: skip

    optim = settings.optim

    watched = watch(settings, model, accelerator) if watch is not None else Watched()
    trainer = Trainer(
        model=model,
        process=build_process(settings),
        codec=codec,
        loader_factory=loader,
        optimizer=lambda placed: make_optimizer(settings, placed),
        options=TrainOptions(
            train_steps=settings.data.train_steps,
            batch_size=split.batch_size,
            run_dir=Path(settings.run_dir),
            grad_accum=split.grad_accum,
            max_grad_norm=settings.max_grad_norm,
            log_every=settings.log_every,
            ckpt_every=settings.ckpt_every,
            keep_last=settings.loop.keep_last,
            seed=settings.global_seed,
            mixed_precision=settings.mixed_precision or launched_precision(),
            ema=_ema_profiles(settings),
            resume=settings.resume,
            compile=settings.loop.compile,
            checkpoint_policy=settings.loop.checkpoint_policy,
            shard=settings.loop.shard,
            progress=settings.loop.progress,
            random_flip=settings.data.random_flip,
        ),
        schedule=Schedule(
            optim.schedule, optim.warmup_steps, settings.data.train_steps, final=optim.min_lr / optim.lr
        ),
        config=plain,
        epoch_size=epoch_size,
        data_identity={**contents_of(source).identity(), "order": identity},
        accelerator=accelerator,
        hooks=(
            *watched.hooks,
            *([SkipBudget(skipped)] if settings.data.max_skipped else []),
        ),
        plugins=plugin_names,
        facts={"roots": roots, "plugin_files": files},
        trackers=watched.trackers,
        training_flops=watched.training_flops,
        peak_flops=watched.peak_flops,
        start=start,
    )
    counters = trainer.fit()
    run_dir = Path(settings.run_dir)
    if trainer.stopped_by is not None:
        done = f"after step {counters.step}, which is saved" if counters.step else "before the first step"
        raise signals.Stopped(
            f"stopped by {trainer.stopped_by} {done}; the same command with run_dir={run_dir} continues"
        )
    if accelerator.is_main_process:
        curve = run_dir / "loss.png"
        lines = read_metrics(run_dir / "metrics.jsonl")
        rows = [(r["step"], r["images_seen"], r["loss"]) for r in lines if "loss" in r]
        save_loss_curve(curve, rows)
        log.info("trained: %s, loss curve %s", run_dir, curve)
    return run_dir
