"""The forward kernel of causal attention with a linear bias.

One program owns a tile of queries of one head, and passes over the tiles of keys that matter to it: full ones without
any mask, then those at the diagonal.  Programs start with the heads that have most to visit.
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
def _visit(
    acc,
    total,
    top,
    q,
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
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Return accumulated values, sums and maxima after the key tiles from `start` to `end`."""
    column, columns = tl.arange(0, BLOCK_N), tl.cdiv(sk, FRAME) * FRAME
    for n in tl.range(bound(start), bound(end), BLOCK_N):
        k = load_rows(key, n, sequence, group, sk, key_s, key_b, key_h, BLOCK_N, HN, BULK, MASKED)
        if BIAS > 0:
            gap = separation(places, columns, frame_end(n, sk, FRAME), anchor_high, anchor_low)
            within = load_line(within_frame, (3 * sequence + 2) * columns + n, BLOCK_N, BULK)
        scores = product(q, tl.trans(k)) * scale
        if BIAS == 1:
            scores += (slope * within + slope * gap)[None, :]
        if BIAS == 2:
            scores += slope[:, None] * (within + gap)[None, :]
        if MASKED:
            scores = tl.where(visible(row[:, None], (n + column)[None, :], look_back, WINDOW), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weight = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(weight, axis=1)
        v = load_rows(value, n, sequence, group, sk, value_s, value_b, value_h, BLOCK_N, HN, BULK, MASKED)
        acc = product(weight.to(v.dtype), v, acc * shrink[:, None])
    return acc, total, top


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    out,
    normaliser,
    slopes,
    places,
    within_frame,
    first,
    order,
    scale,
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
    out_s,
    out_b,
    out_h,
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
    REACH: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Write attention [sq, b, np, hn] and log2 of each row's sum of weights, counted from the end of its frame.

    `scale` includes log2 e.  BIAS is 0 (none), 1 (a slope per head) or 2 (per row and head).  Tiles divide frames.
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
    acc = tl.zeros([BLOCK_M, HN], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Below any score, and finite, so that a row that sees nothing of a tile stays a number.
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    if WINDOW:
        edge = tl.cdiv(tl.maximum(end - 1 - look_back, 0), BLOCK_N) * BLOCK_N
        edge = tl.minimum(tl.maximum(edge, start), full)
        acc, total, top = _visit(
            acc, total, top, q, key, value, places, within_frame, anchor_high, anchor_low, slope, row, start, edge,
            sk, look_back, scale, sequence, group, key_s, key_b, key_h, value_s, value_b, value_h,
            HN, BLOCK_N, FRAME, BULK, BIAS, True, WINDOW,
        )  # fmt: skip
        start = edge
    acc, total, top = _visit(
        acc, total, top, q, key, value, places, within_frame, anchor_high, anchor_low, slope, row, start, full,
        sk, look_back, scale, sequence, group, key_s, key_b, key_h, value_s, value_b, value_h,
            HN, BLOCK_N, FRAME, BULK, BIAS, False, WINDOW,
    )  # fmt: skip
    acc, total, top = _visit(
        acc, total, top, q, key, value, places, within_frame, anchor_high, anchor_low, slope, row, full, end,
        sk, look_back, scale, sequence, group, key_s, key_b, key_h, value_s, value_b, value_h,
            HN, BLOCK_N, FRAME, BULK, BIAS, True, WINDOW,
    )  # fmt: skip
    acc = acc / total[:, None]
    target = normaliser + tl.cast(line, tl.int64) * lines + m + inner
    tl.store(target, top + tl.log2(total), mask=m + inner < sq)
    target = out + sequence * out_b + head * out_h + m * tl.cast(out_s, tl.int64)
    target += inner[:, None] * out_s + tl.arange(0, HN)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m + inner < sq)[:, None])
