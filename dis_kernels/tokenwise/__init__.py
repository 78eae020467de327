"""What a block does to single tokens around its mixer: one pass over the stream before it and one after.

The mixer reads ``modulate(norm(residual + hidden))`` along a scan order, and what it makes goes back to its places,
gated, into the stream. ``permute`` is the step along an order alone.
"""

from .call import ReadCall, WriteCall
from .functions import add_norm_modulate, gated_add, register_backend, tokenwise_backends
from .permutation import permute

__all__ = [
    "ReadCall",
    "WriteCall",
    "add_norm_modulate",
    "gated_add",
    "permute",
    "register_backend",
    "tokenwise_backends",
]
