"""Hydra runs what has been composed and checked: nothing is composed again for a single run.

A sweep's jobs are composed once more by the launcher, which may do so in processes of its own.
"""

from collections.abc import Callable
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, flag_override

from zigflow import plugins

__all__ = ["runs_here", "start"]


def runs_here(line: plugins.CommandLine) -> bool:
    """Whether :func:`start` runs this command line; what only shows something is left to Hydra's own entry."""
    mode = None if line.job is None else line.job.hydra.mode
    return line.sweep or (line.job is not None and mode in (None, RunMode.RUN))


def start(line: plugins.CommandLine, job: Callable[[DictConfig], Any], config_name: str) -> None:
    """Make the run's directory, write Hydra's files into it, begin the log, call ``job``; or so for each of a sweep."""
    config_name = line.typed.config_name or config_name
    with plugins.hydra_of(line.typed) as hydra:
        if line.sweep:
            overrides = [text for text in line.typed.overrides if text != "hydra.mode=MULTIRUN"]
            hydra.hydra.multirun(config_name, job, [*overrides, "hydra.mode=MULTIRUN"])
            return
        cfg = line.job
        with flag_override(cfg, ["struct", "readonly"], False):
            cfg.hydra.mode = RunMode.RUN
        callbacks = Callbacks(cfg)
        context = HydraContext(config_loader=hydra.config_loader(), callbacks=callbacks)
    callbacks.on_run_start(config=cfg, config_name=config_name)
    done = run_job(job, cfg, "hydra.run.dir", None, context)
    callbacks.on_run_end(config=cfg, config_name=config_name, job_return=done)
    _ = done.return_value  # raises what the job has raised
