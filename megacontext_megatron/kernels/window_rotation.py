"""Queries and keys of sliding-window attention rotated once, and the cosines and sines of it.

The backward kernels turn gradients back where they finish them, by the angles that are left behind in fp32.  One
program owns a few rows; it finds their angles once for all heads, or once for each query group where groups differ.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.rotary_device import (
    damping,
    load_of_row,
    load_pairs,
    load_rest,
    row_angles,
    store_pairs,
)


@triton.jit
def _rotate_heads(
    source,
    target,
    cos,
    sin,
    pair,
    rest,
    inside,
    HN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write one head a lane rotated, and its channels that do not turn as they are."""
    first, second = load_pairs(source, pair, inside, R, BLOCK_R, INTERLEAVED)
    one, other = first * cos - second * sin, second * cos + first * sin
    store_pairs(target, one, other, pair, inside, R, BLOCK_R, INTERLEAVED)
    if 2 * R < HN:
        passed = load_rest(source, rest, inside, HN, R)
        tl.store(target + 2 * R + rest, passed.to(target.dtype.element_ty), mask=inside & (rest < HN - 2 * R))


@triton.jit
def rotate_rows(
    query,
    key,
    query_out,
    key_out,
    table,
    doubled_centre,
    sigma,
    offset,
    words,
    omega,
    rows,
    before,
    batch,
    planes,
    query_s,
    query_b,
    query_g,
    query_h,
    key_s,
    key_b,
    key_g,
    centre_s,
    centre_b,
    sigma_s,
    sigma_b,
    sigma_g,
    offset_s,
    offset_b,
    NP: tl.constexpr,
    NG: tl.constexpr,
    HN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    FREQUENCY_GROUPS: tl.constexpr,
    SIGMA_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PLAIN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Write rotated and damped queries and keys, dense, and a table fp32 [2 or 4, T, GROUPS, R] of T rows.

    T counts rows of keys of all sequences, of which the first `before` rows of each have no query.  The table holds the
    cosines and sines of keys, damped, and with PLAIN then those of queries, not damped.
    """
    KEY_HEADS: tl.constexpr = NG // GROUPS
    QUERY_HEADS: tl.constexpr = NP // GROUPS
    PER_GROUP: tl.constexpr = NP // NG
    pair = tl.arange(0, BLOCK_R)[None, :]
    rest = tl.arange(0, BLOCK_REST)[None, :]
    lane = tl.arange(0, ROWS * HEADS)[:, None]
    number = tl.program_id(0) * ROWS + lane // HEADS
    live = number < rows
    doubled = load_of_row(doubled_centre, number, live, batch, centre_s, centre_b).to(tl.int64)
    moved = tl.zeros([ROWS * HEADS, 1], tl.float32)
    if HAS_OFFSET:
        moved = load_of_row(offset, number, live, batch, offset_s, offset_b).to(tl.float32)
    row = number.to(tl.int64)
    source = key + (row // batch) * key_s + (row % batch) * key_b
    asks = live & (row // batch >= before)
    query += (row // batch - before) * query_s + (row % batch) * query_b
    query_out += (row - before * batch) * (NP * HN)
    # Lanes of one row hold the same angles, of which the first writes them.
    writes = live & (lane % HEADS == 0) & (pair < R)
    for group in tl.range(0, GROUPS):
        frequency_group = group if FREQUENCY_GROUPS > 1 else 0
        rate = tl.load(omega + frequency_group * R + pair, mask=pair < R, other=0.0)
        cos, sin = row_angles(doubled, moved, words, frequency_group, rate, pair, R, FREQUENCY_GROUPS, HAS_OFFSET)
        line = table + (row * GROUPS + group) * R + pair
        plain_cos, plain_sin = cos, sin
        if PLAIN:
            tl.store(line + 2 * planes, cos, mask=writes)
            tl.store(line + 3 * planes, sin, mask=writes)
        if SIGMA_GROUPS > 0:
            spreads = sigma + (group * sigma_g if SIGMA_GROUPS > 1 else 0)
            damp = damping(load_of_row(spreads, number, live, batch, sigma_s, sigma_b).to(tl.float32), rate)
            cos, sin = cos * damp, sin * damp
        tl.store(line, cos, mask=writes)
        tl.store(line + planes, sin, mask=writes)
        if not PLAIN:
            plain_cos, plain_sin = cos, sin
        for start in tl.static_range(0, KEY_HEADS, HEADS):
            head = group * KEY_HEADS + start + lane % HEADS
            inside = live & (start + lane % HEADS < KEY_HEADS)
            target = key_out + row * (NG * HN) + head * HN
            _rotate_heads(source + head * key_g, target, cos, sin, pair, rest, inside, HN, R, BLOCK_R, INTERLEAVED)
        for start in tl.static_range(0, QUERY_HEADS, HEADS):
            head = group * QUERY_HEADS + start + lane % HEADS
            inside = asks & (start + lane % HEADS < QUERY_HEADS)
            at = query + (head // PER_GROUP) * query_g + (head % PER_GROUP) * query_h
            _rotate_heads(
                at, query_out + head * HN, plain_cos, plain_sin, pair, rest, inside, HN, R, BLOCK_R, INTERLEAVED
            )
