"""The training loop.

One optimizer step: accumulate micro-batches, unscale, clip, step, EMA, learning rate, counters, log, save,
hooks. Every random draw is keyed by the sample's position, so a step depends on the data, the weights and the
seed alone: a run that is cut and resumed equals one that never stopped.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zigflow.keyed import keyed_seed

from . import checkpoint as checkpoints
from . import exits, signals
from .ema import EmaProfiles
from .launch import chosen_precision, make_accelerator
from .log import MetricsFile, Progress
from .monitor import Monitor
from .options import TrainingData, TrainOptions
from .precision import LossScaler
from .run_dir import RunDir, check_same_config
from .run_state import Counters, RunRecord, RunState, set_random_state
from .runtime import Runtime
from .sharding import place, prepare_blocks
from .start import Start
from .step import OptimizerStep, StepRecord
from .trackers import Trackers

__all__ = ["Hook", "Monitoring", "Trainer"]

log = logging.getLogger(__name__)


class Hook:
    """A callback of the trainer; subclasses override what they need. Every process calls every method."""

    def begin(self, trainer: "Trainer") -> None:
        """Before the first step of this launch."""

    def after_step(self, trainer: "Trainer", record: StepRecord) -> None:
        """After every step. What takes long asks ``trainer.should_stop()`` now and then and returns early."""

    def pending(self, trainer: "Trainer") -> bool:
        """Whether work for the step that the run is at was left undone, because the run was asked to stop."""
        return False


@dataclass(frozen=True)
class Monitoring:
    """What accompanies a run.

    Attributes:
        hooks: called in this order.
        trackers: where the lines of the log go besides.
        training_flops: operations of a sample's forward and backward pass; None logs no utilization.
        peak_flops: operations per second of one device; None logs no utilization.
    """

    hooks: tuple[Hook, ...] = ()
    trackers: Trackers = field(default_factory=Trackers)
    training_flops: float | None = None
    peak_flops: float | None = None


class Trainer:
    """Trains one model in one run directory.

    Args:
        model: called as ``model(x, t, y)``; may have ``scan_state()``, ``set_checkpoint_policy(policy)`` and
            ``compile_blocks()``.
        process: has ``sample_time(u_B)`` and ``loss(model, x1, x0, t, y) -> (B,)``.
        codec: has ``encode(batch) -> x1``.
        data: what is trained on.
        optimizer: makes the optimizer from the placed model; the model's parameters are final by then.
        options: everything that is a number or a choice.
        runtime: by default of :func:`~zigflow.engine.launch.make_accelerator`.
        record: what its checkpoints say of the run besides.
        monitoring: hooks, trackers, utilization.
        start: what a new run takes over beside the weights in ``model``: the averages of EMA profiles of its names.

    Attributes:
        stopped_by: the signal that ended :meth:`fit` before its last step, or None.

    Raises:
        TypeError: the data's identity is not made of JSON values.
        ValueError: the model cannot do what ``options`` ask of it.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        process: Any,
        codec: Any,
        data: TrainingData,
        optimizer: Callable[[nn.Module], Optimizer],
        options: TrainOptions,
        runtime: Runtime | None = None,
        record: RunRecord | None = None,
        monitoring: Monitoring | None = None,
        start: Start | None = None,
    ):
        # From here on the precision is the one that the network runs in.
        options = replace(options, mixed_precision=chosen_precision(options.mixed_precision))
        self.options = options
        self.runtime = runtime or Runtime.of(make_accelerator())
        self.ranks, self.device = self.runtime.ranks, self.runtime.device
        self.model, self.process = model, process
        self.codec = codec.to(self.device) if hasattr(codec, "to") else codec
        self.data = data
        self.record = record or RunRecord()
        self.monitoring = monitoring or Monitoring()
        self.trackers = self.monitoring.trackers
        self.counters = Counters()
        # As JSON gives it back: what is compared on resume has been through a file.
        self._data_identity = json.loads(json.dumps(data.identity))
        self._stop = False
        self.stopped_by: str | None = None

        prepare_blocks(model, options.checkpoint_policy, options.compile)
        placed = place(model, self.runtime, sharded=options.shard)
        self.optimizer = optimizer(model)
        self.ema = EmaProfiles(model, options.ema)
        if start is not None:
            for name in set(self.ema.names()) & set(start.averages):
                self.ema.load_state_dict(name, start.averages[name])
                self.counters.ema_images = start.images
        self.scaler = LossScaler(options.mixed_precision == "fp16", max_skips=options.max_skips)
        self._step = OptimizerStep(
            placed=placed, process=process, codec=self.codec, data=data, optimizer=self.optimizer, ema=self.ema,
            scaler=self.scaler, counters=self.counters, options=options, runtime=self.runtime,
        )  # fmt: skip
        self._saved_step: int | None = None
        self._run_dir: RunDir | None = None
        interval = process.interval("train") if hasattr(process, "interval") else (0.0, 1.0)
        self.monitor = Monitor(
            self.counters, self.ranks, interval=interval, training_flops=self.monitoring.training_flops,
            peak_flops=self.monitoring.peak_flops, device=self.device,
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
        with ExitStack() as held:
            with self.ranks.together("opening the run directory"):
                if self.ranks.is_main:
                    held.enter_context(run_dir)
            held.callback(self.trackers.finish)
            exits.note.claim(run_dir.path, self.ranks.rank)
            return self._fit(run_dir)

    def _fit(self, run_dir: RunDir) -> Counters:
        options, counters = self.options, self.counters
        self._run_dir = run_dir
        with self.ranks.together("resuming"):
            found = run_dir.latest(verify=self.ranks.is_main)
            if found is not None:
                check_same_config(self.record.config, found.config)
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
            config = self.record.config
            self.trackers.start(run_dir.path, run_dir.run_id, config, counters.step, counters.tracking)
        batch = self.data.batch
        log.info(
            "global batch %d = %d samples x %d micro-batches x %d processes",
            batch.size, batch.local_size, batch.grad_accum, batch.world_size,
        )  # fmt: skip
        for profile in options.ema:
            reach = profile.ramp * options.train_steps * batch.size
            if profile.half_life is not None and 0 < reach < profile.half_life:
                log.info(
                    "EMA profile %s: half-life %g images at the end, a share of %g of those seen, not %g",
                    profile.name, reach, profile.ramp, profile.half_life,
                )  # fmt: skip
        data = iter(self.data.loader(counters.batches))
        # After the iterator exists: a DataLoader takes a number from torch's generator when it starts.
        self._restore_generators(found)
        progress = Progress(
            options.train_steps, counters.step, options.progress if self.ranks.is_main else False
        )
        self.model.train()
        try:
            for hook in self.monitoring.hooks:
                hook.begin(self)
            self.monitor.start()
            while counters.step < options.train_steps and not self.should_stop():
                record = self._step(self._batches(data))
                signals.stop.hold()
                exits.note.step = counters.step
                if record is not None:
                    self._after_step(record, run_dir, metrics, progress)
        finally:
            progress.close()
            close: Callable[[], None] | None = getattr(data, "close", None)
            if close is not None:
                close()
        if counters.step < options.train_steps:
            log.info("stopping after step %d as asked", counters.step)
        elif not any(hook.pending(self) for hook in self.monitoring.hooks):
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
        for hook in self.monitoring.hooks:
            hook.after_step(self, record)
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
            if len(batch.ids) != self.data.batch.local_size:
                raise RuntimeError(
                    f"a micro-batch of {len(batch.ids)} samples came after step {self.counters.step}, "
                    f"batch_size is {self.data.batch.local_size}; the loader must drop or fill partial batches"
                )
            yield batch

    def _state(self, run_dir: RunDir) -> RunState:
        facts = {
            **self.record.facts,
            "run_id": run_dir.run_id,
            "plugins": list(self.record.plugins),
            "mixed_precision": self.options.mixed_precision,
            "world_size": self.ranks.size,
            "schedule": asdict(self.options.schedule),
        }
        data = {
            "seed": self.options.seed,
            "global_batch": self.data.batch.size,
            "epoch_size": self.data.epoch_size,
            "identity": self._data_identity,
        }
        return RunState(
            self.model, self.optimizer, self.ema, self.scaler, self.counters, data, facts, self.record.config,
            self.device,
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
