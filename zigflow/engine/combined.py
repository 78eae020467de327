"""Several optimizers as one, and the parameters that each of them takes."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Combined", "hidden_matrices"]


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


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The trainable weights of the linear layers inside the model's blocks.

    Blocks are the model's ``shard_units()``, or its ``blocks``: what embeds tokens, times and classes and what
    predicts stands outside of them. Tables, convolutions, norms, biases and the state matrices of a scan are no
    weights of linear layers.
    """
    units = model.shard_units() if hasattr(model, "shard_units") else getattr(model, "blocks", ())
    found: dict[Tensor, None] = {}
    for unit in units:
        for module in unit.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                found[module.weight] = None
    return list(found)
