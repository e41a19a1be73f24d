"""The kernels of folded biases: what is written into spare channels, and what their gradients give to slopes.

Programs own rows with all their heads, whose spare channels are one store of eight bytes each in half precision.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _nearest(value, like):
    """Return fp32 numbers rounded to the dtype that `like` points to, to even."""
    if _INTERPRETED and like.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts off what the GPU rounds.
        whole = value.to(tl.int32, bitcast=True)
        whole = (whole + 0x7FFF + ((whole >> 16) & 1)) & -0x10000
        value = whole.to(tl.float32, bitcast=True)
    return value.to(like.dtype.element_ty)


@triton.jit
def _piece(value, like):
    """Return the nearest number that `like` points to, float64; through fp32, as PyTorch rounds."""
    return _nearest(value.to(tl.float32), like).to(tl.float32).to(tl.float64)


@triton.jit
def _place(centre, s, b, inside, centre_s, centre_b, ANCHOR: tl.constexpr):
    """Return centre - ANCHOR of rows, float64."""
    found = tl.load(centre + s * centre_s + b * centre_b, mask=inside, other=0.0)
    return found - tl.full(found.shape, ANCHOR, tl.float64)


@triton.jit
def fold_forward(
    query, key, slopes, centre, scale, rows, batch,
    query_s, query_b, query_h, key_s, key_b, key_h, slope_s, slope_b, slope_h, centre_s, centre_b,
    ANCHOR: tl.constexpr, NP: tl.constexpr, NG: tl.constexpr, BLOCK_NP: tl.constexpr, BLOCK_NG: tl.constexpr,
    FIRST: tl.constexpr, SPARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write (a, a, a, 0) for a = slope / scale into queries, and three pieces of centre - ANCHOR and 1 into keys."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s, b, inside = (row // batch).to(tl.int64), (row % batch).to(tl.int64), row < rows
    channel = tl.arange(0, SPARE)[None, None, :]

    head = tl.arange(0, BLOCK_NP)[None, :]
    seen = inside[:, None] & (head < NP)
    slope = tl.load(slopes + (s * slope_s + b * slope_b)[:, None] + head * slope_h, mask=seen, other=0.0)
    factor = tl.where(channel < SPARE - 1, tl.div_rn(slope, scale)[:, :, None], 0.0)
    at = (s * query_s + b * query_b)[:, None] + head * query_h
    tl.store(query + at[:, :, None] + FIRST + channel, _nearest(factor, query), mask=seen[:, :, None])

    place = _place(centre, s, b, inside, centre_s, centre_b, ANCHOR)
    high = _piece(place, key)
    middle = _piece(place - high, key)
    low = _piece(place - high - middle, key)
    pieces = tl.where(channel == 0, high[:, None, None], middle[:, None, None])
    pieces = tl.where(channel < 2, pieces, low[:, None, None])
    pieces = tl.where(channel < SPARE - 1, pieces, 1.0).to(tl.float32)
    group = tl.arange(0, BLOCK_NG)[None, :]
    seen = inside[:, None] & (group < NG)
    at = ((s * key_s + b * key_b)[:, None] + group * key_h)[:, :, None] + FIRST + channel
    spread = tl.broadcast_to(pieces.to(key.dtype.element_ty), [ROWS, BLOCK_NG, SPARE])
    tl.store(key + at, spread, mask=seen[:, :, None])


@triton.jit
def fold_backward(
    query_grad, centre, slope_grad, scale, rows, batch,
    query_s, query_b, query_h, centre_s, centre_b,
    ANCHOR: tl.constexpr, NP: tl.constexpr, BLOCK_NP: tl.constexpr,
    FIRST: tl.constexpr, SPARE: tl.constexpr, ROWS: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Write the gradient of slopes: with BY_ROW fp32 [rows, NP], else float64 sums over a program's rows, times scale.

    A query's is the sum of its first spare channels' less centre - ANCHOR times the last one's.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s, b, inside = (row // batch).to(tl.int64), (row % batch).to(tl.int64), row < rows
    channel = tl.arange(0, SPARE)[None, None, :]
    head = tl.arange(0, BLOCK_NP)[None, :]
    seen = inside[:, None] & (head < NP)
    at = ((s * query_s + b * query_b)[:, None] + head * query_h)[:, :, None] + FIRST + channel
    spare = tl.load(query_grad + at, mask=seen[:, :, None], other=0.0).to(tl.float32).to(tl.float64)
    place = _place(centre, s, b, inside, centre_s, centre_b, ANCHOR)
    found = tl.sum(tl.where(channel < SPARE - 1, spare, -place[:, None, None] * spare), axis=2)
    if BY_ROW:
        at = row.to(tl.int64)[:, None] * NP + head
        tl.store(slope_grad + at, tl.div_rn(found.to(tl.float32), scale), mask=seen)
    else:
        total = tl.sum(found, axis=0)
        column = tl.arange(0, BLOCK_NP)
        tl.store(slope_grad + tl.program_id(0) * NP + column, total, mask=column < NP)


@triton.jit
def sum_slopes(
    partials, slope_grad, scale, programs,
    NP: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sums of partial sums, float64 [programs, NP], over programs, rounded to fp32, over scale."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float64)
    for step in tl.range(0, STEPS):
        program = step * BLOCK + tl.arange(0, BLOCK)[:, None]
        seen = (program < programs) & (column < NP)
        total += tl.load(partials + program * NP + column, mask=seen, other=0.0)
    found = tl.div_rn(tl.sum(total, axis=0, keep_dims=True).to(tl.float32), scale)
    tl.store(slope_grad + column, found, mask=column < NP)


@triton.jit
def split_forward(
    mixed, query, key, rows, batch, mixed_s, mixed_b, mixed_g,
    NP: tl.constexpr, NG: tl.constexpr, HN: tl.constexpr, BLOCK_HN: tl.constexpr,
    SPARE: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Copy the queries and keys of each query group, contiguous, with 0 in the last SPARE channels."""
    HEADS: tl.constexpr = NP // NG
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row, place = unit // (NP + NG), unit % (NP + NG)
    group, part = place // (HEADS + 1), place % (HEADS + 1)
    channel = tl.arange(0, BLOCK_HN)[None, :]
    seen = (row < rows)[:, None] & (channel < HN)
    start = (row // batch) * mixed_s + (row % batch) * mixed_b + group * mixed_g + part * HN
    heads = tl.load(mixed + start[:, None] + channel, mask=seen, other=0.0)
    # Read with the rest: a mask of its own would halve what a load takes.
    heads = tl.where(channel < HN - SPARE, heads, tl.zeros_like(heads))
    of_query = (part < HEADS)[:, None]
    at = (row * NP + group * HEADS + part)[:, None] * HN + channel
    tl.store(query + at, heads, mask=seen & of_query)
    tl.store(key + (row * NG + group)[:, None] * HN + channel, heads, mask=seen & (part == HEADS)[:, None])


@triton.jit
def split_backward(
    query_grad, key_grad, value_grad, mixed_grad, rows, batch,
    query_s, query_b, query_h, key_s, key_b, key_h, value_s, value_b, value_h,
    NP: tl.constexpr, NG: tl.constexpr, HN: tl.constexpr, BLOCK_HN: tl.constexpr,
    SPARE: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the mixed projection whole, contiguous, 0 in queries' and keys' spare channels."""
    HEADS: tl.constexpr = NP // NG
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row, place = unit // (NP + 2 * NG), unit % (NP + 2 * NG)
    group, part = place // (HEADS + 2), place % (HEADS + 2)
    s, b = row // batch, row % batch
    channel = tl.arange(0, BLOCK_HN)[None, :]
    seen = (row < rows)[:, None] & (channel < HN)
    at = s * query_s + b * query_b + (group * HEADS + part) * query_h
    found = tl.load(query_grad + at[:, None] + channel, mask=seen & (part < HEADS)[:, None], other=0.0)
    at = s * key_s + b * key_b + group * key_h
    of_key = (part == HEADS)[:, None]
    found = tl.where(of_key, tl.load(key_grad + at[:, None] + channel, mask=seen & of_key, other=0.0), found)
    found = tl.where(channel < HN - SPARE, found, tl.zeros_like(found))
    at = s * value_s + b * value_b + group * value_h
    of_value = (part == HEADS + 1)[:, None]
    found = tl.where(of_value, tl.load(value_grad + at[:, None] + channel, mask=seen & of_value, other=0.0), found)
    tl.store(mixed_grad + unit[:, None] * HN + channel, found, mask=seen)
