"""What ``train_acc.py`` does: check a configuration, join the processes, load data and model, train."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from zigflow import plugin_files, plugins
from zigflow.build import build_model, build_runtime, make_optimizer
from zigflow.chosen import build_process
from zigflow.data.contents import contents_of
from zigflow.data.loader import training_loader
from zigflow.data.mixing import tell_sorted_shards
from zigflow.data.order import DataOrder
from zigflow.data.streaming import StreamSource, check_readers, streaming_loader
from zigflow.data.tar import ShardError
from zigflow.engine import checkpoint as checkpoints
from zigflow.engine import signals
from zigflow.engine.elastic import global_batch_for, shards_at_once_for
from zigflow.engine.ema import EmaProfile
from zigflow.engine.launch import check_same
from zigflow.engine.log import read_metrics
from zigflow.engine.optim import Schedule
from zigflow.engine.options import TrainingData, TrainOptions
from zigflow.engine.run_state import Counters, RunRecord
from zigflow.engine.runtime import Runtime
from zigflow.engine.skips import SkipBudget
from zigflow.engine.start import Start
from zigflow.engine.trainer import Hook, Trainer
from zigflow.evaluation_job import build_monitoring
from zigflow.metrics.pictures import save_loss_curve
from zigflow.nodes import make
from zigflow.preflight import check_training, scaled_codec
from zigflow.real_sets import check_evaluation
from zigflow.settings import Settings, SettingsError
from zigflow.sources import as_continued, build_source, build_stream, check_fit, check_shape, settled
from zigflow.stored_config import fix_roots, start_from

log = logging.getLogger(__name__)


@dataclass
class _Job:
    """A configuration that was checked as far as it can be before a device is touched.

    Attributes:
        settings: of ``plain``; both get what follows from the data when they are read.
        stored: the configuration of the checkpoint that the run continues, if there is one.
        roots: where the data lies, for the checkpoint.
        plugins: names of those that loaded.
        files: plug-ins that are files of one's own, with their digests.
        given: the configuration as text, to compare between processes.
        counts_classes: the model has as many classes as the data.
    """

    settings: Settings
    plain: dict[str, Any]
    stored: Mapping[str, Any] | None
    roots: Mapping[str, Any]
    plugins: tuple[str, ...]
    files: list[dict[str, str]]
    given: str
    counts_classes: bool


def train_from_config(cfg: DictConfig) -> Path:
    """Train as configured; returns the run directory.

    Raises:
        SettingsError: it cannot run, in one line.
        Stopped: a signal ended it before its last step; it is saved.
    """
    job = _checked(cfg)
    runtime = _joined(job)
    codec = make("codec", job.settings.codec)
    source = _read_data(job, codec)
    settings = job.settings
    model = build_model(settings)
    _check_together(settings, model, source, codec)
    data = _training_data(settings, source, runtime)
    start = _start(job, model, runtime)
    trainer = Trainer(
        model=model,
        process=build_process(settings),
        codec=codec,
        data=data,
        optimizer=lambda placed: make_optimizer(settings, placed),
        options=_options(settings),
        runtime=runtime,
        record=RunRecord(job.plain, job.plugins, {"roots": job.roots, "plugin_files": job.files}),
        monitoring=build_monitoring(settings, model, runtime, _hooks(settings, source)),
        start=start,
    )
    return _finished(trainer, trainer.fit())


def _checked(cfg: DictConfig) -> _Job:
    # As it was given: machines may keep their data in different places.
    given: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    typed = OmegaConf.to_container(cfg.model, resolve=False)
    plain = plugins.plain(cfg)
    # The checkpoint is sampled and judged from other working directories, and may be moved with its data.
    roots = fix_roots(plain)
    names = plugins.load_plugins()
    files = plugin_files.use(plain)
    stored = _continued(plain)
    plain = as_continued(plain, stored)
    check_training(plugins.checked(plain))
    # Stated in the checkpoint, wherever the autoencoder may lie later.
    plain["codec"] = scaled_codec(plain["codec"])
    settings = Settings.from_mapping(plain)
    check_evaluation(settings)
    return _Job(
        settings, plain, stored, roots, tuple(names), files,
        given=json.dumps({**given, "run_dir": None}, sort_keys=True, default=str),
        counts_classes="${data.num_classes}" in str(typed.get("num_classes")),  # type: ignore[union-attr]
    )  # fmt: skip


def _continued(plain: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The configuration of the checkpoint that a run in this directory will continue from."""
    if plain.get("resume") == "never" or not plain.get("run_dir"):
        return None
    latest = checkpoints.find_latest(Path(str(plain["run_dir"])) / "checkpoints")
    return None if latest is None else latest.config


def _joined(job: _Job) -> Runtime:
    """The processes of the run; all of them were given the same."""
    runtime = build_runtime(job.settings)
    ranks = runtime.ranks
    if ranks.size > 1:
        # The processes have met: one that left by itself would leave the others waiting.
        signals.stop.wait()
    check_same(
        ranks,
        "run_dir",
        str(Path(job.settings.run_dir).resolve()),
        "give run_dir=FOLDER, or export RUN_ID=NAME",
    )
    check_same(ranks, "configuration", job.given, "give each of them the same arguments")
    contents = " ".join(file["sha256"] for file in job.files)
    check_same(ranks, "plug-in files", contents, "give each of them the same files")
    return runtime


def _read_data(job: _Job, codec: Any) -> Any:
    """What is trained on; the job's configuration gets what follows from it."""
    settings = job.settings
    node = settings.data.source
    streams = settings.data.order == "streaming"
    source = build_stream(settings, node) if streams and node else build_source(settings)
    if source is None:
        raise SettingsError(f"data={settings.data.name} has no source to train on: choose another data=NAME")
    job.plain = settled(job.plain, source, codec, job.stored, job.counts_classes)
    classes = job.plain["data"]["num_classes"]
    if hasattr(source, "limit_classes") and not source.num_classes and classes > 0:
        source.limit_classes(classes)
    job.settings = Settings.from_mapping(job.plain)
    check_training(job.settings)
    return source


def _check_together(settings: Settings, model: torch.nn.Module, source: Any, codec: Any) -> None:
    check_fit(settings, model, source, codec)
    _check_heldout(settings, model, codec)


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


def _training_data(settings: Settings, source: Any, runtime: Runtime) -> TrainingData:
    """Batches of the source in the order that the seed gives, or the order that the run began with.

    Raises:
        SettingsError: too few samples or shards for the processes and their batches.
    """
    ranks, seed, workers = runtime.ranks, settings.global_seed, settings.data.num_workers
    try:
        batch = global_batch_for(Path(settings.run_dir), settings.data.batch_size, settings.grad_accum, ranks)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    facts = contents_of(source).identity()
    if isinstance(source, StreamSource):
        try:
            check_readers(source, ranks.size, workers)
        except ValueError as error:
            raise SettingsError(f"data={settings.data.name}: {error}") from error
        return TrainingData(
            lambda start: streaming_loader(source, batch, seed, start_step=start, num_workers=workers),
            batch,
            identity={**facts, "order": source.identity(seed)},
        )
    if len(source) < batch.size:
        raise SettingsError(
            f"data={settings.data.name} has {len(source)} samples, fewer than one global batch of "
            f"{batch.size}: lower data.batch_size or grad_accum"
        )
    order = _order(settings, source)
    return TrainingData(
        lambda start: training_loader(
            source, order, batch, start_step=start, num_workers=workers,
            max_skipped=settings.data.max_skipped, caption_seed=seed,
        ),
        batch,
        epoch_size=len(source),
        identity={**facts, "order": order.identity()},
    )  # fmt: skip


def _order(settings: Settings, source: Any) -> DataOrder:
    """The order of an indexed source: as configured, or as the run that continues began; sorted sets are told of.

    Raises:
        SettingsError: ``data.shards_at_once`` is not what the run began with.
    """
    asked, shards = settings.data.shards_at_once, len(source.shard_sizes)
    try:
        at_once = shards_at_once_for(Path(settings.run_dir), asked, shards)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    order = DataOrder(source.shard_sizes, settings.global_seed, shards_at_once=at_once)
    with suppress(ShardError):  # A damaged label is told, or passed over, when its sample is read.
        tell_sorted_shards(source, order.shards_at_once, f"data={settings.data.name}")
    return order


def _start(job: _Job, model: torch.nn.Module, runtime: Runtime) -> Start | None:
    """The weights of ``ckpt=``, put into the model; a run that continues has weights of its own."""
    settings = job.settings
    if settings.ckpt is None or checkpoints.list_complete(Path(settings.run_dir) / "checkpoints"):
        return None
    return start_from(settings, model, job.plain, write=runtime.ranks.is_main)


def _options(settings: Settings) -> TrainOptions:
    optim = settings.optim
    return TrainOptions(
        train_steps=settings.data.train_steps,
        run_dir=Path(settings.run_dir),
        max_grad_norm=settings.max_grad_norm,
        log_every=settings.log_every,
        ckpt_every=settings.ckpt_every,
        keep_last=settings.loop.keep_last,
        seed=settings.global_seed,
        schedule=Schedule(
            optim.schedule, optim.warmup_steps, settings.data.train_steps, final=optim.min_lr / optim.lr
        ),
        mixed_precision=settings.mixed_precision,
        ema=_ema_profiles(settings),
        resume=settings.resume,
        compile=settings.loop.compile,
        checkpoint_policy=settings.loop.checkpoint_policy,
        shard=settings.loop.shard,
        progress=settings.loop.progress,
        random_flip=settings.data.random_flip,
    )


def _ema_profiles(settings: Settings) -> tuple[EmaProfile, ...]:
    if settings.ema_rate is not None:
        return (EmaProfile("rate", rate=settings.ema_rate),)
    return tuple(
        EmaProfile(f"half_life_{h}", half_life=h, ramp=settings.loop.ema_ramp)
        for h in settings.loop.ema_half_life
    )


def _hooks(settings: Settings, source: Any) -> tuple[Hook, ...]:
    """Those that belong to the data."""
    # A stream passes over what it cannot read by itself.
    skips = settings.data.max_skipped or isinstance(source, StreamSource)
    return (SkipBudget(settings.data.max_skipped),) if skips else ()


def _finished(trainer: Trainer, counters: Counters) -> Path:
    """The run directory with its loss curve.

    Raises:
        Stopped: the run was stopped before its last step.
    """
    run_dir = trainer.options.run_dir
    if trainer.stopped_by is not None:
        done = f"after step {counters.step}, which is saved" if counters.step else "before the first step"
        raise signals.Stopped(
            f"stopped by {trainer.stopped_by} {done}; the same command with run_dir={run_dir} continues"
        )
    if trainer.ranks.is_main:
        curve = run_dir / "loss.png"
        lines = read_metrics(run_dir / "metrics.jsonl")
        rows = [(r["step"], r["images_seen"], r["loss"]) for r in lines if "loss" in r]
        save_loss_curve(curve, rows)
        log.info("trained: %s, loss curve %s", run_dir, curve)
    return run_dir
