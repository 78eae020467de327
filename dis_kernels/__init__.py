"""What all operations share: choosing a backend, compiling and loading C++, checking arguments, launching Triton.

An operation is a folder: its functions, one file per backend, its C++ in ``csrc``. Those that belong to no mixer are
here (``tokenwise``); the selective scan and the causal convolution are packages of their own above.
"""

from .dispatch import use_backend

__all__ = ["use_backend"]
