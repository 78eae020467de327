"""The training loop.

One optimizer step: accumulate micro-batches, unscale, clip, step, EMA, learning rate, counters, log, save,
hooks. Every random draw is keyed by the sample's position, so a step depends on the data, the weights and the
seed alone: a run that is cut and resumed equals one that never stopped.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from zigflow.keyed import KeyedDraws, keyed_seed

from . import checkpoint as checkpoints
from . import exits, signals
from .batches import prepare_blocks
from .ema import EmaProfiles
from .launch import launched_precision, make_accelerator
from .log import MetricsFile, Progress
from .monitor import Monitor
from .optim import Schedule
from .options import TrainOptions
from .precision import LossScaler
from .ranks import Ranks
from .run_dir import RunDir, check_same_config
from .run_state import Counters, RunState, set_random_state
from .sharding import place
from .start import Start
from .step import OptimizerStep, StepRecord
from .trackers import Trackers

__all__ = ["Trainer"]

log = logging.getLogger(__name__)


class Trainer:
    """Trains one model in one run directory.

    Args:
        model: called as ``model(x, t, y)``; may have ``scan_state()``, ``set_checkpoint_policy(policy)`` and
            ``compile_blocks()``.
        process: has ``sample_time(u_B)`` and ``loss(model, x1, x0, t, y) -> (B,)``.
        codec: has ``encode(batch) -> x1``.
        loader_factory: ``loader_factory(k)`` yields this process's micro-batches from global batch ``k`` on,
            ``grad_accum`` of them per global batch, each of ``batch_size`` samples, without end.
        optimizer: makes the optimizer from the placed model; the model's parameters are final by then.
        options: everything that is a number or a choice.
        schedule: factor of the learning rate.
        config: the resolved configuration, plain and JSON-able; stored in every checkpoint and compared with
            the stored one on resume.
        epoch_size: samples in an epoch, recorded; a resume with another size is refused.
        data_identity: plain JSON values that tell data set and order from another (its fingerprint, the order's
            identity), recorded; a resume with other values is refused.
        accelerator: by default one made by :func:`~zigflow.engine.launch.make_accelerator`.
        hooks: called as ``hook(trainer, record)`` after every step, on every rank. One that takes long asks
            :meth:`should_stop` now and then and returns early. A hook's ``begin(trainer)``, if it has one, is called
            before the first step.
        plugins: names of the plug-ins in use, recorded.
        facts: JSON values that are recorded and compared with nothing.
        draws: ``draws(seed, ids)`` makes the keyed draws of a batch.
        trackers: where the lines of the log go besides.
        training_flops: operations of a sample's forward and backward pass; None logs no utilization.
        peak_flops: operations per second of one device; None logs no utilization.
        start: what a new run takes over beside the weights in ``model``: the averages of EMA profiles of its names.

    Attributes:
        stopped_by: the signal that ended :meth:`fit` before its last step, or None.

    Raises:
        TypeError: ``data_identity`` is not made of JSON values.
        ValueError: the model cannot do what ``options`` ask of it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        process: Any,
        codec: Any,
        loader_factory: Callable[[int], Iterable[Any]],
        optimizer: Callable[[nn.Module], Optimizer],
        options: TrainOptions,
        schedule: Schedule | None = None,
        config: Mapping[str, Any] | None = None,
        epoch_size: int | None = None,
        data_identity: Mapping[str, Any] | None = None,
        accelerator: Accelerator | None = None,
        hooks: Sequence[Callable[["Trainer", StepRecord], None]] = (),
        plugins: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
        draws: Callable[[int, Tensor], Any] = KeyedDraws,
        trackers: Trackers | None = None,
        training_flops: float | None = None,
        peak_flops: float | None = None,
        start: Start | None = None,
    ):
        self.options = options
        self.accelerator = accelerator or make_accelerator()
        self.mixed_precision = options.mixed_precision or launched_precision()
        self.device = self.accelerator.device
        self.ranks = Ranks(self.device if self.device.type == "cuda" else "cpu")
        self.model = model
        self.process = process
        self.codec = codec.to(self.device) if hasattr(codec, "to") else codec
        self.loader_factory = loader_factory
        self.schedule = schedule or Schedule()
        self.config = dict(config or {})
        self.hooks = tuple(hooks)
        self.counters = Counters()
        self.global_batch = options.batch_size * options.grad_accum * self.ranks.size
        self._plugins = list(plugins)
        self._facts = dict(facts or {})
        self._epoch_size = epoch_size
        # As JSON gives it back: what is compared on resume has been through a file.
        self._data_identity = json.loads(json.dumps(data_identity))
        self._stop = False
        self.stopped_by: str | None = None

        prepare_blocks(model, options.checkpoint_policy, options.compile)
        wrapped, no_sync = place(model, self.accelerator, sharded=options.shard)
        self.optimizer = optimizer(model)
        self.ema = EmaProfiles(model, options.ema)
        for name in self.ema.names() if start is not None else ():
            if name in start.averages:
                self.ema.load_state_dict(name, start.averages[name])
                self.counters.ema_images = start.images
        self.scaler = LossScaler(self.mixed_precision == "fp16", max_skips=options.max_skips)
        self._step = OptimizerStep(
            model=model, wrapped=wrapped, no_sync=no_sync, process=process, codec=self.codec,
            optimizer=self.optimizer, schedule=self.schedule, ema=self.ema, scaler=self.scaler, counters=self.counters,
            options=options, mixed_precision=self.mixed_precision, ranks=self.ranks, device=self.device, draws=draws,
        )  # fmt: skip
        self._saved_step: int | None = None
        self._run_dir: RunDir | None = None
        self.trackers = Trackers() if trackers is None else trackers
        interval = process.interval("train") if hasattr(process, "interval") else (0.0, 1.0)
        self.monitor = Monitor(
            self.counters, self.ranks, interval=interval, training_flops=training_flops, peak_flops=peak_flops,
            device=self.device,
        )  # fmt: skip

    def request_stop(self) -> None:
        """Ask the run to save and return after the step in progress; safe in a signal handler."""
        self._stop = True

    def should_stop(self) -> bool:
        """Whether any process was asked to stop, by a signal or :meth:`request_stop`.

        Collective: all ranks call it at the same point. A hook that takes long calls it between its batches and
        returns early, without a result.
        """
        signal = signals.stop.received
        asked, signalled = self.ranks.sum([float(self._stop), float(signal is not None)])
        if signalled:
            self.stopped_by = signal or "a signal to another process"
        return asked + signalled > 0

    def save_now(self) -> None:
        """Save the step that the run is at, for a hook before something long; every rank calls it."""
        if self._run_dir is not None and self.counters.step:
            self.save(self._run_dir)

    def fit(self) -> Counters:
        """Train until ``options.train_steps``, from the newest checkpoint when there is one.

        Returns:
            The final counters; the last step is saved, also when the run was asked to stop before its end.

        Raises:
            RunDirError: the directory is in use, or belongs to another model.
            CheckpointError: the newest checkpoint is damaged or means other data.
            NonFiniteError: naming the step and the samples; the last checkpoint stays as it is.
            TooManyOverflowsError: fp16 cannot go on.
            RuntimeError: the data ended.
        """
        signals.stop.wait()
        run_dir = RunDir(self.options.run_dir, resume=self.options.resume)
        with self.ranks.together("opening the run directory"):
            if self.ranks.is_main:
                run_dir.__enter__()
        try:
            exits.note.claim(run_dir.path, self.ranks.rank)
            return self._fit(run_dir)
        finally:
            self.trackers.finish()
            run_dir.__exit__()

    def _fit(self, run_dir: RunDir) -> Counters:
        options, counters = self.options, self.counters
        self._run_dir = run_dir
        with self.ranks.together("resuming"):
            found = run_dir.latest(verify=self.ranks.is_main)
            if found is not None:
                check_same_config(self.config, found.config)
                self._state(run_dir).restore(found)
                self._saved_step = exits.note.step = counters.step
                log.info("continuing %s from step %d", run_dir.path, counters.step)
                if counters.step >= options.train_steps:
                    log.warning(
                        "all %d steps asked for were taken before: none is added", options.train_steps
                    )
        metrics = MetricsFile(run_dir.metrics)
        if self.ranks.is_main:
            metrics.rewind(counters.step)
            self.trackers.start(run_dir.path, run_dir.run_id, self.config, counters.step, counters.tracking)
        log.info(
            "global batch %d = %d samples x %d micro-batches x %d processes",
            self.global_batch, options.batch_size, options.grad_accum, self.ranks.size,
        )  # fmt: skip
        for profile in options.ema:
            reach = profile.ramp * options.train_steps * self.global_batch
            if profile.half_life is not None and 0 < reach < profile.half_life:
                log.info(
                    "EMA profile %s: half-life %g images at the end, a share of %g of those seen, not %g",
                    profile.name, reach, profile.ramp, profile.half_life,
                )  # fmt: skip
        data = iter(self.loader_factory(counters.batches))
        # After the iterator exists: a DataLoader takes a number from torch's generator when it starts.
        self._restore_generators(found)
        progress = Progress(
            options.train_steps, counters.step, options.progress if self.ranks.is_main else False
        )
        self.model.train()
        try:
            for hook in self.hooks:
                getattr(hook, "begin", lambda trainer: None)(self)
            self.monitor.start()
            while counters.step < options.train_steps and not self.should_stop():
                record = self._step(self._batches(data))
                signals.stop.hold()
                exits.note.step = counters.step
                if record is not None:
                    self._after_step(record, run_dir, metrics, progress)
        finally:
            progress.close()
            if hasattr(data, "close"):
                data.close()
        if counters.step < options.train_steps:
            log.info("stopping after step %d as asked", counters.step)
        elif not any(getattr(hook, "pending", lambda trainer: False)(self) for hook in self.hooks):
            self.stopped_by = None
        if counters.step:
            self.save(run_dir)
        return counters

    def _restore_generators(self, found: checkpoints.Checkpoint | None) -> None:
        name = f"rank_{self.ranks.rank:04d}"
        if found is not None and found.has(f"{name}.safetensors"):
            set_random_state(found.tensors(name), self.device)
            return
        if found is not None:
            log.warning("%s has no generator state of process %d", found.path, self.ranks.rank)
        torch.manual_seed(keyed_seed(self.options.seed, "torch", self.ranks.rank, self.counters.step))

    def _after_step(
        self, record: StepRecord, run_dir: RunDir, metrics: MetricsFile, progress: Progress
    ) -> None:
        monitor = self.monitor
        monitor.observe(record)
        progress.advance(f"loss {record.loss:.4f}, {monitor.images_per_second:.0f} images/s")
        if record.step == 1 or record.step % self.options.log_every == 0:
            values = monitor.line(record)
            if self.ranks.is_main:
                metrics.write(values)
                self.trackers.log(values, record.step, "train/")
        started = time.perf_counter()
        for hook in self.hooks:
            hook(self, record)
        if record.step % self.options.ckpt_every == 0:
            self.save(run_dir)
        monitor.paused(time.perf_counter() - started)

    def _batches(self, data: Iterator[Any]) -> Iterator[Any]:
        """The data's micro-batches, checked, the wait for them counted."""
        while True:
            started = time.perf_counter()
            batch = next(data, None)
            self.monitor.waited(time.perf_counter() - started)
            if batch is None:
                raise RuntimeError(
                    f"the data ended after step {self.counters.step}; a loader must yield without end"
                )
            if len(batch.ids) != self.options.batch_size:
                raise RuntimeError(
                    f"a micro-batch of {len(batch.ids)} samples came after step {self.counters.step}, "
                    f"batch_size is {self.options.batch_size}; the loader must drop or fill partial batches"
                )
            yield batch

    def _state(self, run_dir: RunDir) -> RunState:
        facts = {
            **self._facts,
            "run_id": run_dir.run_id,
            "plugins": self._plugins,
            "mixed_precision": self.mixed_precision,
            "world_size": self.ranks.size,
            "schedule": asdict(self.schedule),
        }
        data = {
            "seed": self.options.seed,
            "global_batch": self.global_batch,
            "epoch_size": self._epoch_size,
            "identity": self._data_identity,
        }
        return RunState(
            self.model, self.optimizer, self.ema, self.scaler, self.counters, data, facts, self.config, self.device
        )  # fmt: skip

    def save(self, run_dir: RunDir) -> None:
        """Write a checkpoint of this step, unless it is there, and delete surplus ones; all ranks together."""
        step = self.counters.step
        if step == self._saved_step:
            return
        self.monitor.flush()
        self.counters.tracking = self.trackers.states() or self.counters.tracking
        state = self._state(run_dir)
        path = checkpoints.save(
            run_dir.checkpoints,
            step,
            shared=state.shared_files(),
            own=state.own_files(self.ranks.rank),
            ranks=self.ranks,
        )
        self._saved_step = step
        log.info("saved %s", path)
        with self.ranks.together("deleting old checkpoints"):
            if self.ranks.is_main:
                keep = set(self.counters.keep)
                if self.counters.best is not None:
                    keep.add(self.counters.best["step"])
                checkpoints.prune(run_dir.checkpoints, self.options.keep_last, keep)
