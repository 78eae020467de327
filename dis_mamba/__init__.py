"""The selective scan of Mamba and the mixers built on it: one function, several backends."""

from dis_causal_conv1d.dispatch import use_backend

from .mixer import BiMambaMixer, MambaMixer, ParallelMambaMixer
from .permutation import permute
from .scan import available_backends, selective_scan
from .tokenwise import add_norm_modulate, gated_add, tokenwise_backends

__all__ = [
    "BiMambaMixer",
    "MambaMixer",
    "ParallelMambaMixer",
    "add_norm_modulate",
    "available_backends",
    "gated_add",
    "permute",
    "selective_scan",
    "tokenwise_backends",
    "use_backend",
]
