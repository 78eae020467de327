"""What the tests of registered operators share: comparison, calls counted, bytes kept, a compiler needed."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.assertions import assert_close

from .definitions import with_gradients

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="no C++ compiler here",
)


def compare(function, definition, arguments, of_max, **flags):
    """Output and gradients against the definition's; ``of_max``: what they may differ by, of the largest value."""
    first = next(iter(arguments.values()))
    # Exact in every dtype: what comes back from the output is the same for both.
    weight = torch.randn(first.shape, generator=torch.Generator().manual_seed(7)).bfloat16().double()
    out, grads = with_gradients(function, arguments, weight, **flags)
    want, want_grads = with_gradients(definition, arguments, weight, **flags)
    assert_close("output", out, want, of_max=of_max[0])
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype
        assert_close(f"gradient of {name}", grad, want_grads[name], of_max=of_max[1], floor=1e-6)


class CountOperators(TorchDispatchMode):
    """How often each operator is called while it is active, by name: ``calls``."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] = self.calls.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def saved_bytes(function, arguments):
    """Bytes kept for backward beside the arguments themselves."""
    mine = {value.untyped_storage().data_ptr() for value in arguments.values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(**arguments)
    del out
    return sum(kept.values())
