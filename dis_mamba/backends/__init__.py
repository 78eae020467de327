"""The backends of the selective scan. A new one is a file here and an entry in ``SCAN``, or is registered."""

from torch import Tensor

from dis_kernels.dispatch import Dispatcher

from .call import ScanCall
from .cpu import CpuScan
from .cuda_package import PackageScan
from .reference import ReferenceScan
from .torch_chunked import TorchScan
from .triton_scan import TritonScan

SCAN: Dispatcher[ScanCall, Tensor] = Dispatcher(
    "selective_scan", [TritonScan(), CpuScan(), PackageScan(), TorchScan(), ReferenceScan()], otherwise="auto"
)
