"""Triton kernels of the causal convolution; imported only where Triton is.

Channels lie across the lanes, ``TILE`` tokens across the registers of a lane; the W taps are W shifted loads, all but
the first of them out of the cache. Sums over tokens are written per program and added up outside in a fixed order.
L and E are kept from the compiler: it would load several channels to a lane, spread tokens over the lanes for that, and
pay for it in shuffles and barriers.

Shapes: B batch, L tokens, E channels, W taps, P programs along B and L.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _place(L, TILE: tl.constexpr):
    """The row, for 64-bit offsets, and the tile of tokens of a program: neighbors share the tokens before a tile."""
    tiles = (L + TILE - 1) // TILE
    row = tl.program_id(0) // tiles
    return row.to(tl.int64), tl.program_id(0) - row * tiles


@triton.jit
def _pre_activation(x, taps_WE, bias, row, tokens, cols, inside, L, E,
                    W: tl.constexpr, HAS_BIAS: tl.constexpr, REVERSE: tl.constexpr, TILE: tl.constexpr,
                    WIDTH: tl.constexpr):  # fmt: skip
    y = tl.zeros((TILE, WIDTH), dtype=tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    for shift in tl.static_range(W):
        seen = tokens + shift if REVERSE else tokens - shift
        there = ((seen >= 0) & (seen < L) & (tokens < L))[:, None] & inside[None, :]
        value = tl.load(x + (row * L + seen)[:, None] * E + cols[None, :], mask=there, other=0.0).to(
            tl.float32
        )
        tap = tl.load(taps_WE + (W - 1 - shift) * E + cols, mask=inside, other=0.0).to(tl.float32)
        y += value * tap[None, :]
    return y


@triton.jit(do_not_specialize=["L", "E"])
def conv_forward(x, taps_WE, bias, out, L, E,
                 W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, REVERSE: tl.constexpr,
                 TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """``out`` (B,L,E)."""
    row, tile = _place(L, TILE)
    tokens = tile * TILE + tl.arange(0, TILE)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = cols < E
    y = _pre_activation(x, taps_WE, bias, row, tokens, cols, inside, L, E, W, HAS_BIAS, REVERSE, TILE, WIDTH)
    if SILU:
        y *= _sigmoid(y)
    both = (tokens < L)[:, None] & inside[None, :]
    tl.store(out + (row * L + tokens)[:, None] * E + cols[None, :], y.to(out.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["L", "E"])
def conv_backward_taps(grad, x, taps_WE, bias, grad_y, grad_taps, grad_bias, L, E,
                       W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, REVERSE: tl.constexpr,
                       TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """``grad_y`` (B,L,E) float32 before the SiLU, and the parts ``grad_taps`` (P,W,E) and ``grad_bias`` (P,E)."""
    row, tile = _place(L, TILE)
    tokens = tile * TILE + tl.arange(0, TILE)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = cols < E
    both = (tokens < L)[:, None] & inside[None, :]
    here = (row * L + tokens)[:, None] * E + cols[None, :]
    g = tl.load(grad + here, mask=both, other=0.0).to(tl.float32)
    if SILU:
        y = _pre_activation(
            x, taps_WE, bias, row, tokens, cols, inside, L, E, W, HAS_BIAS, REVERSE, TILE, WIDTH
        )
        open_ = _sigmoid(y)
        g *= open_ * (1.0 + y * (1.0 - open_))
    tl.store(grad_y + here, g, mask=both)
    part = tl.program_id(0).to(tl.int64)
    for shift in tl.static_range(W):
        seen = tokens + shift if REVERSE else tokens - shift
        there = ((seen >= 0) & (seen < L) & (tokens < L))[:, None] & inside[None, :]
        value = tl.load(x + (row * L + seen)[:, None] * E + cols[None, :], mask=there, other=0.0).to(
            tl.float32
        )
        tl.store(grad_taps + (part * W + W - 1 - shift) * E + cols, tl.sum(value * g, axis=0), mask=inside)
    if HAS_BIAS:
        tl.store(grad_bias + part * E + cols, tl.sum(g, axis=0), mask=inside)
