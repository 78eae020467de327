"""How the processes of a run were started: read from the environment, checked, joined.

A launcher tells a process about the others through environment variables, and accelerate answers a half-told
story by going on alone: several processes then train the same thing, each for itself, and nobody notices. Here
both ways into that trap are errors. Torch and accelerate are imported at use, so that a mistake of the launch is
answered before either is loaded.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from zigflow.settings import SettingsError

from .freed_memory import keep_freed_memory
from .launcher_settings import check_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .ranks import Ranks

__all__ = [
    "LaunchError",
    "check_environment",
    "check_joined",
    "check_same",
    "chosen_precision",
    "launched_precision",
    "leave",
    "machines",
    "make_accelerator",
]

log = logging.getLogger(__name__)

_TOLD = ("MASTER_ADDR", "RANK", "LOCAL_RANK")
_COUNTS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
_REMEDY = "use `accelerate launch --config_file config/accelerate/FILE.yaml` or `torchrun --nproc_per_node N`"


class LaunchError(SettingsError):
    """The processes of a run were started in a way that cannot work; the message says how to start them."""


def check_environment(environ: Mapping[str, str] | None = None) -> int:
    """Read what a launcher has set; 1 when there was none.

    Args:
        environ: by default the process's own.

    Returns:
        The number of processes of the run.

    Raises:
        LaunchError: the variables contradict each other, or tell of other processes without their number.
    """
    environ = os.environ if environ is None else environ
    if "WORLD_SIZE" not in environ:
        told = [name for name in _TOLD if name in environ]
        if told:
            raise LaunchError(
                f"{' and '.join(told)} set without WORLD_SIZE: each process would train alone (`accelerate launch "
                f"--cpu --num_processes 2` does this). For several processes {_REMEDY}; for one unset {' '.join(told)}"
            )
        for name, launcher in _COUNTS.items():
            if environ.get(name, "1") != "1":
                raise LaunchError(
                    f"{launcher} started {environ[name]} processes ({name}) without WORLD_SIZE: each would train "
                    f"alone. Start one launcher per machine instead; {_REMEDY}"
                )
        return 1
    size = _number(environ, "WORLD_SIZE", 1, None)
    if size > 1:
        for name in ("RANK", "LOCAL_RANK"):
            if name not in environ:
                raise LaunchError(
                    f"WORLD_SIZE={size} without {name}: the processes could not join; {_REMEDY}, which set both"
                )
            _number(environ, name, 0, size - 1)
    return size


def _number(environ: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    text = environ[name]
    value = int(text) if text.strip().isdecimal() else -1
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise LaunchError(f"{name}={text} is not an integer of {allowed}: unset it, or {_REMEDY}")
    return value


def machines(environ: Mapping[str, str] | None = None) -> int:
    """How many machines the run's processes are on; processes of an unknown number per machine count as one each."""
    environ = os.environ if environ is None else environ
    if environ.get("GROUP_WORLD_SIZE", "").isdecimal():
        return int(environ["GROUP_WORLD_SIZE"])
    size = check_environment(environ)
    local = environ.get("LOCAL_WORLD_SIZE", "1")
    return -(-size // max(1, int(local))) if local.isdecimal() else size


def check_joined(joined: int, environ: Mapping[str, str] | None = None) -> None:
    """Compare the processes that have met with those that were started.

    Raises:
        LaunchError: they differ.
    """
    started = check_environment(environ)
    if joined != started:
        raise LaunchError(
            f"the launcher started {started} processes (WORLD_SIZE), and {joined} joined here: each would train "
            f"alone. On a CPU add loop.device=cpu or set ACCELERATE_USE_CPU=true; else {_REMEDY}"
        )


def launched_precision(environ: Mapping[str, str] | None = None) -> str:
    """What the launcher was told with ``--mixed_precision`` or its file: no, fp16 or bf16.

    Raises:
        LaunchError: another one.
    """
    told = (os.environ if environ is None else environ).get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", "fp16", "bf16"):
        raise LaunchError(
            f"the launcher was told mixed_precision={told}, which is not one of no, fp16, bf16: change it there, or "
            "give mixed_precision=bf16 here"
        )
    return told


def chosen_precision(asked: str | None) -> str:
    """The precision that the network runs in: the one that was asked for, or what the launcher was told.

    Raises:
        LaunchError: see :func:`launched_precision`.
    """
    return asked or launched_precision()


def make_accelerator(*, cpu: bool = False) -> "Accelerator":
    """An Accelerator that joins the processes and places the model; without a GPU they join over gloo by themselves.

    Autocast, loss scaling and compilation are ours, so accelerate is told ``no`` to each, whatever the launcher says;
    :func:`launched_precision` and :func:`~.launcher_settings.launched` tell what it said.

    Args:
        cpu: stay on the CPU where there is a GPU.

    Raises:
        LaunchError: see :func:`check_environment` and :func:`check_joined`; or this machine has more processes than
            GPUs.
        LauncherSettingError: the launcher asks for what is not done here.
    """
    size = check_environment()
    check_settings()
    import torch
    from accelerate import Accelerator

    cpu = cpu or _true(os.environ.get("ACCELERATE_USE_CPU"))
    if size > 1 and not cpu:
        device = torch.accelerator.current_accelerator(check_available=True)
        # Apple's GPU has no collectives: accelerate would leave each process alone.
        cpu = device is None or device.type == "mps"
        count, local = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not cpu and local > count:
            raise LaunchError(
                f"{local} processes on a machine with {count} GPU(s): start as many as there are GPUs, or add "
                "loop.device=cpu"
            )
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", dynamo_backend="no")
    check_joined(accelerator.num_processes)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def leave(*, done: bool) -> None:
    """Part from the other processes before the interpreter ends; nothing to do for one process.

    A process that exits while a thread of its connections still runs is aborted by the C++ runtime now and then, and
    its launcher then reports a failed run.

    Args:
        done: this process has finished its work, so every other one does too and all part together. After a failure
            nobody is waited for, and connections over GPUs are left to the exit: closing them can wait for ever.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if not done and distributed.get_backend() != "gloo":
        return
    try:
        if done:
            distributed.barrier()
        distributed.destroy_process_group()
    except RuntimeError as error:
        # The process that failed tells so itself; the work of this one is complete.
        log.debug("the other processes left first: %s", error)


def _true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on")


def check_same(ranks: "Ranks", what: str, value: str, remedy: str) -> None:
    """Check that every process of the run has the same ``value``; all of them must call this.

    Raises:
        LaunchError: on every process, when any differs.
    """
    # 40 bits, so that sums over 8,192 processes are exact in float64.
    number = float(int.from_bytes(hashlib.sha256(value.encode()).digest()[:5], "big"))
    total = ranks.sum([number])[0]
    if ranks.any(number * ranks.size != total):
        shown = f" (here {value})" if len(value) < 200 else ""
        raise LaunchError(f"the processes of this run have different {what}{shown}: {remedy}")
