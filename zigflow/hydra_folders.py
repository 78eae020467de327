"""One run, one folder: Hydra's own settings of folders and ``run_dir`` never name two.

Hydra writes the command line and the log, we write everything else. ``hydra.run.dir`` (a single run),
``hydra.sweep.dir`` and ``hydra.sweep.subdir`` (a sweep) name the run's folder as ``run_dir=`` does;
``hydra.job.chdir=true`` changes no path. Torch-free.
"""

import functools
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zigflow.engine import launch
from zigflow.settings import SettingsError
from zigflow.typed_arguments import typed_path

__all__ = [
    "check_folders",
    "default_run_dir",
    "job_folder",
    "one_folder",
    "run_id",
    "subdir_of",
    "typed_run_dir",
]

log = logging.getLogger(__name__)


@functools.cache
def run_id() -> str:
    """A name for this run that all its local processes agree on.

    RUN_ID, then SLURM_JOB_ID, then torchrun's id, then the launcher's start time, then now.

    Raises:
        LaunchError: the processes are on several machines, and nothing names the run for all of them.
    """
    given = os.environ.get("RUN_ID") or os.environ.get("SLURM_JOB_ID")
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if given:
        return given
    if elastic and elastic != "none":
        return elastic
    if launch.machines() > 1:
        raise launch.LaunchError(
            f"{launch.machines()} machines need one name for the run: export RUN_ID=NAME on each of them, or give "
            "run_dir=FOLDER"
        )
    if "LOCAL_RANK" in os.environ:
        import psutil

        parent = psutil.Process(os.getppid())
        return time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(parent.create_time())) + f"_{parent.pid}"
    return time.strftime("%Y-%m-%d_%H-%M-%S") + f"_{os.getpid()}"


def default_run_dir() -> str:
    """Where a run goes that ``run_dir=`` does not name: where Hydra's settings say, else outputs/JOB/ID."""
    hydra = HydraConfig.get()
    if OmegaConf.is_missing(hydra.runtime, "output_dir"):
        # Hydra asks where to go.
        return f"outputs/{hydra.job.name}/{run_id()}"
    place, start = Path(hydra.runtime.output_dir), Path(hydra.runtime.cwd)
    return str(place.relative_to(start) if place.is_relative_to(start) else place)


# Characters that a folder's name keeps: others mean something to a shell, to Hydra's grammar or to the system.
_KEPT = re.compile(r"[^\w.+-]+")
_LONGEST = 100


def job_folder(number: int, overrides: str, sweep: str) -> str:
    """The folder of one job of a sweep: its number and what tells it apart, ``0_optim.lr-0.001_scan-hilbert``.

    Args:
        number: of the job.
        overrides: ``hydra.job.override_dirname``.
        sweep: ``hydra.sweep.dir``; a folder of the number alone that stands there, from 0.1, is continued.
    """
    if (Path(sweep) / str(number)).is_dir():
        return str(number)
    told = "_".join(_KEPT.sub("-", part).strip("+-.") for part in overrides.split(","))
    return f"{number}_{told[:_LONGEST]}".rstrip("_-.")


def typed_run_dir(arguments: Sequence[str]) -> str | None:
    """The run directory that a command line names, by ``run_dir=`` or by ``hydra.run.dir=``.

    Raises:
        SettingsError: both, and they differ.
    """
    ours, theirs = (typed_path(arguments, key) for key in ("run_dir", "hydra.run.dir"))
    if ours is not None and theirs is not None and Path(ours) != Path(theirs):
        raise SettingsError(
            f"run_dir={ours} and hydra.run.dir={theirs} are two folders for one run: drop hydra.run.dir="
        )
    return ours if ours is not None else theirs


def subdir_of(cfg: DictConfig) -> tuple[str, str]:
    """``hydra.sweep.subdir`` as it is written, and for this job; the same twice where no job is told by it."""
    written = str(OmegaConf.to_container(cfg.hydra.sweep, resolve=False)["subdir"])  # type: ignore[call-overload,index]
    probe = cfg.copy()
    OmegaConf.set_readonly(probe.hydra, False)
    probe.hydra.sweep.subdir = written.replace("${hydra:", "${hydra.")
    try:
        return written, str(probe.hydra.sweep.subdir)
    except OmegaConfBaseException:
        return written, written


def check_folders(subdirs: Sequence[tuple[str, str]], whole: bool) -> None:
    """Refuse a sweep whose jobs would share one folder, each continuing the one before.

    Args:
        subdirs: what :func:`subdir_of` says of each job.
        whole: whether these are all jobs; those of a sweeper that chooses by itself are not known before.

    Raises:
        SettingsError: ``hydra.sweep.subdir`` names one folder for several.
    """
    written, _ = subdirs[0]
    if re.search(r"\$\{hydra[.:]job\.(num|id|override_dirname)\}", written):
        return
    if not whole or len({folder for _, folder in subdirs}) < len(subdirs):
        jobs = f"the {len(subdirs)} runs" if whole else "runs"
        raise SettingsError(
            f"hydra.sweep.subdir={written} puts {jobs} of the sweep into one folder: drop it, or give one that "
            "tells them apart by ${hydra.job.num}, ${hydra.job.id} or ${hydra.job.override_dirname}"
        )


def one_folder(cfg: DictConfig) -> None:
    """Before a job begins: back to the folder that the command was typed in, and a last look at the run's own.

    Raises:
        SettingsError: ``run_dir`` is another folder than that of Hydra's log.
    """
    hydra = HydraConfig.get()
    start = Path(hydra.runtime.cwd)
    if Path.cwd() != start:
        os.chdir(start)
        log.info("hydra.job.chdir=true changes no path here: the files of a run are all in run_dir")
    place = Path(hydra.runtime.output_dir)
    if (start / cfg.run_dir).resolve() != place.resolve():
        raise SettingsError(
            f"run_dir={cfg.run_dir} and hydra.run.dir={place} are two folders for one run: drop one of them"
        )
