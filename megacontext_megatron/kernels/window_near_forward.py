"""The forward kernel of sliding-window attention whose window is so short that all its scores fit a program at once.

One program owns a few rows of the heads of one query group, whose window is a fixed number of rows before them and
themselves: two blocks of scores and one softmax without any loop or rescaling.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.window_device import (
    load_angles,
    load_lanes,
    load_rows,
    own_part,
    product,
    turned,
    visible,
)

_SIZES = ["sq", "sk", "batch", "look_back"]
"""That change from call to call, and whose values make no better code."""


@triton.jit(do_not_specialize=_SIZES)
def near_kernel(
    query,
    key,
    value,
    table,
    out,
    normaliser,
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
    NG: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HN: tl.constexpr,
    LANES: tl.constexpr,
    KEYS: tl.constexpr,
    EAGER: tl.constexpr,
    ROTATE: tl.constexpr,
    TABLE_GROUPS: tl.constexpr,
    QUERY_PLANE: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write attention [sq, b, np, hn], contiguous, and log2 of each lane's sum of weights, fp32 [b, ng, sq, GROUP].

    `scale` includes log2 e and is positive; `look_back` is at most KEYS, and LANES / PACK at least 16.  With ROTATE,
    queries come unrotated and keys rotated.  With EAGER, values are fetched before scores are known.
    """
    ROWS: tl.constexpr = LANES // PACK
    tile, sequence, group = own_part(batch, NG)
    m = tile * ROWS
    first_row = sk - sq + m
    lane = tl.arange(0, LANES)
    own, head = lane // PACK, lane % PACK
    inside = (own < sq - m) & (head < GROUP)
    own, head = tl.minimum(own, sq - 1 - m), tl.minimum(head, GROUP - 1)
    q = load_lanes(
        query + m * tl.cast(query_s, tl.int64) + sequence * query_b + group * query_g, own, head, query_s, query_h, HN
    )
    if ROTATE:
        line = ((first_row + own).to(tl.int64) * batch + sequence) * TABLE_GROUPS + group % TABLE_GROUPS
        cos, sin = load_angles(table, planes, line, QUERY_PLANE, HN, R)
        q = turned(q, cos, sin, R, INTERLEAVED).to(query.dtype.element_ty)
    key += first_row * tl.cast(key_s, tl.int64) + sequence * key_b + group * key_g
    value += first_row * tl.cast(value_s, tl.int64) + sequence * value_b + group * value_g
    # Rows before the first are read as the first, and get no weight.
    before, column = tl.arange(0, KEYS), tl.arange(0, ROWS)
    old, new = tl.maximum(before - KEYS, -first_row), tl.minimum(column, sk - 1 - first_row)
    old_keys, new_keys = load_rows(key, old, key_s, HN), load_rows(key, new, key_s, HN)
    if EAGER:
        old_values, new_values = load_rows(value, old, value_s, HN), load_rows(value, new, value_s, HN)
    past, near = product(q, tl.trans(old_keys)), product(q, tl.trans(new_keys))
    edge = KEYS + tl.maximum(own - look_back, -first_row)
    past = tl.where(before[None, :] >= edge[:, None], past, float("-inf"))
    near = tl.where(visible(own[:, None], column[None, :], look_back), near, float("-inf"))
    top = tl.maximum(tl.max(past, axis=1), tl.max(near, axis=1)) * scale
    past, near = tl.exp2(past * scale - top[:, None]), tl.exp2(near * scale - top[:, None])
    total = tl.sum(past, axis=1) + tl.sum(near, axis=1)
    if not EAGER:
        old_values, new_values = load_rows(value, old, value_s, HN), load_rows(value, new, value_s, HN)
    acc = product(past.to(value.dtype.element_ty), old_values)
    acc = product(near.to(value.dtype.element_ty), new_values, acc)
    acc = acc / total[:, None]
    lines = ((sequence * NG + group) * sq + m) * GROUP
    tl.store(normaliser + lines + own * GROUP + head, top + tl.log2(total), mask=inside)
    target = out + ((m * tl.cast(batch, tl.int64) + sequence) * NG + group) * (GROUP * HN)
    target += (own * (batch * NG * GROUP * HN) + head * HN)[:, None] + tl.arange(0, HN)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside[:, None])
