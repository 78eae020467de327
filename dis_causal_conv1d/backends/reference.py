"""The definition of the causal depthwise convolution: a padded copy and W shifted products in plain torch.

y[l] = bias + sum over w of weight[:, w] * x[l - (W - 1) + w], with x zero before the first token.
Shapes: B batch, L tokens, E channels, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import ConvCall


class ReferenceConv:
    """Takes every call. Autograd, forward-mode AD, vmap and double backward are those of its torch operations."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def accepts(self, call: ConvCall) -> str | None:
        return None

    def run(self, call: ConvCall) -> Tensor:
        dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
        length, width = call.x.shape[1], call.weight.shape[1]
        taps_WE = call.weight.to(dtype).t()
        if call.reverse:
            taps_WE = taps_WE.flip(0)
        pad = (0, 0, 0, width - 1) if call.reverse else (0, 0, width - 1, 0)
        x_BLE = F.pad(call.x.to(dtype), pad)
        y_BLE = torch.stack([x_BLE[:, w : w + length] * taps_WE[w] for w in range(width)]).sum(0)
        if call.bias is not None:
            y_BLE = y_BLE + call.bias.to(dtype)
        if call.silu:
            y_BLE = F.silu(y_BLE)
        return y_BLE.to(call.x.dtype)
