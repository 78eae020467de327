"""What the tests of registered operators share: calls counted, bytes kept for the backward pass, a compiler needed."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="no C++ compiler here",
)


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
