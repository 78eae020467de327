"""Evaluation between two training steps, which training does not notice."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zigflow.metrics.pictures import save_sample_grid
from zigflow.metrics.results import write_results

from .checkpoint import read_best, write_best
from .evaluation import Judge, Judgement, averaged_weights, sample_size
from .log import MetricsFile
from .sampling_run import SamplingRun
from .step import StepRecord
from .trainer import Hook, Trainer

__all__ = ["InLoopEvaluation"]

log = logging.getLogger(__name__)


class InLoopEvaluation(Hook):
    """Samples with the averaged weights and judges them, every so many steps and at the end.

    Numbers go to ``metrics.jsonl`` and the trackers, with their protocol to ``eval/step-<step>.json``, a picture of
    the first samples beside it. When the number that the metric is judged ``best_by`` has improved, the step's
    checkpoint is saved and kept; ``ckpt=RUN_DIR/best`` finds it.

    Args:
        every: steps between evaluations.
        judge: counts and computes.
        make_run: ``make_run(model, weights)`` makes the sampling run of the weights that the model holds then.
        protocol: ``protocol(run, weights, step)`` says how the numbers came about.
    """

    def __init__(
        self,
        *,
        every: int,
        judge: Judge,
        make_run: Callable[[nn.Module, str], SamplingRun],
        protocol: Callable[[SamplingRun, str, int], Mapping[str, Any]],
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.every, self.judge = every, judge
        self._make_run, self._protocol = make_run, protocol

    def begin(self, trainer: Trainer) -> None:
        """Before the first step: refuse what cannot be judged, make up for an evaluation that was stopped.

        Raises:
            ValueError: the metric cannot judge so many samples, or such classes.
        """
        self.check(trainer)
        best = read_best(Path(trainer.options.run_dir))
        if best is not None and best["step"] <= trainer.counters.step:
            trainer.counters.best = best
        if trainer.counters.step and self._is_due(trainer):
            self._evaluate(trainer)

    def check(self, trainer: Trainer) -> None:
        """Ask the metric, before any sample is made.

        Raises:
            ValueError: it cannot judge so many samples, or such classes.
        """
        with averaged_weights(trainer.model, trainer.ema, trainer.device) as weights:
            run = self._make_run(trainer.model, weights)
            labels = run.class_labels()
            labels = None if labels is None else torch.as_tensor(labels)
            self.judge.check(run.num_samples, labels, sample_size(run))

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Evaluate when it is time."""
        if self._is_due(trainer):
            self._evaluate(trainer)

    def pending(self, trainer: Trainer) -> bool:
        """Whether an evaluation of the step that the run is at is still to be made."""
        return self._is_due(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.counters.step
        last = step == trainer.options.train_steps
        if not (step % self.every == 0 or last) or trainer.counters.evaluated >= step:
            return False
        # A checkpoint is written before its evaluation, whose file then says that it was made.
        done = trainer.ranks.is_main and self._file(trainer, step).is_file()
        return not trainer.ranks.any(done)

    def _file(self, trainer: Trainer, step: int) -> Path:
        return Path(trainer.options.run_dir) / "eval" / f"step-{step:07d}.json"

    def _evaluate(self, trainer: Trainer) -> None:
        counters, step = trainer.counters, trainer.counters.step
        # First of all: what fails or is stopped here must not cost the steps since the last checkpoint.
        trainer.save_now()
        with averaged_weights(trainer.model, trainer.ema, trainer.device) as weights:
            run = self._make_run(trainer.model, weights)
            judgement = self.judge(run, trainer.should_stop)
            if judgement is None:
                log.info(
                    "the evaluation of step %d was stopped; it is made up for when the run goes on", step
                )
                return
            protocol = dict(self._protocol(run, weights, step)) | judgement.protocol
        counters.evaluated = step
        improved = False
        with trainer.ranks.together("writing the evaluation"):
            if trainer.ranks.is_main:
                self._write(trainer, judgement, protocol, step)
                improved = self._improved(counters.best, judgement.metrics)
        best_by = None if self.judge.metric is None else self.judge.metric.best_by
        if improved and best_by is not None:
            value = float(judgement.metrics[best_by[0]])
            counters.best = {"metric": best_by[0], "value": value, "step": step}
            write_best(Path(trainer.options.run_dir), counters.best)
            log.info("best so far: %s %.6g at step %d", best_by[0], value, step)

    def _improved(self, best: Mapping[str, Any] | None, metrics: Mapping[str, Any]) -> bool:
        metric = self.judge.metric
        if metric is None or metric.best_by is None:
            return False
        name, direction = metric.best_by
        if best is None or best["metric"] != name:
            return True
        return metrics[name] < best["value"] if direction == "min" else metrics[name] > best["value"]

    def _write(self, trainer: Trainer, judgement: Judgement, protocol: Mapping[str, Any], step: int) -> None:
        folder = Path(trainer.options.run_dir)
        path = write_results(self._file(trainer, step), judgement.metrics, protocol)
        MetricsFile(folder / "metrics.jsonl").write({"step": step, "eval": judgement.metrics})
        trainer.trackers.log(judgement.metrics, step, "eval/")
        if judgement.images is not None and judgement.images.shape[1] in (1, 3):
            rows = judgement.labels
            if rows is None:
                rows = torch.arange(len(judgement.images)) // 10
            picture = save_sample_grid(path.with_suffix(".png"), judgement.images, rows)
            trainer.trackers.image("samples", picture, step)
        log.info("evaluated step %d: %s", step, path)
