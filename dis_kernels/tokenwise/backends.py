"""The backends of both operations. A new one is a file here and an entry in ``READ`` and ``WRITE``."""

from torch import Tensor

from dis_kernels.dispatch import Dispatcher

from .call import Read, ReadCall, WriteCall
from .cpu import CpuRead, CpuWrite
from .torch_plain import PlainRead, PlainWrite
from .triton_tokenwise import TritonRead, TritonWrite

READ: Dispatcher[ReadCall, Read] = Dispatcher(
    "add_norm_modulate", [TritonRead(), CpuRead(), PlainRead()], otherwise="torch"
)
WRITE: Dispatcher[WriteCall, Tensor] = Dispatcher(
    "gated_add", [TritonWrite(), CpuWrite(), PlainWrite()], otherwise="torch"
)
