"""The backends of the selective scan and of the work on single tokens around it.

A new one is a file here and an entry in ``SCAN``, or in ``READ`` and ``WRITE``.
"""

from torch import Tensor

from dis_causal_conv1d.dispatch import Dispatcher

from .call import ScanCall
from .cpu import CpuScan
from .cpu_tokenwise import CpuRead, CpuWrite
from .cuda_package import PackageScan
from .reference import ReferenceScan
from .tokenwise import PlainRead, PlainWrite, Read, ReadCall, WriteCall
from .torch_chunked import TorchScan
from .triton_scan import TritonScan
from .triton_tokenwise import TritonRead, TritonWrite

SCAN: Dispatcher[ScanCall, Tensor] = Dispatcher(
    "selective_scan", [TritonScan(), CpuScan(), PackageScan(), TorchScan(), ReferenceScan()]
)
READ: Dispatcher[ReadCall, Read] = Dispatcher(
    "add_norm_modulate", [TritonRead(), CpuRead(), PlainRead()], otherwise="torch"
)
WRITE: Dispatcher[WriteCall, Tensor] = Dispatcher(
    "gated_add", [TritonWrite(), CpuWrite(), PlainWrite()], otherwise="torch"
)
