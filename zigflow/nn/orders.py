"""The index tensors that a model gathers its tokens by, for the grid that it was built for and for any other."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["GridOrders"]

Plan = TypeVar("Plan")
_GRIDS_KEPT = 8


class GridOrders(nn.Module, Generic[Plan]):
    """The plans of a model by grid, and the tensors in them.

    A plan is a nest of tuples, named ones too, whose leaves are index tensors, integers and None. ``make(grid)`` gives
    it with numpy arrays in the place of tensors; one array becomes one tensor, however often it stands there.

    The tensors of the built grid are buffers that are not saved. They follow the model from device to device, and are
    made again when a model that was built on the meta device is given memory. The plans of other grids are made when
    they are first met; the latest eight are kept.

    Args:
        make: the plan of a grid.
        built: the grid that the model was built for.
        device: of the buffers; None: where tensors are made.
    """

    def __init__(self, make: Callable[[tuple[int, ...]], Any], built: tuple[int, ...], device: Any = None):
        super().__init__()
        self._make = make
        self.built = built
        self._nodes: list[Any] = []
        self._others: OrderedDict[tuple, Plan] = OrderedDict()
        self._fill(torch.empty(0, device=device).device)

    def _fill(self, device: torch.device) -> None:
        """Buffers of the built grid; ``_nodes`` says which stand where."""
        self._nodes = _nodes(self._make(self.built))
        for i, node in enumerate(self._nodes):
            if isinstance(node, np.ndarray):
                name = f"order_{i}"
                self.register_buffer(name, _tensor(node, device), persistent=False)
                self._nodes[i] = _Buffer(name)

    def at(self, grid: tuple[int, ...], device: torch.device) -> Plan:
        """The plan of a grid; that of the built one lies where the model does, others on ``device``."""
        if grid == self.built:
            return _assembled([self._buffers[n] if isinstance(n, _Buffer) else n for n in self._nodes])
        key = (grid, device)
        if key not in self._others:
            nodes = _nodes(self._make(grid))
            # Kept for training, too, which a tensor made in inference mode cannot serve.
            with torch.inference_mode(False):
                made = [_tensor(n, device) if isinstance(n, np.ndarray) else n for n in nodes]
            self._others[key] = _assembled(made)
            while len(self._others) > _GRIDS_KEPT:
                self._others.popitem(last=False)
        return self._others[key]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GridOrders[Plan]":
        before = {name: buffer.device.type for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        after = next(self.buffers(), None)
        if after is not None and "meta" in before.values() and after.device.type != "meta":
            self._fill(after.device)
        return self

    def extra_repr(self) -> str:
        return f"built={self.built}, {len(self._buffers)} tensors"


class _Buffer(str):
    """The name of a buffer."""


class _Tuple:
    """A tuple, named or not, of nodes by their numbers."""

    def __init__(self, kind: type, parts: tuple[int, ...]):
        self.kind, self.parts = kind, parts


def _nodes(plan: Any) -> list[Any]:
    """The distinct parts of a plan, each after those that it is made of, the plan itself last."""
    nodes: list[Any] = []
    known: dict[int, int] = {}

    def number(part: Any) -> int:
        if id(part) not in known:
            node = part
            if isinstance(part, tuple):
                node = _Tuple(type(part), tuple(number(p) for p in part))
            nodes.append(node)
            known[id(part)] = len(nodes) - 1
        return known[id(part)]

    number(plan)
    return nodes


def _assembled(nodes: list[Any]) -> Any:
    """The plan whose parts are ``nodes``."""
    made: list[Any] = []
    for node in nodes:
        if isinstance(node, _Tuple):
            parts = [made[i] for i in node.parts]
            node = tuple(parts) if node.kind is tuple else cast(Any, node.kind)(*parts)
        made.append(node)
    return made[-1]


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array.copy()).to(device)
