"""Plans of grids: what is shared, where it lies, what is kept, and that it is no part of the weights."""

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tests.models.transformers import FAMILIES
from zigflow.nn.orders import GridOrders


class Step(NamedTuple):
    order: Any
    inverse: Any
    segments: int


class Walker(nn.Module):
    """Three layers, the first and the last of which walk alike."""

    def __init__(self, device=None):
        super().__init__()
        self.calls = []
        self.weight = nn.Parameter(torch.zeros(2, device=device))
        self.orders = GridOrders(self.plan, (2, 3), device)

    def plan(self, grid):
        self.calls.append(grid)
        order = np.arange(grid[0] * grid[1])[::-1]
        step = Step(order, order, 2)
        return (step, Step(None, np.arange(4), 1), step)


def test_a_plan_is_given_with_tensors_and_what_was_one_array_is_one_tensor():
    model = Walker()
    first, second, third = model.orders.at((2, 3), torch.device("cpu"))
    assert first is third and isinstance(first, Step) and first.segments == 2
    assert first.order is first.inverse and first.order.tolist() == [5, 4, 3, 2, 1, 0]
    assert second.order is None and second.inverse.dtype == torch.int64
    assert len(list(model.orders.buffers())) == 2
    assert list(model.state_dict()) == ["weight"]
    assert model.calls == [(2, 3)]
    assert "built=(2, 3)" in repr(model)


def test_other_grids_are_made_once_and_a_few_are_kept():
    model, cpu = Walker(), torch.device("cpu")
    with torch.inference_mode():
        kept = model.orders.at((3, 3), cpu)
    assert model.orders.at((3, 3), cpu) is kept and not kept[0].order.is_inference()
    for side in range(4, 14):
        model.orders.at((side, 1), cpu)
    assert len(model.orders._others) == 8
    calls = len(model.calls)
    model.orders.at((3, 3), cpu)
    model.orders.at((13, 1), cpu)
    assert len(model.calls) == calls + 1
    assert model.orders.at((2, 2), torch.device("meta"))[0].order.is_meta


def test_orders_follow_the_model_and_are_made_where_memory_comes_later():
    model = Walker()
    assert model.to(torch.bfloat16).orders.at((2, 3), None)[0].order.dtype == torch.int64
    assert model.to("meta").orders.at((2, 3), None)[0].order.is_meta
    with torch.device("meta"):
        model = Walker()
    assert model.orders.at((2, 3), None)[0].order.is_meta
    model.to_empty(device="cpu")
    assert model.orders.at((2, 3), None)[0].order.tolist() == [5, 4, 3, 2, 1, 0]
    twin = copy.deepcopy(model)
    twin.to("meta")
    assert model.orders.at((2, 3), None)[0].order.device.type == "cpu"


@pytest.mark.parametrize("name", ["zigma", "dis", "dim"])
def test_a_family_built_without_memory_walks_as_one_built_with_it(name):
    options = {"in_channels": 2, "img_dim": 4, "patch_size": 1, "embed_dim": 16, "depth": 3}
    options |= {"scan_type": "zigzagN8"} if name == "zigma" else {"scan": "zigzag"}
    torch.manual_seed(0)
    model = FAMILIES[name](**options).eval()
    with torch.device("meta"):
        late = FAMILIES[name](**options).eval()
    late.to_empty(device="cpu")
    late.load_state_dict(model.state_dict())
    x, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    y = torch.tensor([0, 1]) if model.num_classes > 0 else None
    assert torch.equal(late(x, t, y), model(x, t, y))
    for own, other in zip(model.scan_walks(), late.scan_walks(), strict=True):
        for a, b in zip(own, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
