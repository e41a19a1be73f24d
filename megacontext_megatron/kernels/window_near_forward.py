"""The forward kernel of sliding-window attention whose window is so short that all its scores fit a program at once.

One program owns a few rows of the heads of one query group at a time, whose window is a fixed number of rows before
them and themselves: two blocks of scores, one softmax without any rescaling, and a loop only over what it owns, in
which queries and keys of what comes next are fetched while the present weights are used.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.window_device import (
    bound,
    load_angles,
    load_lanes,
    load_rows,
    part_of,
    product,
    turned,
    visible,
)

_SIZES = ["sq", "sk", "batch", "look_back", "blocks"]
"""That change from call to call, and whose values make no better code."""


@triton.jit
def _place(block, lane_row, lane_head, sq, batch, NG: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Return a block's first row, sequence and group, and the row and head of each lane, none beyond the last."""
    tile, sequence, group = part_of(block, batch, NG)
    m = tile * ROWS
    return m, sequence, group, tl.minimum(lane_row, sq - 1 - m), tl.minimum(lane_head, GROUP - 1)


@triton.jit
def _fetch(
    query,
    key,
    block,
    lane_row,
    lane_head,
    before,
    column,
    sq,
    sk,
    batch,
    query_s,
    query_b,
    query_g,
    query_h,
    key_s,
    key_b,
    key_g,
    NG: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    HN: tl.constexpr,
):
    """Return a block's queries [lanes, HN], and the keys [KEYS, HN] before its rows and those of its rows."""
    m, sequence, group, own, head = _place(block, lane_row, lane_head, sq, batch, NG, GROUP, column.shape[0])
    first_row = sk - sq + m
    at = query + m * tl.cast(query_s, tl.int64) + sequence * query_b + group * query_g
    keys = key + first_row * tl.cast(key_s, tl.int64) + sequence * key_b + group * key_g
    # Rows before the first are read as the first, and get no weight.
    old, new = tl.maximum(before - KEYS, -first_row), tl.minimum(column, sk - 1 - first_row)
    return (
        load_lanes(at, own, head, query_s, query_h, HN),
        load_rows(keys, old, key_s, HN),
        load_rows(keys, new, key_s, HN),
    )


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
    blocks,
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
    WALK: tl.constexpr,
    ROTATE: tl.constexpr,
    TABLE_GROUPS: tl.constexpr,
    QUERY_PLANE: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write attention [sq, b, np, hn], contiguous, and log2 of each lane's sum of weights, fp32 [b, ng, sq, GROUP].

    `scale` includes log2 e and is positive; `look_back` is at most KEYS, and LANES / PACK at least 16.  With ROTATE,
    queries come unrotated and keys rotated.  With WALK, a program owns all `blocks` a number of programs apart.
    """
    ROWS: tl.constexpr = LANES // PACK
    lane = tl.arange(0, LANES)
    lane_row, lane_head = lane // PACK, lane % PACK
    before = tl.arange(0, KEYS)
    column = tl.arange(0, ROWS)
    first = tl.program_id(0)
    q, old_keys, new_keys = _fetch(
        query, key, first, lane_row, lane_head, before, column, sq, sk, batch,
        query_s, query_b, query_g, query_h, key_s, key_b, key_g, NG, GROUP, KEYS, HN,
    )  # fmt: skip
    for block in tl.range(bound(first), bound(blocks if WALK else first + 1), bound(tl.num_programs(0))):
        m, sequence, group, own, head = _place(block, lane_row, lane_head, sq, batch, NG, GROUP, ROWS)
        first_row = sk - sq + m
        inside = (lane_row < sq - m) & (lane_head < GROUP)
        # What is read here arrives while scores are computed, and what comes next while their weights are used.
        old, new = tl.maximum(before - KEYS, -first_row), tl.minimum(column, sk - 1 - first_row)
        values = value + first_row * tl.cast(value_s, tl.int64) + sequence * value_b + group * value_g
        old_values, new_values = load_rows(values, old, value_s, HN), load_rows(values, new, value_s, HN)
        if ROTATE:
            line = ((first_row + own).to(tl.int64) * batch + sequence) * TABLE_GROUPS + group % TABLE_GROUPS
            cos, sin = load_angles(table, planes, line, QUERY_PLANE, HN, R)
            q = turned(q, cos, sin, R, INTERLEAVED).to(query.dtype.element_ty)
        past = product(q, tl.trans(old_keys))
        near = product(q, tl.trans(new_keys))
        if WALK:
            q, old_keys, new_keys = _fetch(
                query, key, tl.minimum(block + tl.num_programs(0), blocks - 1), lane_row, lane_head, before, column,
                sq, sk, batch, query_s, query_b, query_g, query_h, key_s, key_b, key_g, NG, GROUP, KEYS, HN,
            )  # fmt: skip
        edge = KEYS + tl.maximum(own - look_back, -first_row)
        past = tl.where(before[None, :] >= edge[:, None], past, float("-inf"))
        near = tl.where(visible(own[:, None], column[None, :], look_back), near, float("-inf"))
        top = tl.maximum(tl.max(past, axis=1), tl.max(near, axis=1)) * scale
        past = tl.exp2(past * scale - top[:, None])
        near = tl.exp2(near * scale - top[:, None])
        total = tl.sum(past, axis=1) + tl.sum(near, axis=1)
        acc = product(past.to(old_values.dtype), old_values)
        acc = product(near.to(new_values.dtype), new_values, acc)
        acc = acc * (1.0 / total)[:, None]
        lines = ((sequence * NG + group) * sq + m) * GROUP
        tl.store(normaliser + lines + own * GROUP + head, top + tl.log2(total), mask=inside)
        target = out + ((m * tl.cast(batch, tl.int64) + sequence) * NG + group) * (GROUP * HN)
        target += (own * (batch * NG * GROUP * HN) + head * HN)[:, None] + tl.arange(0, HN)[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=inside[:, None])
