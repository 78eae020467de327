"""Several optimizers as one, and the parameters that each of them takes."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from zigflow.nn import as_denoiser

from .tensors import assign

__all__ = ["Combined", "WholeMatrixMuon", "hidden_matrices"]


class Combined(Optimizer):
    """Several optimizers over different parameters of one model, which step together.

    Groups and state are those of the parts, in one list and one mapping: whoever scales learning rates, saves or
    restores need not know that there are parts.

    Raises:
        ValueError: no part is given, or two of them hold the same parameter.
    """

    def __init__(self, *parts: Optimizer):
        if not parts:
            raise ValueError("an optimizer needs at least one part")
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.parts = parts
        # The parts' own dictionaries: what is set in them here is what they read.
        self.param_groups = groups
        self.state = defaultdict(dict)
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every part; the closure, if there is one, is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class WholeMatrixMuon(torch.optim.Muon):
    """torch's Muon, which orthogonalizes a sharded matrix as a whole.

    Its iteration runs in bfloat16. Over shards each product would be rounded in parts, and the update would differ by
    some percent from that of one process. Here every process makes the whole update, one matrix at a time, and keeps
    its own part of the result and of the momentum.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; sharded matrices are gathered, so all processes call it together."""
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_whole(parameter, settings)
        return loss

    def _step_whole(self, parameter: Tensor, settings: dict) -> None:
        whole, state = nn.Parameter(_gathered(parameter)), self.state[parameter]
        whole.grad = _gathered(parameter.grad)
        alone = torch.optim.Muon([whole], **settings)
        if state:
            alone.state[whole] = {key: _gathered(value) for key, value in state.items()}
        alone.step()
        assign(parameter, whole.detach())
        for key, value in alone.state[whole].items():
            if key not in state:
                state[key] = torch.zeros_like(parameter, dtype=value.dtype)
            assign(state[key], value)


def _gathered(tensor: Tensor | None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"Muon keeps matrices, got a {type(tensor).__name__}")
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The trainable weights of the linear layers inside the model's blocks.

    Blocks are the model's ``shard_units()``: what embeds tokens, times and classes and what
    predicts stands outside of them. Tables, convolutions, norms, biases and the state matrices of a scan are no
    weights of linear layers.
    """
    found: dict[Tensor, None] = {}
    for unit in as_denoiser(model).shard_units():
        for module in unit.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                found[module.weight] = None
    return list(found)
