"""The definition of the selective scan: one token after the other, in plain differentiable torch.

Gu and Dao, "Mamba", 2023 (arXiv 2312.00752), equation 2 with the zero-order hold for A and the Euler step for B.
Shapes: B batch, L tokens, E channels, N states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_kernels.dtypes import state_dtype

from .call import ScanCall


class ReferenceScan:
    """Takes every call. Autograd, forward-mode AD, vmap and double backward are those of its torch operations."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def accepts(self, call: ScanCall) -> str | None:
        return None

    def run(self, call: ScanCall) -> Tensor:
        if call.u.is_meta:  # which autocast does not know
            return _scan(call)
        with torch.autocast(call.u.device.type, enabled=False):
            return _scan(call)


def _scan(call: ScanCall) -> Tensor:
    dtype = state_dtype(call.u.dtype)
    u_BLE, B_BLN, C_BLN = call.u.to(dtype), call.B.to(dtype), call.C.to(dtype)
    dt_BLE = call.delta.to(dtype)
    if call.delta_bias is not None:
        dt_BLE = dt_BLE + call.delta_bias
    if call.delta_softplus:
        dt_BLE = F.softplus(dt_BLE)

    # unbind, not indexing: the backward of an index fills a zero tensor of the full length for every token.
    tokens = list(
        zip(dt_BLE.unbind(1), (dt_BLE * u_BLE).unbind(1), B_BLN.unbind(1), C_BLN.unbind(1), strict=True)
    )
    if call.reverse:
        tokens.reverse()
    h_BEN = u_BLE.new_zeros(u_BLE.shape[0], *call.A.shape)
    ys = []
    for dt_BE, dtu_BE, B_BN, C_BN in tokens:
        drive_BEN = dtu_BE.unsqueeze(-1) * B_BN.unsqueeze(-2)
        h_BEN = torch.exp(dt_BE.unsqueeze(-1) * call.A) * h_BEN + drive_BEN
        ys.append((h_BEN * C_BN.unsqueeze(-2)).sum(-1))
    if call.reverse:
        ys.reverse()
    y_BLE = torch.stack(ys, dim=1)

    if call.D is not None:
        y_BLE = y_BLE + call.D * u_BLE
    if call.z is not None:
        y_BLE = y_BLE * F.silu(call.z.to(dtype))
    return y_BLE.to(call.u.dtype)
