"""What stands around a model that several processes train: a copy in each (DDP), or its parameters in shards."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from zigflow.nn import as_denoiser

__all__ = ["place", "shard"]


def place(
    model: nn.Module, accelerator: Accelerator, *, sharded: bool
) -> tuple[Callable[..., Any], Callable[[Any], AbstractContextManager]]:
    """Bring the model to its device and wrap it for the processes of the run.

    Args:
        sharded: each process keeps a part of every parameter, gradient and optimizer state; without effect on one
            process. The model itself is changed in place: its parameters become DTensors, their names stay.

    Returns:
        The model as it is called, and ``no_sync(that)``, the context in which gradients stay local.
    """
    if not sharded or accelerator.num_processes == 1:
        return accelerator.prepare(model), accelerator.no_sync
    shard(model.to(accelerator.device), accelerator.num_processes)
    return model, _no_sync


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
