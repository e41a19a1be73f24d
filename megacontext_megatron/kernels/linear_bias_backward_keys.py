"""The backward kernel of causal attention with a linear bias that gives keys and values their gradients.

One program owns a tile of keys and goes through the heads of its group, each as far as it reaches, so that every sum is
made in one place and in one order.  Scores are held transposed, keys by queries, as the products with them need them.
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
def _visit_queries(
    dk,
    dv,
    k,
    v,
    query,
    gradient,
    normaliser,
    products,
    line,
    lines,
    slopes,
    places,
    anchor_high,
    anchor_low,
    apart,
    column,
    head,
    start,
    end,
    sequence,
    sq,
    sk,
    look_back,
    scale,
    query_s,
    query_b,
    query_h,
    gradient_s,
    gradient_b,
    gradient_h,
    slope_s,
    slope_b,
    slope_h,
    HN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FRAME: tl.constexpr,
    BULK: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Return what one head's query tiles from `start` to `end` add to gradients of keys and values."""
    inner = tl.arange(0, BLOCK_M)
    for m in tl.range(bound(start), bound(end), BLOCK_M):
        # Rows beyond the last have no weight: their normaliser is infinite.
        q = load_rows(query, m, sequence, head, sq, query_s, query_b, query_h, BLOCK_M, HN, BULK, RAGGED)
        g = load_rows(gradient, m, sequence, head, sq, gradient_s, gradient_b, gradient_h, BLOCK_M, HN, BULK, RAGGED)
        shift = load_line(normaliser, line * lines + m, BLOCK_M, BULK)
        level = load_line(products, line * lines + m, BLOCK_M, BULK)
        scores = product(k, tl.trans(q)) * scale
        if BIAS > 0:
            at = tl.minimum(m + inner, sq - 1) if RAGGED else m + inner
            slope = load_slope(slopes, head, at, slope_s, slope_b, slope_h, sequence, BIAS)
            shift += slope * separation(
                places, tl.cdiv(sk, FRAME) * FRAME, sk - sq + frame_end(m, sq, FRAME), anchor_high, anchor_low
            )
            if BIAS == 2:
                scores += apart[:, None] * slope[None, :]
            else:
                scores += (slope * apart)[:, None]
        weight = tl.exp2(scores - shift[None, :])
        if MASKED:
            row = (sk - sq + m + inner)[None, :]
            weight = tl.where(visible(row, column[:, None], look_back, WINDOW), weight, 0.0)
        dv = product(weight.to(g.dtype), g, dv)
        pull = weight * (product(v, tl.trans(g)) - level[None, :])
        dk = product(pull.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def key_kernel(
    query,
    key,
    value,
    gradient,
    normaliser,
    products,
    key_grad,
    value_grad,
    slopes,
    places,
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
    REACH_TILES: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    REACH: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Write gradients of keys and values [sk, b, ng, hn]; scores are held transposed, keys by queries.

    REACH_TILES is a power of two that the count of frames of queries does not exceed.
    """
    tiles = tl.cdiv(sk, BLOCK_N)
    line = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if REACH:
        line = tl.load(order + line).to(tl.int32)
    sequence, group = tl.cast(line // (NP // GROUP), tl.int64), line % (NP // GROUP)
    n = tile * BLOCK_N
    inner = tl.arange(0, BLOCK_N)
    column = n + inner
    k = load_rows(key, n, sequence, group, sk, key_s, key_b, key_h, BLOCK_N, HN, BULK, True)
    v = load_rows(value, n, sequence, group, sk, value_s, value_b, value_h, BLOCK_N, HN, BULK, True)
    apart, anchor_high, anchor_low = 0.0, 0.0, 0.0
    if BIAS > 0:
        columns = tl.cdiv(sk, FRAME) * FRAME
        places += sequence * 3 * columns
        anchor_high, anchor_low = load_centre(places, columns, frame_end(n, sk, FRAME))
        apart = tl.load(places + 2 * columns + n + inner)

    # Query rows are counted from the first query; those before key n see nothing of this tile.
    start = tl.maximum(n - (sk - sq), 0) // BLOCK_M * BLOCK_M
    whole = tl.maximum(tl.cdiv(n + BLOCK_N - 1 - (sk - sq), BLOCK_M), 0) * BLOCK_M
    dk = tl.zeros([BLOCK_N, HN], tl.float32)
    dv = tl.zeros([BLOCK_N, HN], tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        own = sequence * NP + head
        end = sq
        if WINDOW:
            end = tl.minimum(end, n + BLOCK_N + look_back - (sk - sq))
        if REACH:
            reach_tiles = tl.cdiv(sq, FRAME)
            query_tile = tl.arange(0, REACH_TILES)
            reached = tl.load(first + own * reach_tiles + query_tile, mask=query_tile < reach_tiles, other=sk)
            last = tl.max(tl.where(reached < tl.minimum(n + BLOCK_N, sk), query_tile + 1, 0), axis=0)
            end = tl.minimum(end, last * FRAME)
        middle = tl.maximum(tl.minimum(whole, end), start)
        plain = end
        if WINDOW:
            plain = tl.maximum((n + look_back - (sk - sq) + 1) // BLOCK_M * BLOCK_M, middle)
            plain = tl.minimum(plain, tl.maximum(end, middle))
        dk, dv = _visit_queries(
            dk, dv, k, v, query, gradient, normaliser, products, own, lines, slopes, places,
            anchor_high, anchor_low, apart, column, head, start, tl.minimum(whole, end), sequence, sq, sk, look_back,
            scale, query_s, query_b, query_h, gradient_s, gradient_b, gradient_h, slope_s, slope_b, slope_h,
            HN, BLOCK_M, FRAME, BULK, RAGGED, BIAS, True, WINDOW,
        )  # fmt: skip
        dk, dv = _visit_queries(
            dk, dv, k, v, query, gradient, normaliser, products, own, lines, slopes, places,
            anchor_high, anchor_low, apart, column, head, middle, plain, sequence, sq, sk, look_back,
            scale, query_s, query_b, query_h, gradient_s, gradient_b, gradient_h, slope_s, slope_b, slope_h,
            HN, BLOCK_M, FRAME, BULK, RAGGED, BIAS, False, WINDOW,
        )  # fmt: skip
        if WINDOW:
            dk, dv = _visit_queries(
                dk, dv, k, v, query, gradient, normaliser, products, own, lines, slopes, places,
                anchor_high, anchor_low, apart, column, head, plain, end, sequence, sq, sk, look_back,
                scale, query_s, query_b, query_h, gradient_s, gradient_b, gradient_h, slope_s, slope_b, slope_h,
            HN, BLOCK_M, FRAME, BULK, RAGGED, BIAS, True, WINDOW,
            )  # fmt: skip
    target = inner[:, None] * grad_s + tl.arange(0, HN)[None, :]
    target += sequence * grad_b + group * grad_h + n * tl.cast(grad_s, tl.int64)
    dk *= natural_scale
    tl.store(key_grad + target, dk.to(key_grad.dtype.element_ty), mask=(column < sk)[:, None])
    tl.store(value_grad + target, dv.to(value_grad.dtype.element_ty), mask=(column < sk)[:, None])
