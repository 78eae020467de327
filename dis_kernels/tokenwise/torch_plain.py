"""Both operations in torch's operators, one after another: their definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_kernels.dtypes import state_dtype

from .call import Read, ReadCall, WriteCall
from .permutation import permute


class PlainRead:
    """Torch's operators one after another, on any device and in any dtype; torch.compile fuses them."""

    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def accepts(self, call: ReadCall) -> str | None:
        return None

    def run(self, call: ReadCall) -> Read:
        stream = call.residual if call.hidden is None else call.residual + call.hidden
        wide = stream.to(state_dtype(stream.dtype))
        weight = None if call.weight is None else call.weight.to(wide.dtype)
        if call.centered:
            normed = F.layer_norm(wide, wide.shape[-1:], weight, None, call.eps)
        else:
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + call.eps)
            normed = normed if weight is None else normed * weight
        x = normed = normed.to(call.dtype)
        if call.shift is not None and call.scale is not None:
            x = x * (1 + call.scale.unsqueeze(1)) + call.shift.unsqueeze(1)
        if call.order is not None and call.inverse is not None:
            x = permute(x, call.order, call.inverse)
        return x, normed if call.keep_normed else None, stream


class PlainWrite:
    """Torch's operators one after another, on any device and in any dtype; torch.compile fuses them."""

    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def accepts(self, call: WriteCall) -> str | None:
        return None

    def run(self, call: WriteCall) -> Tensor:
        y = call.y
        if call.order is not None and call.inverse is not None:
            y = permute(y, call.order, call.inverse)
        return call.base + call.gate.unsqueeze(1) * y
