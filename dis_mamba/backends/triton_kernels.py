"""Triton kernels of the selective scan; imported only where Triton is.

Layout: a program is one warp. It owns one batch row, a stretch of the sequence and 32 channels, or twice 32. Channels
lie across the lanes, states and tokens across the registers of a lane, so that the recurrence needs neither shuffles
nor shared memory. Every vector is 32 values long, one to a lane, so that the compiler has no second layout to choose;
lists of vectors are tuples. More than ``NB`` states are taken in blocks, one after the other.

Forward (here) walks token by token with ``NB`` states in registers, and leaves a state every ``CHUNK`` tokens.
Backward is in triton_backward.py. Where a batch is too small to fill a GPU, sequences are cut into segments of whole
chunks, with a program each: ``segment_ends`` walks every segment from zero, ``join_segments`` makes of these ends what
really enters each segment, and the walk proper starts from there.

Steps count in the order of the walk: step s is token s, or token L - 1 - s when ``REVERSE``. No value depends on the
order in which programs run, so that results are the same from run to run.

Shapes: B batch, L tokens, E channels, N states, S segments, C chunks.
"""

import os

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Triton's own exp2 scales its argument to save subnormal results: three instructions more, on a decay of 1e-38.
_PTX = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def exp2(x):
    if _PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def anew(x):
    """An int32, of which the compiler knows nothing: addresses that follow from it are not those of an earlier use."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return x


@triton.jit
def softplus(x):
    # log(1 + e) loses all digits of a small e; two terms of the series do not.
    e = exp2(tl.minimum(x, 20.0) * LOG2_E)
    series = e * (1.0 - e * (0.5 - e * 0.33333333333))
    return tl.where(x > 20.0, x, tl.where(e < 0.0078125, series, tl.log(1.0 + e)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp2(-x * LOG2_E))


@triton.jit
def step_size(raw, shift, live, SOFTPLUS: tl.constexpr):
    """dt of a step; 0 where the step is not ``live``: it leaves the state as it is and takes nothing in."""
    dt = raw.to(tl.float32) + shift
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(live, dt, 0.0)


@triton.jit
def token_of(row, s, i: tl.constexpr, L, REVERSE: tl.constexpr):
    """Where step s + i lies in (B L); the constant comes last, so that it becomes part of an instruction's address."""
    return row * L + (L - 1 - s) - i if REVERSE else row * L + s + i


@triton.jit
def is_below(s, last, COUNT: tl.constexpr):
    """s < last as a vector of ``COUNT``: the interpreter cannot join a vector and a scalar by "and"."""
    return tl.full((COUNT,), s, tl.int32) < last


@triton.jit
def load_steps(sequence, row, s, L, E, cols, inside, COUNT: tl.constexpr, REVERSE: tl.constexpr):
    """``COUNT`` vectors, of the steps from s on; zeros before the first step and after the last."""
    values = ()
    for i in tl.static_range(COUNT):
        live = is_below(s + i, L, 32) & is_below(-1, s + i, 32)
        here = sequence + token_of(row, s, i, L, REVERSE) * E + cols
        values = values + (tl.load(here, mask=inside & live, other=0.0),)
    return values


# One binary for every L and E. E unknown to the compiler also keeps it from storing rows in another layout.
@triton.jit(do_not_specialize=["L", "E", "segment_steps"])
def scan_forward(
    u, delta, A_NE, B, C, D, z, bias, starts, partial, out, states,
    L, E, segment_steps,
    N: tl.constexpr, NB: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, STARTS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Outputs ``out`` (B,L,E) and ``states`` (B,C-1,N,E) float32; A_NE is in base two.

    ``starts`` (B,S,N,E) holds the state that enters a segment when ``STARTS``, else it is zero. ``partial`` (B,L,E) in
    float32 is scratch for the sums over blocks of states, where there are several.
    """
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(2)
    first = segment * segment_steps
    last = tl.minimum(first + segment_steps, L)
    boundaries = (L + CHUNK - 1) // CHUNK - 1
    blocks: tl.constexpr = (N + NB - 1) // NB
    for block in range(blocks):
        # No address is kept in registers while the other blocks are walked.
        part = anew(tl.program_id(1)) if blocks > 1 else tl.program_id(1)
        cols = part * 32 + tl.arange(0, 32)
        inside = cols < E
        skip = tl.load(D + cols, mask=inside, other=0.0) if HAS_D else 0.0
        shift = tl.load(bias + cols, mask=inside, other=0.0) if HAS_BIAS else 0.0
        ns = block * NB + tl.arange(0, NB)
        real = (ns < N)[:, None] & inside[None, :]
        plane = ns[:, None] * E + cols[None, :]
        A = tl.load(A_NE + plane, mask=real, other=0.0)
        h = tl.zeros((NB, 32), dtype=tl.float32)
        if STARTS:
            entering = starts + (row * tl.num_programs(2) + segment) * N * E
            h = tl.load(entering + plane, mask=real, other=0.0)
        # The sequences of the next group are on their way while this one is computed.
        next_x = load_steps(u, row, first, L, E, cols, inside, GROUP, REVERSE)
        next_dt = load_steps(delta, row, first, L, E, cols, inside, GROUP, REVERSE)
        if HAS_Z:
            next_z = load_steps(z, row, first, L, E, cols, inside, GROUP, REVERSE)
        for s in range(first, last, GROUP):
            xs, dts = next_x, next_dt
            next_x = load_steps(u, row, s + GROUP, L, E, cols, inside, GROUP, REVERSE)
            next_dt = load_steps(delta, row, s + GROUP, L, E, cols, inside, GROUP, REVERSE)
            if HAS_Z:
                gates = next_z
                next_z = load_steps(z, row, s + GROUP, L, E, cols, inside, GROUP, REVERSE)
            ys = ()
            for i in tl.static_range(GROUP):
                live = s + i < L
                token = token_of(row, s, i, L, REVERSE)
                b = tl.load(B + token * N + ns, mask=(ns < N) & is_below(s + i, L, NB), other=0.0).to(
                    tl.float32
                )
                c = tl.load(C + token * N + ns, mask=(ns < N) & is_below(s + i, L, NB), other=0.0).to(
                    tl.float32
                )
                x = xs[i].to(tl.float32)
                dt = step_size(dts[i], shift, live, SOFTPLUS)
                h = exp2(dt[None, :] * A) * h + (dt * x)[None, :] * b[:, None]
                ys = ys + (tl.sum(h * c[:, None], axis=0),)
            for i in tl.static_range(GROUP):
                here = token_of(row, s, i, L, REVERSE) * E
                mask = inside & is_below(s + i, L, 32)
                y = ys[i]
                if blocks > 1:
                    y += tl.load(partial + here + cols, mask=mask & is_below(0, block, 32), other=0.0)
                    tl.store(partial + here + cols, y, mask=mask & is_below(block, blocks - 1, 32))
                y += skip * xs[i].to(tl.float32)
                if HAS_Z:
                    gate = gates[i].to(tl.float32)
                    y = y * gate * sigmoid(gate)
                tl.store(
                    out + here + cols, y.to(out.dtype.element_ty), mask=mask & is_below(blocks - 2, block, 32)
                )
            if (s + GROUP) % CHUNK == 0 and s + GROUP < L:
                boundary = row * boundaries + (s + GROUP) // CHUNK - 1
                tl.store(states + boundary * N * E + plane, h, mask=real)


@triton.jit(do_not_specialize=["L", "E", "segment_steps"])
def segment_ends(
    value, delta, A_NE, taken, gate, bias, ends, spans,
    L, E, segment_steps,
    N: tl.constexpr, NB: tl.constexpr, GROUP: tl.constexpr, ADJOINT: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What leaves each segment if zero enters, written to ``ends`` (B,S,N,E) of the segment that it goes to: the next
    one, or the one before for the gradient of the state (``ADJOINT``). The sums of the steps go to ``spans`` (B,S,E).

    ``value`` and ``taken`` are u and B, or the gradient of the output (with its gate) and C.
    """
    row = tl.program_id(0).to(tl.int64)
    segments = tl.num_programs(2) + 1
    segment = tl.program_id(2) + 1 if ADJOINT else tl.program_id(2)
    cols = tl.program_id(1) * 32 + tl.arange(0, 32)
    inside = cols < E
    first = segment * segment_steps
    last = tl.minimum(first + segment_steps, L)
    shift = tl.load(bias + cols, mask=inside, other=0.0) if HAS_BIAS else 0.0
    blocks: tl.constexpr = (N + NB - 1) // NB
    for block in range(blocks):
        ns = block * NB + tl.arange(0, NB)
        real = (ns < N)[:, None] & inside[None, :]
        plane = ns[:, None] * E + cols[None, :]
        A = tl.load(A_NE + plane, mask=real, other=0.0)
        h = tl.zeros((NB, 32), dtype=tl.float32)
        span = tl.zeros((32,), dtype=tl.float32)
        for walked in range(0, last - first, GROUP):
            s = last - GROUP - walked if ADJOINT else first + walked
            values = load_steps(value, row, s, L, E, cols, inside, GROUP, REVERSE)
            dts = load_steps(delta, row, s, L, E, cols, inside, GROUP, REVERSE)
            if HAS_Z:
                gates = load_steps(gate, row, s, L, E, cols, inside, GROUP, REVERSE)
            for k in tl.static_range(GROUP):
                at = s + (GROUP - 1 - k if ADJOINT else k)
                token = token_of(row, at, 0, L, REVERSE)
                b = tl.load(
                    taken + token * N + ns,
                    mask=(ns < N) & is_below(at, last, NB) & is_below(first - 1, at, NB),
                    other=0.0,
                ).to(tl.float32)
                x = values[GROUP - 1 - k if ADJOINT else k].to(tl.float32)
                if HAS_Z:
                    open_ = gates[GROUP - 1 - k if ADJOINT else k].to(tl.float32)
                    x = x * open_ * sigmoid(open_)
                dt = step_size(
                    dts[GROUP - 1 - k if ADJOINT else k], shift, (at >= first) & (at < last), SOFTPLUS
                )
                decay = exp2(dt[None, :] * A)
                if ADJOINT:
                    h = decay * (h + x[None, :] * b[:, None])
                else:
                    h = decay * h + (dt * x)[None, :] * b[:, None]
                span += dt
        target = row * segments + (segment - 1 if ADJOINT else segment + 1)
        tl.store(ends + target * N * E + plane, h, mask=real)
        tl.store(spans + (row * segments + segment) * E + cols, span, mask=inside)


@triton.jit(do_not_specialize=["E", "segments"])
def join_segments(A_NE, spans, ends, E, segments, N: tl.constexpr, NB: tl.constexpr, ADJOINT: tl.constexpr):
    """``ends`` (B,S,N,E) becomes what enters each segment; zero enters the first, or the last when ``ADJOINT``."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * 32 + tl.arange(0, 32)
    inside = cols < E
    ns = tl.program_id(2) * NB + tl.arange(0, NB)
    real = (ns < N)[:, None] & inside[None, :]
    plane = ns[:, None] * E + cols[None, :]
    A = tl.load(A_NE + plane, mask=real, other=0.0)
    h = tl.zeros((NB, 32), dtype=tl.float32)
    for left in range(segments - 1):
        segment = row * segments + (segments - 1 - left if ADJOINT else left)
        target = segment - 1 if ADJOINT else segment + 1
        span = tl.load(spans + segment * E + cols, mask=inside, other=0.0)
        own = tl.load(ends + target * N * E + plane, mask=real, other=0.0)
        h = own + exp2(span[None, :] * A) * h
        tl.store(ends + target * N * E + plane, h, mask=real)
