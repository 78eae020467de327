"""The selective scan of Mamba and the mixers built on it: one function, several backends."""

from dis_kernels import use_backend
from dis_kernels.tokenwise import permute

from .backends.call import ScanCall
from .mixer import BiMambaMixer, MambaMixer, ParallelMambaMixer, mixer_backends
from .registry import get_mixer, list_mixers, register_mixer
from .scan import available_backends, register_backend, selective_scan

__all__ = [
    "BiMambaMixer",
    "MambaMixer",
    "ParallelMambaMixer",
    "ScanCall",
    "available_backends",
    "get_mixer",
    "list_mixers",
    "mixer_backends",
    "permute",
    "register_backend",
    "register_mixer",
    "selective_scan",
    "use_backend",
]
