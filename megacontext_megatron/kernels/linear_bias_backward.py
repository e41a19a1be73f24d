"""The backward kernels of causal attention with a linear bias that give queries and slopes their gradients.

Weights are found again from the scores.  One program owns a tile of queries of one head, as in the forward, so that
every sum is made in one place and in one order.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.attention_device import bound, product
from megacontext_megatron.kernels.linear_bias_device import (
    frame_end,
    load_centre,
    load_line,
    load_rows,
    load_slope,
    separation,
    visible,
)


@triton.jit
def row_products(
    out,
    gradient,
    products,
    sq,
    lines,
    out_s,
    out_b,
    out_h,
    gradient_s,
    gradient_b,
    gradient_h,
    NP: tl.constexpr,
    HN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write the product of each row's output and its gradient, fp32 [b, np, lines]; 0 beyond the last row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = tl.cast(tl.program_id(1), tl.int64)
    sequence, head = line // NP, line % NP
    at, channel = row.to(tl.int64)[:, None], tl.arange(0, HN)[None, :]
    inside = (row < sq)[:, None]
    o = tl.load(out + sequence * out_b + head * out_h + at * out_s + channel, mask=inside, other=0.0)
    source = gradient + sequence * gradient_b + head * gradient_h + at * gradient_s + channel
    g = tl.load(source, mask=inside, other=0.0)
    tl.store(products + line * lines + row, tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1), mask=row < lines)


@triton.jit
def _visit_keys(
    dq,
    moment,
    excess,
    q,
    g,
    shift,
    level,
    key,
    value,
    places,
    within_frame,
    anchor_high,
    anchor_low,
    slope,
    row,
    start,
    end,
    sk,
    look_back,
    scale,
    sequence,
    group,
    key_s,
    key_b,
    key_h,
    value_s,
    value_b,
    value_h,
    HN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FRAME: tl.constexpr,
    BULK: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD_SLOPE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Return what key tiles from `start` to `end` add to queries' gradients and to the sums for slopes."""
    column, columns = tl.arange(0, BLOCK_N), tl.cdiv(sk, FRAME) * FRAME
    for n in tl.range(bound(start), bound(end), BLOCK_N):
        k = load_rows(key, n, sequence, group, sk, key_s, key_b, key_h, BLOCK_N, HN, BULK, MASKED)
        v = load_rows(value, n, sequence, group, sk, value_s, value_b, value_h, BLOCK_N, HN, BULK, MASKED)
        if BIAS > 0:
            gap = separation(places, columns, frame_end(n, sk, FRAME), anchor_high, anchor_low)
            apart = load_line(within_frame, (3 * sequence + 2) * columns + n, BLOCK_N, BULK) + gap
        scores = product(q, tl.trans(k)) * scale
        if BIAS == 1:
            scores += (slope * apart)[None, :]
        if BIAS == 2:
            scores += slope[:, None] * apart[None, :]
        weight = tl.exp2(scores - shift[:, None])
        if MASKED:
            weight = tl.where(visible(row[:, None], (n + column)[None, :], look_back, WINDOW), weight, 0.0)
        pull = weight * (product(g, tl.trans(v)) - level[:, None])
        if GRAD_SLOPE:
            moment += tl.sum(pull * apart[None, :], axis=1)
            excess += tl.sum(pull, axis=1)
        dq = product(pull.to(k.dtype), k, dq)
    return dq, moment, excess


@triton.jit
def query_kernel(
    query,
    key,
    value,
    gradient,
    normaliser,
    products,
    query_grad,
    slope_grad,
    slopes,
    places,
    within_frame,
    first,
    order,
    scale,
    natural_scale,
    sq,
    sk,
    look_back,
    lines,
    query_s,
    query_b,
    query_h,
    key_s,
    key_b,
    key_h,
    value_s,
    value_b,
    value_h,
    gradient_s,
    gradient_b,
    gradient_h,
    grad_s,
    grad_b,
    grad_h,
    slope_s,
    slope_b,
    slope_h,
    NP: tl.constexpr,
    GROUP: tl.constexpr,
    HN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FRAME: tl.constexpr,
    BULK: tl.constexpr,
    BIAS: tl.constexpr,
    GRAD_SLOPE: tl.constexpr,
    REACH: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Write gradients of queries [sq, b, np, hn] and of slopes: rows' [b, np, sq] (BIAS 2), or tiles' [b, np, tiles].

    A slope's gradient is the sum over keys of the score's gradient times the distance from the row's own centre.  It is
    summed from the tile's anchor, then moved to the row's centre by the sum of the score's gradients, which vanishes
    but for the rounding of the output, and so stops that rounding from being multiplied by the tile's width.
    """
    tiles = tl.cdiv(sq, BLOCK_M)
    line = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    if REACH:
        line = tl.load(order + line).to(tl.int32)
    sequence, head = tl.cast(line // NP, tl.int64), line % NP
    group = head // GROUP
    m = tile * BLOCK_M
    inner = tl.arange(0, BLOCK_M)
    at = tl.minimum(inner, sq - 1 - m)
    row = sk - sq + m + at
    q = load_rows(query, m, sequence, head, sq, query_s, query_b, query_h, BLOCK_M, HN, BULK, True)
    g = load_rows(gradient, m, sequence, head, sq, gradient_s, gradient_b, gradient_h, BLOCK_M, HN, BULK, True)
    own = tl.cast(line, tl.int64) * lines + m + inner
    shift, level = tl.load(normaliser + own), tl.load(products + own)
    slope, anchor_high, anchor_low = 0.0, 0.0, 0.0
    if BIAS > 0:
        columns = tl.cdiv(sk, FRAME) * FRAME
        places += sequence * 3 * columns
        anchor_high, anchor_low = load_centre(places, columns, sk - sq + frame_end(m, sq, FRAME))
        slope = load_slope(slopes, head, m + at, slope_s, slope_b, slope_h, sequence, BIAS)

    start = 0
    if WINDOW:
        start = tl.maximum(sk - sq + m - look_back, 0)
    if REACH:
        start = tl.maximum(start, tl.load(first + tl.cast(line, tl.int64) * tl.cdiv(sq, FRAME) + m // FRAME))
    start = start // BLOCK_N * BLOCK_N
    full = (sk - sq + m + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(sk - sq + m + BLOCK_M, sk)
    dq = tl.zeros([BLOCK_M, HN], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    excess = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW:
        edge = tl.cdiv(tl.maximum(end - 1 - look_back, 0), BLOCK_N) * BLOCK_N
        edge = tl.minimum(tl.maximum(edge, start), full)
        dq, moment, excess = _visit_keys(
            dq, moment, excess, q, g, shift, level, key, value, places, within_frame, anchor_high, anchor_low, slope,
            row, start, edge, sk, look_back, scale, sequence, group, key_s, key_b, key_h, value_s, value_b, value_h,
            HN, BLOCK_N, FRAME, BULK, BIAS, GRAD_SLOPE, True, WINDOW,
        )  # fmt: skip
        start = edge
    dq, moment, excess = _visit_keys(
        dq, moment, excess, q, g, shift, level, key, value, places, within_frame, anchor_high, anchor_low, slope, row,
        start, full, sk, look_back, scale, sequence, group, key_s, key_b, key_h, value_s, value_b, value_h,
            HN, BLOCK_N, FRAME, BULK, BIAS, GRAD_SLOPE, False, WINDOW,
    )  # fmt: skip
    dq, moment, excess = _visit_keys(
        dq, moment, excess, q, g, shift, level, key, value, places, within_frame, anchor_high, anchor_low, slope, row,
        full, end, sk, look_back, scale, sequence, group, key_s, key_b, key_h, value_s, value_b, value_h,
            HN, BLOCK_N, FRAME, BULK, BIAS, GRAD_SLOPE, True, WINDOW,
    )  # fmt: skip
    target = query_grad + sequence * grad_b + head * grad_h + m * tl.cast(grad_s, tl.int64)
    target += inner[:, None] * grad_s + tl.arange(0, HN)[None, :]
    dq *= natural_scale
    tl.store(target, dq.to(query_grad.dtype.element_ty), mask=(m + inner < sq)[:, None])
    if GRAD_SLOPE:
        of_row = moment - excess * separation(places, columns, sk - sq + m + at, anchor_high, anchor_low)
        if BIAS == 2:
            tl.store(slope_grad + tl.cast(line, tl.int64) * sq + m + inner, of_row, mask=m + inner < sq)
        else:
            total = tl.sum(tl.where(m + inner < sq, of_row, 0.0), axis=0)
            tl.store(slope_grad + tl.cast(line, tl.int64) * tiles + tile, total)
