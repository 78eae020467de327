"""A model made ready to train: its blocks, and what several processes put around it.

Each process has a copy (DDP), or a part of every parameter (FSDP).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from zigflow.nn import as_denoiser

from .runtime import Runtime

__all__ = ["Placed", "place", "prepare_blocks", "shard"]


@dataclass(frozen=True)
class Placed:
    """A model on its device.

    Attributes:
        model: the model itself, its parameters final.
        wrapped: the same, as it is called: what DDP or FSDP made of it.
        no_sync: ``no_sync(wrapped)`` is the context in which gradients stay local.
    """

    model: nn.Module
    wrapped: Callable[..., Any]
    no_sync: Callable[[Any], AbstractContextManager]


def prepare_blocks(model: nn.Module, policy: str, compiled: bool) -> None:
    """Checkpoint policy first, then compilation in place, so that no parameter is renamed.

    Raises:
        ValueError: the model has no blocks that keep a policy, or none to compile.
    """
    asked = as_denoiser(model)
    if policy != "none":
        asked.set_checkpoint_policy(policy)
    if compiled:
        asked.compile_blocks()


def place(model: nn.Module, runtime: Runtime, *, sharded: bool) -> Placed:
    """Bring the model to its device and wrap it for the processes of the run.

    Args:
        sharded: each process keeps a part of every parameter, gradient and optimizer state; without effect on one
            process. The model itself is changed in place: its parameters become DTensors, their names stay.

    Raises:
        ValueError: nothing has joined the processes of the run.
    """
    if runtime.accelerator is None:
        raise ValueError(
            "a model is placed by an accelerator: make the runtime with Runtime.of(make_accelerator())"
        )
    if not sharded or runtime.ranks.size == 1:
        return Placed(model, runtime.accelerator.prepare(model), runtime.accelerator.no_sync)
    shard(model.to(runtime.device), runtime.ranks.size)
    return Placed(model, model, _no_sync)


def shard(model: nn.Module, processes: int) -> None:
    """Shard every unit of the model, its ``shard_units()``, then what is left of it.

    Weights are gathered unit by unit, so a process holds one whole unit beside its shards.
    """
    # Processes write nothing into what a model returns, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (processes,))
    for unit in as_denoiser(model).shard_units():
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def _no_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
