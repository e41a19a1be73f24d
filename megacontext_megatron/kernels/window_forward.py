"""The forward kernel of sliding-window attention.

One program owns a few rows of the heads of one query group, and passes over the tiles of keys in their window, of which
only those at the two edges need a mask.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.attention_device import bound, product
from megacontext_megatron.kernels.window_device import (
    load_lanes,
    load_rows,
    own_part,
    visible,
)

_SIZES = ["sq", "sk", "batch", "look_back"]
"""That change from call to call, and whose values make no better code."""


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    query,
    key,
    value,
    out,
    normaliser,
    scale,
    sq,
    sk,
    batch,
    look_back,
    query_s,
    query_b,
    query_g,
    query_h,
    key_s,
    key_b,
    key_g,
    value_s,
    value_b,
    value_g,
    out_s,
    out_b,
    NG: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HN: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    MASK_ALL: tl.constexpr,
):
    """Write attention [sq, b, np, hn] and log2 of each lane's sum of weights, fp32 [b, ng, sq, GROUP].

    The heads of a row of `out` are dense; `scale` includes log2 e and is positive.
    """
    ROWS: tl.constexpr = LANES // PACK
    tile, sequence, group = own_part(batch, NG)
    m = tile * ROWS
    lane = tl.arange(0, LANES)
    own, head = lane // PACK, lane % PACK
    inside = (own < sq - m) & (head < GROUP)
    own, head = tl.minimum(own, sq - 1 - m), tl.minimum(head, GROUP - 1)
    q = load_lanes(
        query + m * tl.cast(query_s, tl.int64) + sequence * query_b + group * query_g, own, head, query_s, query_h, HN
    )
    key += sequence * key_b + group * key_g
    value += sequence * value_b + group * value_g
    first_row = sk - sq + m
    last_row = tl.minimum(first_row + ROWS, sk) - 1
    row = first_row + own
    start = tl.maximum(first_row - look_back, 0)
    column = tl.arange(0, KEYS)
    acc = tl.zeros([LANES, HN], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    # Below any score, and finite, so that a row that sees nothing of a tile stays a number.
    top = tl.full([LANES], -1.0e30, tl.float32)
    for n in tl.range(bound(start), bound(last_row + 1), KEYS):
        at = tl.minimum(column, sk - 1 - n)
        k = load_rows(key + n * tl.cast(key_s, tl.int64), at, key_s, HN)
        scores = product(q, tl.trans(k))
        if MASK_ALL or ((n + KEYS - 1 > first_row) | (n < last_row - look_back)):
            scores = tl.where(visible(row[:, None], (n + column)[None, :], look_back), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
        weight = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(weight, axis=1)
        v = load_rows(value + n * tl.cast(value_s, tl.int64), at, value_s, HN)
        acc = product(weight.to(v.dtype), v, acc * shrink[:, None])
    acc = acc / total[:, None]
    lines = ((sequence * NG + group) * sq + m) * GROUP
    tl.store(normaliser + lines + own * GROUP + head, top + tl.log2(total), mask=inside)
    target = out + m * tl.cast(out_s, tl.int64) + sequence * out_b + group * (GROUP * HN)
    target += (own * out_s + head * HN)[:, None] + tl.arange(0, HN)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside[:, None])
