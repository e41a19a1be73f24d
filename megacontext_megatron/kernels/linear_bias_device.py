"""What the linear-bias attention kernels share: distances of rows, masks, and how far a tile of queries reaches.

Places of rows are three lines of fp32: the nearest number to a centre, what is left of it (together exact below 2^47
tokens), and the distance from the last row of the frame, FRAME consecutive rows from a multiple of FRAME on.  Within a
frame distances are short; between the anchors of two frames there is one for a whole tile.  So a distance keeps the
relative precision of fp32 wherever in a sequence its rows are, and costs one addition.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl

from megacontext_megatron.kernels.attention_device import bound


@triton.jit
def load_centre(places, columns, row):
    """Return the two parts of a row's centre, from the places of one sequence, lines of `columns` numbers."""
    return tl.load(places + row), tl.load(places + columns + row)


@triton.jit
def separation(places, columns, row, anchor_high, anchor_low):
    """Return centres of rows less an anchor's, tokens, fp32."""
    high, low = load_centre(places, columns, row)
    return (high - anchor_high) + (low - anchor_low)


@triton.jit
def frame_end(row, rows, FRAME: tl.constexpr):
    """Return the last of `rows` rows that lies in the frame of `row`."""
    return tl.minimum(row // FRAME * FRAME + FRAME, rows) - 1


@triton.jit
def load_rows(
    heads,
    row,
    sequence,
    head,
    rows,
    stride_s,
    stride_b,
    stride_h,
    ROWS: tl.constexpr,
    HN: tl.constexpr,
    BULK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Return rows `row` to `row` + ROWS of a head, [ROWS, HN], of a tensor [rows, b, heads, HN].

    `heads` is a pointer or, for bulk copies (BULK), a tensor descriptor of rows by all elements up to the last head's.
    Where a tile may end beyond the last row (RAGGED), rows beyond are some number.
    """
    if BULK:
        tile = heads.load([row, tl.cast(sequence, tl.int32) * stride_b + head * stride_h])
    else:
        at = tl.arange(0, ROWS)
        if RAGGED:
            at = tl.minimum(at, rows - 1 - row)
        base = heads + tl.cast(sequence, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
        base += row * tl.cast(stride_s, tl.int64)
        tile = tl.load(base + at[:, None] * stride_s + tl.arange(0, HN)[None, :])
    return tile


@triton.jit
def load_line(line, at, ROWS: tl.constexpr, BULK: tl.constexpr):
    """Return ROWS consecutive numbers from `at` on, from a pointer or a descriptor (BULK) of one dimension."""
    return line.load([tl.cast(at, tl.int32)]) if BULK else tl.load(line + at + tl.arange(0, ROWS))


@triton.jit
def visible(row, column, look_back, WINDOW: tl.constexpr):
    """Return whether queries at key rows `row` see keys at `column`; shapes broadcast."""
    seen = column <= row
    if WINDOW:
        seen = seen & (column >= row - look_back)
    return seen


@triton.jit
def load_slope(slopes, head, at, slope_s, slope_b, slope_h, sequence, BIAS: tl.constexpr):
    """Return slopes in powers of two per token: one of a head (BIAS 1), or of its rows `at` (BIAS 2)."""
    if BIAS == 2:
        slope = tl.load(slopes + sequence * slope_b + head * slope_h + at.to(tl.int64) * slope_s)
    else:
        slope = tl.load(slopes + head * slope_h)
    return slope * 1.4426950408889634


@triton.jit
def write_places(doubled, places, sk, centre_s, centre_b, FRAME: tl.constexpr):
    """Write the places of rows [b, 3, whole frames] from doubled centres int64 [sk, b]; one program for a frame."""
    at = tl.program_id(0) * FRAME + tl.arange(0, FRAME)
    columns = tl.num_programs(0) * FRAME
    sequence = tl.cast(tl.program_id(1), tl.int64)
    doubled += sequence * centre_b
    anchor = tl.load(doubled + tl.cast(frame_end(tl.program_id(0) * FRAME, sk, FRAME), tl.int64) * centre_s)
    centre = tl.load(doubled + at.to(tl.int64) * centre_s, mask=at < sk, other=0)
    centre = tl.where(at < sk, centre, anchor)
    high = centre.to(tl.float32)
    target = places + sequence * 3 * columns + at
    tl.store(target, high * 0.5)
    tl.store(target + columns, (centre - high.to(tl.int64)).to(tl.float32) * 0.5)
    tl.store(target + 2 * columns, (centre - anchor).to(tl.float32) * 0.5)


@triton.jit
def first_visited(
    doubled,
    slopes,
    score_bound,
    first,
    work,
    margin,
    sq,
    sk,
    centre_s,
    centre_b,
    slope_s,
    slope_b,
    slope_h,
    NP: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Write the first key row that matters to each tile of ROWS queries, int32 [b, np, tiles], and each head's work.

    One program serves one head of one sequence.  `work` int64 [b, np] counts visited keys over its tiles.
    """
    sequence = tl.cast(tl.program_id(0) // NP, tl.int64)
    head = tl.program_id(0) % NP
    tiles = tl.cdiv(sq, ROWS)
    centre = doubled + sequence * centre_b
    total = tl.zeros([TILES], tl.int64)
    step = tl.cast(centre_s, tl.int64)
    for start in tl.range(0, bound(tiles), TILES):
        tile = start + tl.arange(0, TILES)
        inside = tile < tiles
        row = tl.minimum(tile * ROWS, sq - 1)
        if BIAS == 2:
            own = tl.minimum(row[:, None] + tl.arange(0, ROWS)[None, :], sq - 1).to(tl.int64)
            slope = tl.min(tl.load(slopes + sequence * slope_b + head * slope_h + own * slope_s), axis=1)
        else:
            slope = tl.load(slopes + head * slope_h) + tl.zeros([TILES], tl.float32)
        # Rounded up by more than fp32 loses; the largest float below 2^62 stands for a reach without end.
        far = 2.000002 * (2.0 * tl.load(score_bound + head) + margin)
        far = tl.where(slope * 4.0e18 > far, far / slope, 4.0e18).to(tl.int64)
        row += sk - sq
        nearest = tl.load(centre + row * step) - far
        low, high = tl.zeros([TILES], tl.int32), row
        for _ in range(STEPS):
            middle = (low + high) // 2
            dead = (low < high) & (tl.load(centre + middle * step) < nearest)
            high = tl.where(dead | (low >= high), high, middle)
            low = tl.where(dead, middle + 1, low)
        tl.store(first + tl.cast(tl.program_id(0), tl.int64) * tiles + tile, low, mask=inside)
        total += tl.where(inside, row + ROWS - low, 0).to(tl.int64)
    tl.store(work + tl.program_id(0), tl.sum(total, axis=0))
