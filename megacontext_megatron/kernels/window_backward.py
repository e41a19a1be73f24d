"""The backward kernels of sliding-window attention, without atomics: one owns queries, the other keys and values.

With P the weights, dP = dO V' and delta = rowsum(dO O): dS = P (dP - delta), dQ = dS K, dK = dS' Q, dV = P' dO (Dao et
al., "FlashAttention", appendix B).  Weights are found again from the saved logarithm of their sum.  Each kernel
forms the scores of its own tiles: two products more than one kernel for all would need, whose partial sums in fp32 of
keys' gradients would be more bytes than all else.  The kernel of queries runs first and leaves delta behind.  Where
queries and keys were rotated, each turns its gradient back before it writes it.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.attention_device import bound, product
from megacontext_megatron.kernels.window_device import (
    load_angles,
    load_lanes,
    load_rows,
    own_part,
    turned_back,
    visible,
)

_SIZES = ["sq", "sk", "batch", "look_back"]
"""That change from call to call, and whose values make no better code."""


@triton.jit(do_not_specialize=_SIZES)
def query_kernel(
    query,
    key,
    value,
    table,
    out,
    out_grad,
    normaliser,
    delta,
    query_grad,
    scale,
    sq,
    sk,
    batch,
    look_back,
    planes,
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
    query_grad_s,
    query_grad_b,
    query_grad_g,
    query_grad_h,
    NG: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HN: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    MASK_ALL: tl.constexpr,
    ROTATE: tl.constexpr,
    TABLE_GROUPS: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write gradients of queries, turned back with ROTATE, and delta fp32 [b, ng, sq, GROUP].

    `out` and `out_grad` [sq, b, np, hn] have the same strides, and dense heads; `scale` is that of scores in nats.
    """
    ROWS: tl.constexpr = LANES // PACK
    tile, sequence, group = own_part(batch, NG)
    m = tile * ROWS
    lane = tl.arange(0, LANES)
    own, head = lane // PACK, lane % PACK
    inside = (own < sq - m) & (head < GROUP)
    own, head = tl.minimum(own, sq - 1 - m), tl.minimum(head, GROUP - 1)
    dense = m * tl.cast(out_s, tl.int64) + sequence * out_b + group * (GROUP * HN)
    lines = ((sequence * NG + group) * sq + m) * GROUP + own * GROUP + head
    grad = load_lanes(out_grad + dense, own, head, out_s, HN, HN)
    seen = load_lanes(out + dense, own, head, out_s, HN, HN)
    along = tl.sum(grad.to(tl.float32) * seen.to(tl.float32), axis=1)
    tl.store(delta + lines, along, mask=inside)
    q = load_lanes(
        query + m * tl.cast(query_s, tl.int64) + sequence * query_b + group * query_g, own, head, query_s, query_h, HN
    )
    log = tl.load(normaliser + lines)
    key += sequence * key_b + group * key_g
    value += sequence * value_b + group * value_g
    first_row = sk - sq + m
    last_row = tl.minimum(first_row + ROWS, sk) - 1
    row = first_row + own
    start = tl.maximum(first_row - look_back, 0)
    column = tl.arange(0, KEYS)
    power = scale * 1.4426950408889634
    acc = tl.zeros([LANES, HN], tl.float32)
    for n in tl.range(bound(start), bound(last_row + 1), KEYS):
        at = tl.minimum(column, sk - 1 - n)
        k = load_rows(key + n * tl.cast(key_s, tl.int64), at, key_s, HN)
        v = load_rows(value + n * tl.cast(value_s, tl.int64), at, value_s, HN)
        scores = product(q, tl.trans(k))
        change = product(grad, tl.trans(v))
        change = tl.exp2(scores * power - log[:, None]) * (change - along[:, None])
        if MASK_ALL or ((n + KEYS - 1 > first_row) | (n < last_row - look_back)):
            change = tl.where(visible(row[:, None], (n + column)[None, :], look_back), change, 0.0)
        acc = product(change.to(k.dtype), k, acc)
    acc = acc * scale
    if ROTATE:
        line = (((sk - sq + m + own).to(tl.int64) * batch + sequence) * TABLE_GROUPS) + group % TABLE_GROUPS
        cos, sin = load_angles(table, planes, line, HN, R)
        acc = turned_back(acc, cos, sin, R, INTERLEAVED)
    target = query_grad + m * tl.cast(query_grad_s, tl.int64) + sequence * query_grad_b + group * query_grad_g
    target += (own * query_grad_s + head * query_grad_h)[:, None] + tl.arange(0, HN)[None, :]
    tl.store(target, acc.to(query_grad.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=_SIZES)
def key_kernel(
    query,
    key,
    value,
    table,
    out_grad,
    normaliser,
    delta,
    key_grad,
    value_grad,
    scale,
    sq,
    sk,
    batch,
    look_back,
    planes,
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
    key_grad_s,
    key_grad_b,
    key_grad_g,
    NG: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HN: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    MASK_ALL: tl.constexpr,
    ROTATE: tl.constexpr,
    TABLE_GROUPS: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write gradients of keys, turned back with ROTATE, and of values, which have the same strides.

    `out_grad` [sq, b, np, hn] has dense heads; `scale` is that of scores in nats.
    """
    ROWS: tl.constexpr = LANES // PACK
    tile, sequence, group = own_part(batch, NG)
    n = tile * KEYS
    column = tl.arange(0, KEYS)
    at = tl.minimum(column, sk - 1 - n)
    k = load_rows(key + n * tl.cast(key_s, tl.int64) + sequence * key_b + group * key_g, at, key_s, HN)
    v = load_rows(value + n * tl.cast(value_s, tl.int64) + sequence * value_b + group * value_g, at, value_s, HN)
    query += sequence * query_b + group * query_g
    out_grad += sequence * out_b + group * (GROUP * HN)
    normaliser += (sequence * NG + group) * sq * GROUP
    delta += (sequence * NG + group) * sq * GROUP
    lane = tl.arange(0, LANES)
    own, head = lane // PACK, tl.minimum(lane % PACK, GROUP - 1)
    before = sk - sq
    start = tl.maximum(n - before, 0)
    end = tl.minimum(n + KEYS + look_back, sk) - before
    power = scale * 1.4426950408889634
    key_sum = tl.zeros([KEYS, HN], tl.float32)
    value_sum = tl.zeros([KEYS, HN], tl.float32)
    for m in tl.range(bound(start), bound(end), ROWS):
        inside = (own < sq - m) & (lane % PACK < GROUP)
        line = tl.minimum(own, sq - 1 - m)
        q = load_lanes(query + m * tl.cast(query_s, tl.int64), line, head, query_s, query_h, HN)
        grad = load_lanes(out_grad + m * tl.cast(out_s, tl.int64), line, head, out_s, HN, HN)
        lines = tl.cast(m, tl.int64) * GROUP + line * GROUP + head
        # Lanes that nothing belongs to get no weight.
        log = tl.load(normaliser + lines, mask=inside, other=float("inf"))
        along = tl.load(delta + lines, mask=inside, other=0.0)
        weight = tl.exp2(product(k, tl.trans(q)) * power - log[None, :])
        row = before + m + own
        if MASK_ALL or ((n + KEYS - 1 > before + m) | (n < before + m + ROWS - 1 - look_back)):
            weight = tl.where(visible(row[None, :], (n + column)[:, None], look_back), weight, 0.0)
        value_sum = product(weight.to(grad.dtype), grad, value_sum)
        change = weight * (product(v, tl.trans(grad)) - along[None, :])
        key_sum = product(change.to(q.dtype), q, key_sum)
    key_sum = key_sum * scale
    if ROTATE:
        line = (((n + at).to(tl.int64) * batch + sequence) * TABLE_GROUPS) + group % TABLE_GROUPS
        cos, sin = load_angles(table, planes, line, HN, R)
        key_sum = turned_back(key_sum, cos, sin, R, INTERLEAVED)
    target = n * tl.cast(key_grad_s, tl.int64) + sequence * key_grad_b + group * key_grad_g
    target = target + column[:, None] * key_grad_s + tl.arange(0, HN)[None, :]
    inside = (column < sk - n)[:, None]
    tl.store(key_grad + target, key_sum.to(key_grad.dtype.element_ty), mask=inside)
    tl.store(value_grad + target, value_sum.to(value_grad.dtype.element_ty), mask=inside)
