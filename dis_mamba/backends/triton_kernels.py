"""Triton kernels of the selective scan; imported only where Triton is.

Layout: one program owns one batch row and ``WIDTH`` channels for the whole sequence. Channels lie across the lanes
of a warp, states and tokens across the registers of a lane, so that the recurrence needs neither shuffles nor
shared memory. Forward walks token by token with the states (N, WIDTH) in registers. Backward walks the chunks from
the last to the first: it runs each chunk forward once to leave a state every ``TILE`` tokens, then takes these tiles
from the last to the first, one state index at a time, as two scans over the tokens of the tile.

Steps count in the order of the walk: step s is token s, or token L - 1 - s when ``REVERSE``. Sums over channels are
written per program and added up outside in a fixed order, so that results are the same from run to run.

Shapes: B batch, L tokens, E channels, N states, S chunk boundaries, P programs along E.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def _softplus(x):
    # log(1 + e) loses all digits of a small e; two terms of the series do not.
    e = _exp(tl.minimum(x, 20.0))
    series = e * (1.0 - e * (0.5 - e * 0.33333333333))
    return tl.where(x > 20.0, x, tl.where(e < 0.0078125, series, tl.log(1.0 + e)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def _follow(decay_a, h_a, decay_b, h_b):
    """Steps a, then steps b, of h -> decay h + input."""
    return decay_a * decay_b, decay_b * h_a + h_b


@triton.jit
def _follow_before(decay_a, q_a, before_a, left_a, decay_b, q_b, before_b, left_b):
    """As ``_follow``, and beside it what stood before the last step: ``before`` times the carry plus ``left``."""
    return (
        decay_a * decay_b,
        decay_b * q_a + q_b,
        decay_a * before_b,
        before_b * q_a + left_b,
    )


@triton.jit
def scan_forward(
    u, delta, A_NE, B, C, D, z, bias, out, states,
    L, E,
    N: tl.constexpr, NP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs ``out`` (B,L,E) and ``states`` (B,S,N,E) float32; A_NE is in base two."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = cols < E
    ns = tl.arange(0, NP)
    real = (ns < N)[:, None] & inside[None, :]
    A = tl.load(A_NE + ns[:, None] * E + cols[None, :], mask=real, other=0.0)
    skip = tl.load(D + cols, mask=inside, other=0.0) if HAS_D else 0.0
    shift = tl.load(bias + cols, mask=inside, other=0.0) if HAS_BIAS else 0.0
    boundaries = (L + CHUNK - 1) // CHUNK - 1
    h = tl.zeros((NP, WIDTH), dtype=tl.float32)
    for s in tl.range(0, L, num_stages=STAGES):
        token = row * L + (L - 1 - s if REVERSE else s)
        here = token * E + cols
        x = tl.load(u + here, mask=inside, other=0.0).to(tl.float32)
        dt = tl.load(delta + here, mask=inside, other=0.0).to(tl.float32) + shift
        if SOFTPLUS:
            dt = _softplus(dt)
        b = tl.load(B + token * N + ns, mask=ns < N, other=0.0).to(tl.float32)
        c = tl.load(C + token * N + ns, mask=ns < N, other=0.0).to(tl.float32)
        h = tl.exp2(dt[None, :] * A) * h + (dt * x)[None, :] * b[:, None]
        y = tl.sum(h * c[:, None], axis=0) + skip * x
        if HAS_Z:
            gate = tl.load(z + here, mask=inside, other=0.0).to(tl.float32)
            y = y * gate * _sigmoid(gate)
        tl.store(out + here, y.to(out.dtype.element_ty), mask=inside)
        if (s + 1) % CHUNK == 0 and s + 1 < L:
            at = ((row * boundaries + (s + 1) // CHUNK - 1) * N + ns[:, None]) * E + cols[None, :]
            tl.store(states + at, h, mask=real)


@triton.jit
def scan_backward(
    grad, u, delta, A_NE, B, C, D, z, bias, states,
    grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias, tiles, carry,
    L, E,
    N: tl.constexpr, NP: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients; sums come in parts: grad_A (B,N,E), grad_B and grad_C (P,B,L,N), grad_D and grad_bias (B,E).

    ``tiles`` (B, CHUNK/TILE, N, E) and ``carry`` (B,N,E) are scratch; grad_A and carry come filled with zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(0)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = cols < E
    ns = tl.arange(0, NP)
    real = (ns < N)[:, None] & inside[None, :]
    A = tl.load(A_NE + ns[:, None] * E + cols[None, :], mask=real, other=0.0)
    skip = tl.load(D + cols, mask=inside, other=0.0) if HAS_D else tl.zeros((WIDTH,), dtype=tl.float32)
    shift = tl.load(bias + cols, mask=inside, other=0.0) if HAS_BIAS else tl.zeros((WIDTH,), dtype=tl.float32)
    chunks = (L + CHUNK - 1) // CHUNK
    per_chunk: tl.constexpr = CHUNK // TILE
    sum_D = tl.zeros((WIDTH,), dtype=tl.float32)
    sum_bias = tl.zeros((WIDTH,), dtype=tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        first = chunk * CHUNK
        h = tl.zeros((NP, WIDTH), dtype=tl.float32)
        if chunk > 0:
            at = ((row * (chunks - 1) + chunk - 1) * N + ns[:, None]) * E + cols[None, :]
            h = tl.load(states + at, mask=real, other=0.0)
        for s in tl.range(first, tl.minimum(first + CHUNK - TILE + 1, L), num_stages=STAGES):
            if (s - first) % TILE == 0:
                at = ((row * per_chunk + (s - first) // TILE) * N + ns[:, None]) * E + cols[None, :]
                tl.store(tiles + at, h, mask=real)
            token = row * L + (L - 1 - s if REVERSE else s)
            here = token * E + cols
            x = tl.load(u + here, mask=inside, other=0.0).to(tl.float32)
            dt = tl.load(delta + here, mask=inside, other=0.0).to(tl.float32) + shift
            if SOFTPLUS:
                dt = _softplus(dt)
            b = tl.load(B + token * N + ns, mask=ns < N, other=0.0).to(tl.float32)
            h = tl.exp2(dt[None, :] * A) * h + (dt * x)[None, :] * b[:, None]
        # What one lane has stored another may read: the two loops spread states over lanes differently.
        tl.debug_barrier()
        for tile_back in range(per_chunk):
            tile = per_chunk - 1 - tile_back
            steps = first + tile * TILE + tl.arange(0, TILE)
            if first + tile * TILE < L:
                walked = steps < L
                tokens = row * L + tl.where(walked, (L - 1 - steps) if REVERSE else steps, 0)
                both = walked[:, None] & inside[None, :]
                here = tokens[:, None] * E + cols[None, :]
                x = tl.load(u + here, mask=both, other=0.0).to(tl.float32)
                raw = tl.load(delta + here, mask=both, other=0.0).to(tl.float32) + shift[None, :]
                dt = _softplus(raw) if SOFTPLUS else raw
                # A step past the end leaves the state as it is and takes nothing in.
                dt = tl.where(both, dt, 0.0)
                dtx = dt * x
                g = tl.load(grad + here, mask=both, other=0.0).to(tl.float32)
                gy = g
                if HAS_Z:
                    gate = tl.load(z + here, mask=both, other=0.0).to(tl.float32)
                    open_ = _sigmoid(gate)
                    gy = g * gate * open_
                y = tl.zeros((TILE, WIDTH), dtype=tl.float32)
                g_dt = tl.zeros((TILE, WIDTH), dtype=tl.float32)
                g_dtx = tl.zeros((TILE, WIDTH), dtype=tl.float32)
                for n in range(N):
                    lane = (row * N + n) * E + cols
                    rate = tl.load(A_NE + n * E + cols, mask=inside, other=0.0)
                    b = tl.load(B + tokens * N + n, mask=walked, other=0.0).to(tl.float32)
                    c = tl.load(C + tokens * N + n, mask=walked, other=0.0).to(tl.float32)
                    start = tl.load(
                        tiles + ((row * per_chunk + tile) * N + n) * E + cols, mask=inside, other=0.0
                    )
                    after = tl.load(carry + lane, mask=inside, other=0.0)
                    decay = tl.exp2(dt * rate[None, :])
                    drive = dtx * b[:, None]
                    product, h_n = tl.associative_scan((decay, drive), 0, _follow)
                    h_n += product * start[None, :]
                    # q = decay * (gradient of the state); the gradient itself is gy c plus the q of the next step.
                    gyc = gy * c[:, None]
                    zero, one = tl.zeros_like(decay), tl.full(decay.shape, 1.0, tl.float32)
                    whole, q, before, left = tl.associative_scan(
                        (decay, decay * gyc, one, zero), 0, _follow_before, reverse=True
                    )
                    g_h = gyc + left + before * after[None, :]
                    # The state before the step, decayed, is the state less what the step took in.
                    g_exponent = g_h * (h_n - drive)
                    g_dt += g_exponent * rate[None, :]
                    g_dtx += g_h * b[:, None]
                    if HAS_Z:
                        y += h_n * c[:, None]
                    sums = (part * rows * L + tokens) * N + n
                    tl.store(grad_B + sums, tl.sum(g_h * dtx, axis=1), mask=walked)
                    tl.store(grad_C + sums, tl.sum(gy * h_n, axis=1), mask=walked)
                    mine = tl.load(grad_A + lane, mask=inside, other=0.0)
                    tl.store(grad_A + lane, mine + tl.sum(g_exponent * dt, axis=0), mask=inside)
                    head = (tl.arange(0, TILE) == 0)[:, None]
                    tl.store(
                        carry + lane,
                        tl.sum(tl.where(head, q + whole * after[None, :], 0.0), axis=0),
                        mask=inside,
                    )
                # Base two back to base e.
                g_dt = g_dt * 0.6931471805599453 + g_dtx * x
                if SOFTPLUS:
                    g_dt = g_dt * _sigmoid(raw)
                g_dt = tl.where(both, g_dt, 0.0)
                tl.store(grad_delta + here, g_dt.to(grad_delta.dtype.element_ty), mask=both)
                tl.store(
                    grad_u + here, (g_dtx * dt + gy * skip[None, :]).to(grad_u.dtype.element_ty), mask=both
                )
                if HAS_Z:
                    slope = open_ * (1.0 + gate * (1.0 - open_))
                    tl.store(
                        grad_z + here,
                        (g * (y + skip[None, :] * x) * slope).to(grad_z.dtype.element_ty),
                        mask=both,
                    )
                sum_D += tl.sum(gy * x, axis=0)
                sum_bias += tl.sum(g_dt, axis=0)
            tl.debug_barrier()
    if HAS_D:
        tl.store(grad_D + row * E + cols, sum_D, mask=inside)
    if HAS_BIAS:
        tl.store(grad_bias + row * E + cols, sum_bias, mask=inside)
