"""The selective scan of Mamba and the mixers built on it: one function, several backends."""

from dis_causal_conv1d.dispatch import use_backend

from .mixer import BiMambaMixer, MambaMixer, ParallelMambaMixer
from .permutation import permute
from .scan import available_backends, selective_scan

__all__ = [
    "BiMambaMixer",
    "MambaMixer",
    "ParallelMambaMixer",
    "available_backends",
    "permute",
    "selective_scan",
    "use_backend",
]
