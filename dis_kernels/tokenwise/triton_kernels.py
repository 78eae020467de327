"""Triton kernels of the work on single tokens around a mixer; imported only where Triton is.

Layout: a program holds the whole width of one token, ``BLOCK`` channels, in registers, so that the norm takes its mean
and its mean square of what it has read once. Forward has a program per token. Backward has one per run of ``run``
tokens of a row of the batch: it walks them and adds up, in registers, what is summed over tokens; its sums go to a
place of their own, and are added up outside in a fixed order, so that results are the same from run to run.

``rows[l]`` is the place of token l in the mixer's sequence. One that is no token's is neither written nor read.

Shapes: B batch, L tokens, D width, P programs, K sums.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(rows, token, row, length, width, HAS_ROWS: tl.constexpr):
    """Where the mixer's row of a token begins in (B L D), and its width: 0 where there is no such row."""
    at, size = token, width
    if HAS_ROWS:
        at = tl.load(rows + token)
        size = tl.where((at >= 0) & (at < length), width, 0)
        at = tl.where(size > 0, at, 0)
    return (row * length + at) * width, size


@triton.jit
def normed_of(value, inside, share, eps, CENTERED: tl.constexpr):
    """(x - mean) / sqrt(mean square + eps), and the factor 1 / sqrt(...); ``share`` is 1 / D."""
    if CENTERED:
        value = tl.where(inside, value - tl.sum(value, axis=0) * share, 0.0)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) * share + eps)
    return value * factor, factor


@triton.jit(do_not_specialize=["length"])
def read_forward(
    hidden, residual, weight, shift, scale, rows, x, normed, stream,
    length, width, shift_step, scale_step, eps,
    BLOCK: tl.constexpr, HAS_HIDDEN: tl.constexpr, HAS_WEIGHT: tl.constexpr, MODULATED: tl.constexpr,
    HAS_ROWS: tl.constexpr, KEEP_NORMED: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Outputs ``x``, ``normed`` (when ``KEEP_NORMED``) and ``stream`` (when ``HAS_HIDDEN``), each (B,L,D).

    ``shift_step`` and ``scale_step`` are the distances of two rows of shift and scale.
    """
    row = (tl.program_id(0) // length).to(tl.int64)
    token = tl.program_id(0) % length
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    here = tl.program_id(0).to(tl.int64) * width
    value = tl.load(residual + here + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_HIDDEN:
        value += tl.load(hidden + here + cols, mask=inside, other=0.0).to(tl.float32)
        # The norm is that of the stream as it is kept, which backward takes it of again.
        kept = value.to(stream.dtype.element_ty)
        tl.store(stream + here + cols, kept, mask=inside)
        value = kept.to(tl.float32)
    value, _ = normed_of(value, inside, 1.0 / width, eps, CENTERED)
    if HAS_WEIGHT:
        value *= tl.load(weight + cols, mask=inside, other=0.0)
    if KEEP_NORMED:
        tl.store(normed + here + cols, value.to(normed.dtype.element_ty), mask=inside)
    if MODULATED:
        value *= 1.0 + tl.load(scale + row * scale_step + cols, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(shift + row * shift_step + cols, mask=inside, other=0.0).to(tl.float32)
    there, size = place_of(rows, token, row, length, width, HAS_ROWS)
    tl.store(x + there + cols, value.to(x.dtype.element_ty), mask=cols < size)


@triton.jit(do_not_specialize=["length", "run", "runs"])
def read_backward(
    grad_x, grad_normed, grad_stream, stream, weight, scale, rows, grad_residual, sums,
    length, width, run, runs, scale_step, eps,
    BLOCK: tl.constexpr, HAS_X: tl.constexpr, HAS_NORMED: tl.constexpr, HAS_STREAM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, MODULATED: tl.constexpr, HAS_ROWS: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Outputs ``grad_residual`` (B,L,D) and ``sums`` (P,K,D) float32: of shift and scale, then of the weight.

    ``HAS_X``, ``HAS_NORMED``, ``HAS_STREAM``: of which of forward's results there is a gradient.
    """
    row = (tl.program_id(0) // runs).to(tl.int64)
    first = tl.program_id(0) % runs * run
    last = tl.minimum(first + run, length)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    by_shift = tl.zeros((BLOCK,), dtype=tl.float32)
    by_scale = tl.zeros((BLOCK,), dtype=tl.float32)
    by_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    # Weight and scale are read again for every token, from the cache: they would take the registers of two more sums.
    slope = scale + row * scale_step + cols if MODULATED else scale
    share = 1.0 / width
    for token in range(first, last):
        here = (row * length + token) * width
        # All of a token is on its way before the first sum over it waits.
        value = tl.load(stream + here + cols, mask=inside, other=0.0).to(tl.float32)
        if HAS_X:
            there, size = place_of(rows, token, row, length, width, HAS_ROWS)
            of_x = tl.load(grad_x + there + cols, mask=cols < size, other=0.0)
        if HAS_NORMED:
            of_normed = tl.load(grad_normed + here + cols, mask=inside, other=0.0)
        if HAS_STREAM:
            of_stream = tl.load(grad_stream + here + cols, mask=inside, other=0.0)
        unit, factor = normed_of(value, inside, share, eps, CENTERED)
        grad = tl.zeros((BLOCK,), dtype=tl.float32)
        if HAS_X:
            grad = of_x.to(tl.float32)
            if MODULATED:
                by_shift += grad
                by_scale += grad * unit
                grad *= 1.0 + tl.load(slope, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORMED:
            more = of_normed.to(tl.float32)
            grad += more
            if MODULATED:
                by_weight += more * unit
        if not MODULATED:
            by_weight += grad * unit
        if HAS_WEIGHT:
            grad *= tl.load(weight + cols, mask=inside, other=0.0)
        along = tl.sum(grad * unit, axis=0) * share
        if CENTERED:
            grad -= tl.sum(grad, axis=0) * share
        grad = (grad - unit * along) * factor
        if HAS_STREAM:
            grad += of_stream.to(tl.float32)
        tl.store(grad_residual + here + cols, grad.to(grad_residual.dtype.element_ty), mask=inside)
    kinds: tl.constexpr = 2 * MODULATED + HAS_WEIGHT
    own = sums + tl.program_id(0).to(tl.int64) * kinds * width + cols
    if MODULATED:
        # What x sums for the weight is what it sums for scale, but for factors that are the same for all tokens.
        by_weight += by_scale * (1.0 + tl.load(slope, mask=inside, other=0.0).to(tl.float32))
        if HAS_WEIGHT:
            by_scale *= tl.load(weight + cols, mask=inside, other=0.0)
        tl.store(own, by_shift, mask=inside)
        tl.store(own + width, by_scale, mask=inside)
    if HAS_WEIGHT:
        tl.store(own + (kinds - 1) * width, by_weight, mask=inside)


@triton.jit(do_not_specialize=["length"])
def write_forward(
    base, y, gate, rows, out, length, width, gate_step, BLOCK: tl.constexpr, HAS_ROWS: tl.constexpr
):
    """``out`` (B,L,D) in the dtype of ``base``; ``gate_step`` is the distance of two rows of the gate."""
    row = (tl.program_id(0) // length).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    here = tl.program_id(0).to(tl.int64) * width
    there, size = place_of(rows, tl.program_id(0) % length, row, length, width, HAS_ROWS)
    value = tl.load(y + there + cols, mask=cols < size, other=0.0).to(tl.float32)
    value *= tl.load(gate + row * gate_step + cols, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(base + here + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + here + cols, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "run", "runs"])
def write_backward(
    grad_out, y, gate, rows, to_y, sums,
    length, width, run, runs, gate_step,
    BLOCK: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """Outputs ``to_y`` (B,L,D), the gradient of y, and ``sums`` (P,D) float32, of the gate."""
    row = (tl.program_id(0) // runs).to(tl.int64)
    first = tl.program_id(0) % runs * run
    last = tl.minimum(first + run, length)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    by_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    factors = tl.load(gate + row * gate_step + cols, mask=inside, other=0.0).to(tl.float32)
    for token in range(first, last):
        here = (row * length + token) * width
        there, size = place_of(rows, token, row, length, width, HAS_ROWS)
        grad = tl.load(grad_out + here + cols, mask=inside, other=0.0).to(tl.float32)
        by_gate += grad * tl.load(y + there + cols, mask=cols < size, other=0.0).to(tl.float32)
        tl.store(to_y + there + cols, (grad * factors).to(to_y.dtype.element_ty), mask=cols < size)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + cols, by_gate, mask=inside)
