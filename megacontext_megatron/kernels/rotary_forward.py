"""The forward kernel of the span rotary: one launch for queries, keys and, on request, values.

One program owns a few whole rows, which lie together in memory.  It finds their cosines, sines and damping in registers
(once, or once for each query group where groups differ) and passes over the heads, so that nothing but q and k is read,
and nothing but the result written.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.rotary_device import (
    copy_heads,
    damping,
    inverse_rms,
    load_of_row,
    load_pairs,
    load_rest,
    load_weight,
    row_angles,
    store_pairs,
)


@triton.jit
def _finish_heads(
    source,
    target,
    cos,
    sin,
    weight,
    pair,
    rest,
    inside,
    eps,
    HN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Read heads at `source` [lanes, 1], norm and rotate them, and write them at `target`."""
    first, second = load_pairs(source, pair, inside, R, BLOCK_R, INTERLEAVED)
    if 2 * R < HN or NORM:
        passed = load_rest(source, rest, inside, HN, R)
    if NORM:
        first_weight, second_weight, rest_weight = load_weight(weight, pair, rest, HN, R, INTERLEAVED, CENTRED)
        scale = inverse_rms(first, second, passed, eps, HN)
        first = first * scale * first_weight
        second = second * scale * second_weight
        passed = passed * scale * rest_weight
    one, other = first * cos - second * sin, second * cos + first * sin
    store_pairs(target, one, other, pair, inside, R, BLOCK_R, INTERLEAVED)
    if 2 * R < HN:
        tl.store(target + 2 * R + rest, passed.to(target.dtype.element_ty), mask=inside & (rest < HN - 2 * R))


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    query_out,
    key_out,
    value_out,
    doubled_centre,
    sigma,
    offset,
    words,
    omega,
    query_weight,
    key_weight,
    rows,
    batch,
    query_row,
    query_group,
    query_head,
    key_row,
    key_group,
    value_row,
    value_group,
    centre_s,
    centre_b,
    sigma_s,
    sigma_b,
    sigma_g,
    offset_s,
    offset_b,
    eps,
    NP: tl.constexpr,
    NG: tl.constexpr,
    HN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    FREQUENCY_GROUPS: tl.constexpr,
    SIGMA_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    DAMP_QUERY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    COPY_VALUE: tl.constexpr,
):
    """Write finished queries [T, np, hn] and keys [T, ng, hn], and values copied, all contiguous.

    T rows of all sequences, np query heads in ng query groups, hn channels of a head, R rotary pairs.
    """
    PER_GROUP: tl.constexpr = NP // NG
    BY_GROUP: tl.constexpr = FREQUENCY_GROUPS > 1 or SIGMA_GROUPS > 1
    GROUPS: tl.constexpr = NG if BY_GROUP else 1
    QUERY_HEADS: tl.constexpr = NP // GROUPS
    KEY_HEADS: tl.constexpr = NG // GROUPS
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
    for group in tl.range(0, GROUPS):
        frequency_group = group if FREQUENCY_GROUPS > 1 else 0
        rate = tl.load(omega + frequency_group * R + pair, mask=pair < R, other=0.0)
        cos, sin = row_angles(doubled, moved, words, frequency_group, rate, pair, R, FREQUENCY_GROUPS, HAS_OFFSET)
        key_cos, key_sin = cos, sin
        if SIGMA_GROUPS > 0:
            spreads = sigma + (group * sigma_g if SIGMA_GROUPS > 1 else 0)
            damp = damping(load_of_row(spreads, number, live, batch, sigma_s, sigma_b).to(tl.float32), rate)
            key_cos, key_sin = cos * damp, sin * damp
            if DAMP_QUERY:
                cos, sin = key_cos, key_sin
        for start in tl.static_range(0, QUERY_HEADS, HEADS):
            inside = live & (start + lane % HEADS < QUERY_HEADS)
            head = group * QUERY_HEADS + start + lane % HEADS
            source = query + row * query_row + (head // PER_GROUP) * query_group + (head % PER_GROUP) * query_head
            _finish_heads(
                source, query_out + row * (NP * HN) + head * HN, cos, sin, query_weight, pair, rest, inside, eps,
                HN, R, BLOCK_R, INTERLEAVED, NORM, CENTRED,
            )  # fmt: skip
        for start in tl.static_range(0, KEY_HEADS, HEADS):
            inside = live & (start + lane % HEADS < KEY_HEADS)
            head = group * KEY_HEADS + start + lane % HEADS
            source, target = row * key_row + head * key_group, row * (NG * HN) + head * HN
            _finish_heads(
                key + source, key_out + target, key_cos, key_sin, key_weight, pair, rest, inside, eps,
                HN, R, BLOCK_R, INTERLEAVED, NORM, CENTRED,
            )  # fmt: skip
            if COPY_VALUE:
                copy_heads(value + row * value_row + head * value_group, value_out + target, inside, HN, BLOCK_HN)
