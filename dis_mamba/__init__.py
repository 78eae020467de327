"""The selective scan of Mamba and the mixers built on it: one function, several backends."""

from dis_kernels import use_backend
from dis_kernels.tokenwise import permute

from .mixer import BiMambaMixer, MambaMixer, ParallelMambaMixer
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
