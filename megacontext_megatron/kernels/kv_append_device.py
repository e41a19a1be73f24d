"""The kernel that finishes new rows and stores their keys, values and spans in pages, in one launch.

Arithmetic and tiles are those of the span rotary's forward kernel, so that what is stored is the same, but for products
and sums that a compiler fuses in one and not in the other.  What can be read at once is read first, because a few rows
take as long as their longest chain of reads.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.rotary_device import (
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
def _store_heads(
    target, first, second, passed, cos, sin, weight, pair, rest, inside, eps,
    HN: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate heads that were read, and write them at `target` [lanes, 1]."""
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
def _damped(
    cos, sin, sigma, group, rate, number, live, batch, sigma_s, sigma_b, sigma_g,
    SIGMA_GROUPS: tl.constexpr, DAMP_QUERY: tl.constexpr,
):  # fmt: skip
    """Return queries' and keys' cosines and sines from those of their places."""
    key_cos, key_sin = cos, sin
    if SIGMA_GROUPS > 0:
        spreads = sigma + (group * sigma_g if SIGMA_GROUPS > 1 else 0)
        damp = damping(load_of_row(spreads, number, live, batch, sigma_s, sigma_b).to(tl.float32), rate)
        key_cos, key_sin = cos * damp, sin * damp
        if DAMP_QUERY:
            cos, sin = key_cos, key_sin
    return cos, sin, key_cos, key_sin


@triton.jit
def _store_spans(
    starts, words, reals, halves, page, line, inside, start, width, level, modality, sigma, offset, PAGE: tl.constexpr
):
    """Write the 24 bytes of each row, read from the carrier; all four targets are the same memory."""
    tl.store(starts + page * (3 * PAGE) + line, start.to(tl.int64), mask=inside)
    at = page * (6 * PAGE) + line
    tl.store(words + at + 2 * PAGE, width.to(tl.int32), mask=inside)
    tl.store(reals + at + 3 * PAGE, sigma.to(tl.float32), mask=inside)
    tl.store(reals + at + 4 * PAGE, offset.to(tl.float32), mask=inside)
    at = page * (12 * PAGE) + line
    tl.store(halves + at + 10 * PAGE, level.to(tl.int16), mask=inside)
    tl.store(halves + at + 11 * PAGE, modality.to(tl.int16), mask=inside)


@triton.jit
def _read_queries(
    query, query_out, row, live, tile, group, member, pair, rest, query_row, query_group, query_head,
    NP: tl.constexpr, QUERY_HEADS: tl.constexpr, PER_GROUP: tl.constexpr, HEADS: tl.constexpr, HN: tl.constexpr,
    R: tl.constexpr, BLOCK_R: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Return a tile of each row's query heads, where it goes, and which lanes hold a head: member `member` of `tile`
    of the `group` whose angles they have."""
    inside = live & (tile * HEADS + member < QUERY_HEADS)
    head = group * QUERY_HEADS + tile * HEADS + member
    source = query + row * query_row + (head // PER_GROUP) * query_group + (head % PER_GROUP) * query_head
    first, second = load_pairs(source, pair, inside, R, BLOCK_R, INTERLEAVED)
    passed = load_rest(source, rest, inside, HN, R) if 2 * R < HN or NORM else first
    return first, second, passed, query_out + row * (NP * HN) + head * HN, inside


@triton.jit
def _read_keys(
    key, value, row, live, tile, group, member, pair, rest, channel, key_row, key_group, value_row, value_group,
    KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, HN: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Return a tile of each row's key heads, the values beside them, their numbers, and which lanes hold a head."""
    inside = live & (tile * HEADS + member < KEY_HEADS)
    head = group * KEY_HEADS + tile * HEADS + member
    source = key + row * key_row + head * key_group
    first, second = load_pairs(source, pair, inside, R, BLOCK_R, INTERLEAVED)
    passed = load_rest(source, rest, inside, HN, R) if 2 * R < HN or NORM else first
    values = tl.load(value + row * value_row + head * value_group + channel, mask=inside & (channel < HN))
    return first, second, passed, values, head, inside


@triton.jit
def append_kernel(
    query,
    key,
    value,
    query_out,
    key_pages,
    value_pages,
    starts,
    words_of_spans,
    reals_of_spans,
    halves_of_spans,
    carrier,
    index,
    page_table,
    doubled_centre,
    sigma,
    offset,
    words,
    omega,
    query_weight,
    key_weight,
    rows,
    batch,
    pages,
    columns,
    query_row,
    query_group,
    query_head,
    key_row,
    key_group,
    value_row,
    value_group,
    key_page,
    value_page,
    carrier_row,
    index_s,
    index_b,
    table_b,
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
    PAGE: tl.constexpr,
    BLOCK_HN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    FREQUENCY_GROUPS: tl.constexpr,
    SIGMA_GROUPS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CARRIES_OFFSET: tl.constexpr,
    DAMP_QUERY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write finished queries [T, NP, HN] and, in pages [pages, PAGE, NG, HN], finished keys and copied values.

    T rows of all sequences; NP may be 0.  A row lies on page `page_table[sequence, index // PAGE]`.  With SPLIT the
    tiles of heads, or the query groups where those have angles of their own, are programs of the grid's second axis.
    """
    BY_GROUP: tl.constexpr = FREQUENCY_GROUPS > 1 or SIGMA_GROUPS > 1
    GROUPS: tl.constexpr = NG if BY_GROUP else 1
    QUERY_HEADS: tl.constexpr = NP // GROUPS
    KEY_HEADS: tl.constexpr = NG // GROUPS
    QUERY_TILES: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    KEY_TILES: tl.constexpr = (KEY_HEADS + HEADS - 1) // HEADS
    PER_GROUP: tl.constexpr = NP // NG if NP > 0 else 1
    BY_TILE: tl.constexpr = SPLIT and not BY_GROUP
    pair = tl.arange(0, BLOCK_R)[None, :]
    rest = tl.arange(0, BLOCK_REST)[None, :]
    channel = tl.arange(0, BLOCK_HN)[None, :]
    lane = tl.arange(0, ROWS * HEADS)[:, None]
    member = lane % HEADS
    number = tl.program_id(0) * ROWS + lane // HEADS
    part = tl.program_id(1)
    live = number < rows
    row = number.to(tl.int64)
    doubled = load_of_row(doubled_centre, number, live, batch, centre_s, centre_b).to(tl.int64)
    moved = tl.zeros([ROWS * HEADS, 1], tl.float32)
    if HAS_OFFSET:
        moved = load_of_row(offset, number, live, batch, offset_s, offset_b).to(tl.float32)
    of_queries = BY_TILE
    if BY_TILE:
        of_queries = part < QUERY_TILES
    if of_queries:
        first, second, passed, target, inside = _read_queries(
            query, query_out, row, live, part, 0, member, pair, rest, query_row, query_group, query_head,
            NP, QUERY_HEADS, PER_GROUP, HEADS, HN, R, BLOCK_R, INTERLEAVED, NORM,
        )  # fmt: skip
        rate = tl.load(omega + pair, mask=pair < R, other=0.0)
        cos, sin = row_angles(doubled, moved, words, 0, rate, pair, R, FREQUENCY_GROUPS, HAS_OFFSET)
        cos, sin, _, _ = _damped(
            cos, sin, sigma, 0, rate, number, live, batch, sigma_s, sigma_b, sigma_g, SIGMA_GROUPS, DAMP_QUERY
        )
        _store_heads(
            target, first, second, passed, cos, sin, query_weight, pair, rest, inside, eps,
            HN, R, BLOCK_R, INTERLEAVED, NORM, CENTRED,
        )  # fmt: skip
    else:
        at = (number // batch) * index_s + (number % batch) * index_b
        logical = tl.load(index + at, mask=live, other=-1)
        known = live & (logical >= 0) & (logical // PAGE < columns)
        page = tl.load(page_table + (number % batch) * table_b + logical // PAGE, mask=known, other=-1).to(tl.int64)
        line = logical % PAGE
        stored = known & (page >= 0) & (page < pages)
        alone = live & (member == 0)
        if SPLIT:
            alone = alone & (part == tl.num_programs(1) - 1)
        spans = carrier + row * carrier_row
        start = tl.load(spans, mask=alone, other=0)
        width = tl.load(spans + 1, mask=alone, other=0)
        level = tl.load(spans + 2, mask=alone, other=0)
        modality = tl.load(spans + 3, mask=alone, other=0)
        spread = tl.load(spans + 5, mask=alone, other=0)
        shift = tl.zeros_like(spread)
        if CARRIES_OFFSET:
            shift = tl.load(spans + 6, mask=alone, other=0)
        for turn in tl.range(0, 1 if SPLIT else GROUPS):
            group = part if SPLIT and BY_GROUP else turn
            first_tile = part - QUERY_TILES if BY_TILE else 0
            first, second, passed, values, head, inside = _read_keys(
                key, value, row, live, first_tile, group, member, pair, rest, channel,
                key_row, key_group, value_row, value_group,
                KEY_HEADS, HEADS, HN, R, BLOCK_R, INTERLEAVED, NORM,
            )  # fmt: skip
            frequency_group = group if FREQUENCY_GROUPS > 1 else 0
            rate = tl.load(omega + frequency_group * R + pair, mask=pair < R, other=0.0)
            cos, sin = row_angles(doubled, moved, words, frequency_group, rate, pair, R, FREQUENCY_GROUPS, HAS_OFFSET)
            cos, sin, key_cos, key_sin = _damped(
                cos, sin, sigma, group, rate, number, live, batch, sigma_s, sigma_b, sigma_g, SIGMA_GROUPS, DAMP_QUERY
            )
            for tile in tl.static_range(0 if BY_TILE else QUERY_TILES):
                one, other, alike, target, held = _read_queries(
                    query, query_out, row, live, tile, group, member, pair, rest, query_row, query_group, query_head,
                    NP, QUERY_HEADS, PER_GROUP, HEADS, HN, R, BLOCK_R, INTERLEAVED, NORM,
                )  # fmt: skip
                _store_heads(
                    target, one, other, alike, cos, sin, query_weight, pair, rest, held, eps,
                    HN, R, BLOCK_R, INTERLEAVED, NORM, CENTRED,
                )  # fmt: skip
            for tile in tl.static_range(1 if BY_TILE else KEY_TILES):
                if tile > 0:
                    first, second, passed, values, head, inside = _read_keys(
                        key, value, row, live, tile, group, member, pair, rest, channel,
                        key_row, key_group, value_row, value_group,
                        KEY_HEADS, HEADS, HN, R, BLOCK_R, INTERLEAVED, NORM,
                    )  # fmt: skip
                inside = inside & stored
                place = line * (NG * HN) + head * HN
                _store_heads(
                    key_pages + page * key_page + place, first, second, passed, key_cos, key_sin, key_weight,
                    pair, rest, inside, eps, HN, R, BLOCK_R, INTERLEAVED, NORM, CENTRED,
                )  # fmt: skip
                tl.store(value_pages + page * value_page + place + channel, values, mask=inside & (channel < HN))
        _store_spans(
            starts, words_of_spans, reals_of_spans, halves_of_spans, page, line, alone & stored,
            start, width, level, modality, spread, shift, PAGE,
        )  # fmt: skip
