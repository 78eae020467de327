"""The backends of the causal convolution. A new one is a file here and an entry in ``CONV``, or is registered."""

from torch import Tensor

from dis_kernels.dispatch import Dispatcher

from .call import ConvCall
from .cpu import CpuConv
from .cuda_package import PackageConv
from .reference import ReferenceConv
from .torch_shift import TorchConv
from .triton_conv import TritonConv

CONV: Dispatcher[ConvCall, Tensor] = Dispatcher(
    "causal_conv1d", [TritonConv(), CpuConv(), PackageConv(), TorchConv(), ReferenceConv()], otherwise="auto"
)
