"""Evaluation between two training steps, which training does not notice."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zigflow.metrics.pictures import save_sample_grid
from zigflow.metrics.results import write_results

from .evaluation import Judge, Judgement, averaged_weights
from .log import MetricsFile
from .sampling_run import SamplingRun
from .step import StepRecord
from .trainer import Trainer

__all__ = ["InLoopEvaluation"]

log = logging.getLogger(__name__)


class InLoopEvaluation:
    """A hook of the trainer: samples with the averaged weights and judges them, every so many steps and at the end.

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
        """Before the first step: make up for an evaluation that the run was stopped in."""
        if trainer.counters.step and self._is_due(trainer):
            self._evaluate(trainer)

    def __call__(self, trainer: Trainer, record: StepRecord) -> None:
        if self._is_due(trainer):
            self._evaluate(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.counters.step
        last = step == trainer.options.train_steps
        return (step % self.every == 0 or last) and trainer.counters.evaluated < step

    def _evaluate(self, trainer: Trainer) -> None:
        counters, step = trainer.counters, trainer.counters.step
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
        if trainer.ranks.any(improved):
            if improved and self.judge.metric is not None and self.judge.metric.best_by is not None:
                name = self.judge.metric.best_by[0]
                counters.best = {"metric": name, "value": float(judgement.metrics[name]), "step": step}
                log.info("best so far: %s %.6g at step %d", name, judgement.metrics[name], step)
            trainer.request_save()

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
        path = write_results(folder / "eval" / f"step-{step:07d}.json", judgement.metrics, protocol)
        MetricsFile(folder / "metrics.jsonl").write({"step": step, "eval": judgement.metrics})
        trainer.trackers.log(judgement.metrics, step, "eval/")
        if judgement.images is not None and judgement.images.shape[1] in (1, 3):
            rows = judgement.labels
            if rows is None:
                rows = torch.arange(len(judgement.images)) // 10
            picture = save_sample_grid(path.with_suffix(".png"), judgement.images, rows)
            trainer.trackers.image("samples", picture, step)
        log.info("evaluated step %d: %s", step, path)
