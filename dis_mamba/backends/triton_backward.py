"""The gradients of the selective scan in Triton; layout and words are those of triton_kernels.py.

A program walks its chunks from the last to the first. It runs each chunk forward once, to leave a state every ``TILE``
steps, then takes these tiles from the last to the first, one state index after the other: the decays and states of a
tile are made once more and stay in registers, and its gradients are taken step by step on the way back.

Registers are what is short: 200 values of a tile live through its states. ``anew`` keeps addresses out of them.
"""

# Tuples that grow in unrolled loops are Triton's, not Python's.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .triton_kernels import anew, exp2, is_below, load_steps, sigmoid, step_size, token_of

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _over_lanes(values, COUNT: tl.constexpr):
    """Sums over the lanes of ``COUNT`` vectors, a power of two up to 32: lane i holds that of vector i % COUNT.

    Lanes exchange in pairs; each keeps one of two vectors, so that their number halves with every exchange: 16 shuffles
    for 16 vectors, where summing them one by one takes 80.
    """
    lane = tl.arange(0, 32)
    for k in tl.static_range(5):
        if COUNT >> k > 1:
            upper = (lane & (1 << k)) != 0
            half = ()
            for j in tl.static_range(COUNT >> (k + 1)):
                kept = tl.where(upper, values[2 * j + 1], values[2 * j])
                given = tl.where(upper, values[2 * j], values[2 * j + 1])
                half = half + (kept + tl.gather(given, lane ^ (1 << k), 0),)
            values = half
        else:
            values = (values[0] + tl.gather(values[0], lane ^ (1 << k), 0),)
    return values[0]


@triton.jit
def _states_of_tiles(
    u, delta, A_NE, B, bias, states, tiles,
    row, chunk, part, L, E,
    N: tl.constexpr, NB: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states before each tile of a chunk into ``tiles`` (CHUNK/TILE, N, 32 VECTORS)."""
    chunks = (L + CHUNK - 1) // CHUNK
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, L)
    lane = tl.arange(0, 32)
    width: tl.constexpr = 32 * VECTORS
    for block in range((N + NB - 1) // NB * VECTORS):
        ns = block // VECTORS * NB + tl.arange(0, NB)
        within = block % VECTORS * 32 + lane
        cols = part * 32 * VECTORS + within
        inside = cols < E
        real = (ns < N)[:, None] & inside[None, :]
        plane = ns[:, None] * E + cols[None, :]
        A = tl.load(A_NE + plane, mask=real, other=0.0)
        shift = tl.load(bias + cols, mask=inside, other=0.0) if HAS_BIAS else 0.0
        boundary = row * (chunks - 1) + chunk - 1
        h = tl.load(states + boundary * N * E + plane, mask=real & is_below(0, chunk, NB)[:, None], other=0.0)
        for s in range(first, last, GROUP):
            if (s - first) % TILE == 0:
                at = ((s - first) // TILE * N + ns[:, None]) * width + within[None, :]
                tl.store(tiles + at, h, mask=(ns < N)[:, None])
            xs = load_steps(u, row, s, L, E, cols, inside, GROUP, REVERSE)
            dts = load_steps(delta, row, s, L, E, cols, inside, GROUP, REVERSE)
            for i in tl.static_range(GROUP):
                live = s + i < L
                token = token_of(row, s, i, L, REVERSE)
                b = tl.load(B + token * N + ns, mask=(ns < N) & is_below(s + i, L, NB), other=0.0).to(
                    tl.float32
                )
                dt = step_size(dts[i], shift, live, SOFTPLUS)
                h = exp2(dt[None, :] * A) * h + (dt * xs[i].to(tl.float32))[None, :] * b[:, None]


# Whole-row stores into ``tiles`` would be made in another layout if its alignment were known.
@triton.jit(do_not_specialize=["L", "E", "segment_chunks"], do_not_specialize_on_alignment=["tiles"])
def scan_backward(
    grad, u, delta, A_NE, B, C, D, z, bias, states,
    grad_u, grad_delta, grad_z, grad_E, grad_BC, tiles, carry,
    L, E, segment_chunks,
    N: tl.constexpr, NB: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients; with P programs along E and T tiles in L, sums come in parts: those over tokens in grad_E (B,S,N+2,E),
    of A, D and bias, those over channels in grad_BC (P,B,T,N,2,TILE), of B and C in the order of the steps.

    ``tiles`` (B,S,P,CHUNK/TILE,N,32 VECTORS) is scratch; ``carry`` (B,S,N,E) holds the decayed gradient of the state
    that enters each segment from behind, and is written over.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    segment = tl.program_id(2)
    chunks = (L + CHUNK - 1) // CHUNK
    first_chunk = segment * segment_chunks
    last_chunk = tl.minimum(first_chunk + segment_chunks, chunks)
    end = tl.minimum(last_chunk * CHUNK, L)
    per_chunk: tl.constexpr = CHUNK // TILE
    width: tl.constexpr = 32 * VECTORS
    lane = tl.arange(0, 32)
    own = row * tl.num_programs(2) + segment
    tiles += (own * tl.num_programs(1) + part) * per_chunk * N * width
    carry += own * N * E
    grad_E += own * (N + 2) * E
    grad_BC += (part * tl.num_programs(0) + row) * ((L + TILE - 1) // TILE) * (N * 2 * TILE)
    zero = tl.zeros((32,), dtype=tl.float32)
    for back in range(last_chunk - first_chunk):
        chunk = last_chunk - 1 - back
        # What one lane has stored another may read.
        tl.debug_barrier()
        _states_of_tiles(
            u, delta, A_NE, B, bias, states, tiles, row, chunk, anew(part), L, E,
            N, NB, CHUNK, GROUP, TILE, VECTORS, HAS_BIAS, SOFTPLUS, REVERSE,
        )  # fmt: skip
        tl.debug_barrier()
        used = (tl.minimum(chunk * CHUNK + CHUNK, L) - chunk * CHUNK + TILE - 1) // TILE
        for tile_back in range(used):
            tile = used - 1 - tile_back
            base = chunk * CHUNK + tile * TILE
            cols = ()
            for v in tl.static_range(VECTORS):
                cols = cols + (anew(part) * width + v * 32 + lane,)
            dts = ()
            dtxs = ()
            gys = ()
            zeros = ()
            for v in tl.static_range(VECTORS):
                inside = cols[v] < E
                shift = tl.load(bias + cols[v], mask=inside, other=0.0) if HAS_BIAS else 0.0
                xs = load_steps(u, row, base, L, E, cols[v], inside, TILE, REVERSE)
                raws = load_steps(delta, row, base, L, E, cols[v], inside, TILE, REVERSE)
                gs = load_steps(grad, row, base, L, E, cols[v], inside, TILE, REVERSE)
                if HAS_Z:
                    gates = load_steps(z, row, base, L, E, cols[v], inside, TILE, REVERSE)
                for t in tl.static_range(TILE):
                    dt = step_size(raws[t], shift, base + t < L, SOFTPLUS)
                    gy = gs[t].to(tl.float32)
                    if HAS_Z:
                        gate = gates[t].to(tl.float32)
                        gy = gy * gate * sigmoid(gate)
                    dts = dts + (dt,)
                    dtxs = dtxs + (dt * xs[t].to(tl.float32),)
                    gys = gys + (gy,)
                    zeros = zeros + (zero,)
            g_dts = zeros
            g_dtxs = zeros
            ys = zeros
            for n in range(N):
                bs = ()
                cs = ()
                sums_B = ()
                sums_C = ()
                for t in tl.static_range(TILE):
                    at = token_of(row, base, t, L, REVERSE) * N + n
                    bs = bs + (tl.load(B + at, mask=base + t < L, other=0.0).to(tl.float32),)
                    cs = cs + (tl.load(C + at, mask=base + t < L, other=0.0).to(tl.float32),)
                    sums_B = sums_B + (zero,)
                    sums_C = sums_C + (zero,)
                # Loads first and stores last, so that none waits for another.
                rates = ()
                hs = ()
                qs = ()
                sums_A = ()
                for v in tl.static_range(VECTORS):
                    inside = cols[v] < E
                    again = inside & is_below(base + TILE, end, 32)
                    rates = rates + (tl.load(A_NE + n * E + cols[v], mask=inside, other=0.0),)
                    hs = hs + (tl.load(tiles + (tile * N + n) * width + v * 32 + lane),)
                    qs = qs + (tl.load(carry + n * E + cols[v], mask=inside, other=0.0),)
                    sums_A = sums_A + (tl.load(grad_E + n * E + cols[v], mask=again, other=0.0),)
                new_ys = ()
                new_g_dts = ()
                new_g_dtxs = ()
                new_qs = ()
                new_A = ()
                for v in tl.static_range(VECTORS):
                    rate = rates[v]
                    h = hs[v]
                    decays = ()
                    kept = ()
                    more = ()
                    for t in tl.static_range(TILE):
                        decay = exp2(dts[v * TILE + t] * rate)
                        # Taken as it is, not as the state less what the step took in, which cancels for large steps.
                        decayed = decay * h
                        h = decayed + dtxs[v * TILE + t] * bs[t]
                        more = more + (sums_C[t] + gys[v * TILE + t] * h,)
                        if HAS_Z:
                            new_ys = new_ys + (ys[v * TILE + t] + h * cs[t],)
                        else:
                            new_ys = new_ys + (zero,)
                        decays = decays + (decay,)
                        kept = kept + (decayed,)
                    sums_C = more
                    q = qs[v]
                    sum_A = sums_A[v]
                    # The way back makes its tuples from the last step to the first.
                    more = ()
                    back_g_dts = ()
                    back_g_dtxs = ()
                    for k in tl.static_range(TILE):
                        g_h = q + gys[v * TILE + TILE - 1 - k] * cs[TILE - 1 - k]
                        g_exponent = g_h * kept[TILE - 1 - k]
                        q = g_h * decays[TILE - 1 - k]
                        sum_A += g_exponent * dts[v * TILE + TILE - 1 - k]
                        back_g_dts = (g_dts[v * TILE + TILE - 1 - k] + g_exponent * rate,) + back_g_dts
                        back_g_dtxs = (
                            g_dtxs[v * TILE + TILE - 1 - k] + g_h * bs[TILE - 1 - k],
                        ) + back_g_dtxs
                        more = (sums_B[TILE - 1 - k] + g_h * dtxs[v * TILE + TILE - 1 - k],) + more
                    sums_B = more
                    new_g_dts = new_g_dts + back_g_dts
                    new_g_dtxs = new_g_dtxs + back_g_dtxs
                    new_qs = new_qs + (q,)
                    new_A = new_A + (sum_A,)
                for v in tl.static_range(VECTORS):
                    tl.store(carry + n * E + cols[v], new_qs[v], mask=cols[v] < E)
                    tl.store(grad_E + n * E + cols[v], new_A[v], mask=cols[v] < E)
                ys = new_ys
                g_dts = new_g_dts
                g_dtxs = new_g_dtxs
                at = ((base // TILE) * N + n) * (2 * TILE) + lane
                tl.store(grad_BC + at, _over_lanes(sums_B + sums_C, 2 * TILE), mask=lane < 2 * TILE)
            # Sums over the sequence go through memory, too: registers are what this kernel is short of.
            late = anew(base)
            for v in tl.static_range(VECTORS):
                inside = cols[v] < E
                shift = tl.load(bias + cols[v], mask=inside, other=0.0) if HAS_BIAS else 0.0
                skip = tl.load(D + cols[v], mask=inside, other=0.0) if HAS_D else 0.0
                again = inside & is_below(late + TILE, end, 32)
                sum_D = tl.load(grad_E + N * E + cols[v], mask=again, other=0.0) if HAS_D else zero
                sum_bias = (
                    tl.load(grad_E + (N + 1) * E + cols[v], mask=again, other=0.0) if HAS_BIAS else zero
                )
                xs = load_steps(u, row, late, L, E, cols[v], inside, TILE, REVERSE)
                raws = load_steps(delta, row, late, L, E, cols[v], inside, TILE, REVERSE)
                if HAS_Z:
                    gs = load_steps(grad, row, late, L, E, cols[v], inside, TILE, REVERSE)
                    gates = load_steps(z, row, late, L, E, cols[v], inside, TILE, REVERSE)
                for t in tl.static_range(TILE):
                    mask = inside & is_below(late + t, L, 32)
                    here = token_of(row, late, t, L, REVERSE) * E
                    x = xs[t].to(tl.float32)
                    g_dt = g_dts[v * TILE + t] * LN_2 + g_dtxs[v * TILE + t] * x
                    if SOFTPLUS:
                        g_dt = g_dt * sigmoid(raws[t].to(tl.float32) + shift)
                    g_dt = tl.where(mask, g_dt, 0.0)
                    tl.store(grad_delta + here + cols[v], g_dt.to(grad_delta.dtype.element_ty), mask=mask)
                    g_u = g_dtxs[v * TILE + t] * dts[v * TILE + t] + gys[v * TILE + t] * skip
                    tl.store(grad_u + here + cols[v], g_u.to(grad_u.dtype.element_ty), mask=mask)
                    if HAS_Z:
                        gate = gates[t].to(tl.float32)
                        open_ = sigmoid(gate)
                        slope = open_ * (1.0 + gate * (1.0 - open_))
                        g_z = gs[t].to(tl.float32) * (ys[v * TILE + t] + skip * x) * slope
                        tl.store(grad_z + here + cols[v], g_z.to(grad_z.dtype.element_ty), mask=mask)
                    sum_D += gys[v * TILE + t] * x
                    sum_bias += g_dt
                if HAS_D:
                    tl.store(grad_E + N * E + cols[v], sum_D, mask=inside)
                if HAS_BIAS:
                    tl.store(grad_E + (N + 1) * E + cols[v], sum_bias, mask=inside)
