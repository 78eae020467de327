"""The selective scan in eager torch, chunk by chunk, with an analytical backward.

The state lives in blocks (rows, tokens, N, channels): the channels are innermost, so that every operation runs over
long contiguous vectors, and a block stays in cache while it is used. Within a chunk everything but the recurrence
is one vectorized operation; the recurrence is one addcmul per token. Only the states at the chunk boundaries (at
every second one where sequences have 2 bytes) are kept for backward, as outputs of the forward operator, so that
selective checkpointing can keep them; backward recomputes the states of one chunk at a time.

Shapes: B batch, L tokens, E channels, N states, S kept states (``gradient.chunk_of``); in a block R rows, T tokens,
X channels.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dis_kernels.dispatch import transform_reason
from dis_kernels.dtypes import state_dtype
from dis_kernels.elementwise import elementwise, room, spare, sum_of_states, sum_of_tokens

from .call import ScanCall
from .gradient import CHUNK, chunk_of, empty_outputs, register

_LOG2_E = math.log2(math.e)
_BLOCK_ELEMENTS_CPU = 1 << 19
_BLOCK_ELEMENTS_DEVICE = 1 << 25


class TorchScan:
    """Runs wherever torch does. Refuses forward-mode AD and torch.func transforms, which need ``reference``."""

    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def accepts(self, call: ScanCall) -> str | None:
        return transform_reason(call[:8])

    def run(self, call: ScanCall) -> Tensor:
        return chunked_scan(*call)[0]


@torch.library.custom_op("zigflow::chunked_scan", mutates_args=())
def chunked_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The output (B,L,E) and the states at the chunk boundaries (B,S,N,E)."""
    dtype = state_dtype(u.dtype)
    spans, every = _spans(u.shape[1], reverse), chunk_of(u.dtype) // CHUNK
    out, states = empty_outputs(u, A)
    with torch.autocast(u.device.type, enabled=False):
        rate_NE = _base_two_rate(A, dtype)
        B, C = B.to(dtype).contiguous(), C.to(dtype).contiguous()
        blocks = _Blocks(u, A.shape[1], dtype, buffers=2)
        for rows in blocks.rows():
            before = None
            passing = u.new_empty((rows.stop - rows.start, *rate_NE.shape) if every > 1 else 0, dtype=dtype)
            for i, span in enumerate(spans):
                last_chunk, boundary = i == len(spans) - 1, (i + 1) // every - 1
                after = passing if last_chunk or (i + 1) % every else states[rows, boundary]
                u_RTE = u[rows, span].to(dtype)
                dt_RTE = _step_size(_raw_step(delta[rows, span], delta_bias, dtype), delta_softplus)
                dtu_RTE = dt_RTE * u_RTE
                y_RTE = _empty_like(dtu_RTE)
                for cols in blocks.columns():
                    decay, h = blocks.views(rows, span, cols)
                    carry = None if before is None else before[..., cols]
                    dt, dtu = dt_RTE[..., cols], dtu_RTE[..., cols]
                    last = _states(decay, h, dt, dtu, rate_NE[:, cols], B[rows, span], carry, reverse)
                    _contract_states(C[rows, span], h, y_RTE[..., cols])
                    if not last_chunk:
                        after[..., cols] = last
                before = after
                if D is not None:
                    y_RTE.addcmul_(u_RTE, D.to(dtype))
                if z is not None:
                    y_RTE.mul_(elementwise(F.silu, z[rows, span].to(dtype)))
                out[rows, span] = y_RTE
    return out, states


@torch.library.custom_op("zigflow::chunked_scan_backward", mutates_args=())
def chunked_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, each in its tensor's dtype; empty for an absent tensor."""
    dtype = state_dtype(u.dtype)
    device = u.device
    spans, every = _spans(u.shape[1], reverse), chunk_of(u.dtype) // CHUNK
    grad_u, grad_delta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    grad_z = u.new_empty(0) if z is None else z.new_empty(z.shape)
    grad_A_NE = torch.zeros((A.shape[1], A.shape[0]), dtype=dtype, device=device)
    grad_B = torch.zeros(B.shape, dtype=dtype, device=device)
    grad_C = torch.zeros(C.shape, dtype=dtype, device=device)
    grad_D = torch.zeros(0 if D is None else D.shape, dtype=dtype, device=device)
    grad_bias = torch.zeros(0 if delta_bias is None else delta_bias.shape, dtype=dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        rate_NE = _base_two_rate(A, dtype)
        A_NE = A.to(dtype).t().contiguous()
        Bs, Cs = B.to(dtype).contiguous(), C.to(dtype).contiguous()
        blocks = _Blocks(u, A.shape[1], dtype, buffers=3)
        for rows in blocks.rows():
            carry_RNE = torch.empty((rows.stop - rows.start, *A_NE.shape), dtype=dtype, device=device)
            for i in reversed(range(len(spans))):
                span = spans[i]
                B_RTN, C_RTN = Bs[rows, span], Cs[rows, span]
                # The chunks from the last kept state on, walked again for the state before this one.
                kept = i // every
                passed = []
                for s in spans[kept * every : i]:
                    dt_s = _step_size(_raw_step(delta[rows, s], delta_bias, dtype), delta_softplus)
                    passed.append((s, dt_s, dt_s * u[rows, s].to(dtype)))
                u_RTE = u[rows, span].to(dtype)
                raw_RTE = _raw_step(delta[rows, span], delta_bias, dtype)
                dt_RTE = _step_size(raw_RTE, delta_softplus)
                dtu_RTE = dt_RTE * u_RTE
                g_RTE = grad[rows, span].to(dtype)
                z_RTE = None if z is None else z[rows, span].to(dtype).contiguous()
                gy_RTE = g_RTE if z_RTE is None else g_RTE * elementwise(F.silu, z_RTE)
                y_RTE = None if z_RTE is None else _empty_like(dtu_RTE)
                gdt_RTE, gdtu_RTE = _empty_like(dtu_RTE), _empty_like(dtu_RTE)
                for cols in blocks.columns():
                    before = states[rows, kept - 1, :, cols] if kept > 0 else None
                    for s, dt_s, dtu_s in passed:
                        decay, h, _ = blocks.views(rows, s, cols)
                        steps = dt_s[..., cols], dtu_s[..., cols], rate_NE[:, cols]
                        before = _states(decay, h, *steps, Bs[rows, s], before, reverse).clone()
                    decay, h, g = blocks.views(rows, span, cols)
                    dt, dtu, gy = dt_RTE[..., cols], dtu_RTE[..., cols], gy_RTE[..., cols]
                    carry = carry_RNE[..., cols]
                    _states(decay, h, dt, dtu, rate_NE[:, cols], B_RTN, before, reverse)
                    if y_RTE is not None:
                        _contract_states(C_RTN, h, y_RTE[..., cols])
                    grad_C[rows, span] += _contract_channels(gy, h)
                    _adjoint_states(decay, g, gy, C_RTN, carry, reverse, last_chunk=i == len(spans) - 1)
                    grad_B[rows, span] += _contract_channels(dtu, g)
                    _contract_states(B_RTN, g, gdtu_RTE[..., cols])
                    _through_exponential(decay, h, g, before, reverse)
                    sum_of_states(torch.mul(decay, A_NE[:, cols], out=h), gdt_RTE[..., cols])
                    grad_A_NE[:, cols] += sum_of_tokens(decay.mul_(dt.unsqueeze(2)))
                if z_RTE is not None and y_RTE is not None:
                    if D is not None:
                        y_RTE.addcmul_(u_RTE, D.to(dtype))
                    y_RTE.mul_(g_RTE)
                    grad_z[rows, span] = elementwise(torch.ops.aten.silu_backward, y_RTE, z_RTE)
                gdt_RTE.addcmul_(gdtu_RTE, u_RTE)
                if delta_softplus:
                    gdt_RTE.mul_(elementwise(torch.sigmoid, raw_RTE))
                grad_delta[rows, span] = gdt_RTE
                if delta_bias is not None:
                    grad_bias += sum_of_tokens(gdt_RTE)
                gdtu_RTE.mul_(dt_RTE)
                if D is not None:
                    gdtu_RTE.addcmul_(gy_RTE, D.to(dtype))
                    grad_D += sum_of_tokens(torch.mul(u_RTE, gy_RTE, out=room(u_RTE)))
                grad_u[rows, span] = gdtu_RTE
    return (
        grad_u,
        grad_delta,
        grad_A_NE.t().to(A.dtype, memory_format=torch.contiguous_format, copy=True),
        grad_B.to(B.dtype),
        grad_C.to(C.dtype),
        grad_D if D is None else grad_D.to(D.dtype),
        grad_z,
        grad_bias if delta_bias is None else grad_bias.to(delta_bias.dtype),
    )


class _Blocks:
    """Cuts batch and channels so that one buffer (R, T, N, X) fits in cache, and lends views of the buffers."""

    def __init__(self, u: Tensor, num_states: int, dtype: torch.dtype, buffers: int):
        self.batch, length, self.channels = u.shape
        self.num_states = num_states
        wanted = _BLOCK_ELEMENTS_CPU if u.device.type == "cpu" else _BLOCK_ELEMENTS_DEVICE
        per_channel = min(length, CHUNK) * num_states
        # A multiple of 64 channels keeps the vector loops free of remainders.
        self.step_columns = min(self.channels, max(64, 2 * wanted // per_channel // 64 * 64))
        self.step_rows = max(1, min(self.batch, wanted // (per_channel * self.step_columns)))
        size = self.step_rows * per_channel * self.step_columns
        self.buffers = [torch.empty(size + spare(size), dtype=dtype, device=u.device) for _ in range(buffers)]

    def rows(self) -> Iterator[slice]:
        return _cuts(self.batch, self.step_rows)

    def columns(self) -> Iterator[slice]:
        return _cuts(self.channels, self.step_columns)

    def views(self, rows: slice, span: slice, cols: slice) -> list[Tensor]:
        """One contiguous (R,T,N,X) view of each buffer."""
        shape = (rows.stop - rows.start, span.stop - span.start, self.num_states, cols.stop - cols.start)
        size = math.prod(shape)
        return [buffer[:size].view(shape) for buffer in self.buffers]


def _cuts(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _spans(length: int, reverse: bool) -> list[slice]:
    """The chunks in the order in which the scan visits them; CHUNK counts from the first visited token."""
    spans = _cuts(length, CHUNK)
    return [slice(length - s.stop, length - s.start) for s in spans] if reverse else list(spans)


def _base_two_rate(A: Tensor, dtype: torch.dtype) -> Tensor:
    # exp2 is several times faster than exp on the CPU, so that log2(e) goes into A once.
    return (A.to(dtype).t() * _LOG2_E).contiguous()


def _raw_step(delta: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    raw = delta.to(dtype)
    return raw if bias is None else torch.add(raw, bias.to(dtype), out=room(raw))


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _step_size(raw: Tensor, softplus: bool) -> Tensor:
    return elementwise(F.softplus, raw) if softplus else raw


def _states(
    decay: Tensor,
    h: Tensor,
    dt: Tensor,
    dtu: Tensor,
    rate: Tensor,
    B_RTN: Tensor,
    carry: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Fill ``decay`` with exp(dt A) and ``h`` with the states of the chunk; return the last visited state (R,N,X)."""
    # In place: the buffers of blocks have room behind them.
    elementwise(torch.exp2_, torch.mul(dt.unsqueeze(2), rate, out=decay))
    torch.mul(dtu.unsqueeze(2), B_RTN.unsqueeze(3), out=h)
    tokens = list(zip(decay.unbind(1), h.unbind(1), strict=True))
    if reverse:
        tokens.reverse()
    decay_t, h_t = tokens[0]
    if carry is not None:
        h_t.addcmul_(decay_t, carry)
    for decay_t, h_next in tokens[1:]:
        h_t = h_next.addcmul_(decay_t, h_t)
    return h_t


def _adjoint_states(
    decay: Tensor, g: Tensor, gy: Tensor, C_RTN: Tensor, carry: Tensor, reverse: bool, last_chunk: bool
) -> None:
    """Fill ``g`` with the gradients of the states; ``carry`` (R,N,X) hands on what the chunk before receives."""
    torch.mul(gy.unsqueeze(2), C_RTN.unsqueeze(3), out=g)
    tokens = list(zip(decay.unbind(1), g.unbind(1), strict=True))
    if not reverse:
        tokens.reverse()
    decay_t, g_t = tokens[0]
    if not last_chunk:
        g_t.add_(carry)
    for decay_before, g_before in tokens[1:]:
        g_before.addcmul_(decay_t, g_t)
        decay_t, g_t = decay_before, g_before
    torch.mul(decay_t, g_t, out=carry)


def _through_exponential(decay: Tensor, h: Tensor, g: Tensor, before: Tensor | None, reverse: bool) -> None:
    """Turn ``decay`` into the gradient of the exponent dt A: g_l * h_(l-1) * exp(dt_l A)."""
    first = -1 if reverse else 0
    now, previous = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    decay[:, now].mul_(h[:, previous])
    if before is None:
        decay[:, first].zero_()
    else:
        decay[:, first].mul_(before)
    decay.mul_(g)


def _contract_states(weight_RTN: Tensor, block: Tensor, out_RTX: Tensor) -> None:
    """out[r,t,x] = sum over n of weight[r,t,n] * block[r,t,n,x]."""
    weight = weight_RTN.flatten(0, 1).unsqueeze(1)
    if out_RTX.is_contiguous():
        torch.bmm(weight, block.flatten(0, 1), out=out_RTX.view(-1, 1, out_RTX.shape[2]))
    else:
        out_RTX.copy_(torch.bmm(weight, block.flatten(0, 1)).view(out_RTX.shape))


def _contract_channels(weight_RTX: Tensor, block: Tensor) -> Tensor:
    """(R,T,N): sum over x of weight[r,t,x] * block[r,t,n,x]."""
    weight = weight_RTX.flatten(0, 1).unsqueeze(1)
    return torch.bmm(weight, block.flatten(0, 1).transpose(1, 2)).view(block.shape[:3])


register("zigflow::chunked_scan", "zigflow::chunked_scan_backward", chunked_scan_backward, "torch")
