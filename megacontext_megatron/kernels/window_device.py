"""What the sliding-window attention kernels share: which rows and heads a program owns, and rotations undone.

A tile of queries has lanes: neighbouring heads of a query group for each of a few rows, so that the keys and values of
a group are read once for all its heads.  A group takes PACK lanes of a row, a power of two; those beyond its heads
repeat its last head and are never written.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_part(batch, NG: tl.constexpr):
    """Return the tile, sequence (int64) and query group of this program: neighbours in time share rows of memory."""
    number = tl.program_id(0)
    return number // (NG * batch), tl.cast((number // NG) % batch, tl.int64), number % NG


@triton.jit
def load_lanes(base, row, head, stride_row, stride_head, HN: tl.constexpr):
    """Return [lanes, HN] of rows counted from `base` and heads of its group."""
    return tl.load(base + (row * stride_row + head * stride_head)[:, None] + tl.arange(0, HN)[None, :])


@triton.jit
def load_rows(base, row, stride, HN: tl.constexpr):
    """Return [rows, HN] of rows counted from `base`."""
    return tl.load(base + row[:, None] * stride + tl.arange(0, HN)[None, :])


@triton.jit
def visible(row, column, look_back):
    """Return whether queries at key rows `row` see keys at `column`; shapes broadcast."""
    # A key that comes later is at a distance that is huge without its sign.
    return (row - column).to(tl.uint32, bitcast=True) <= tl.cast(look_back, tl.uint32)


@triton.jit
def load_angles(table, planes, line, HN: tl.constexpr, R: tl.constexpr):
    """Return cosine and sine [lanes, HN / 2] of table lines, 1 and 0 for pairs that do not turn."""
    pair = tl.arange(0, HN // 2)[None, :]
    at = table + line[:, None] * R + pair
    return tl.load(at, mask=pair < R, other=1.0), tl.load(at + planes, mask=pair < R, other=0.0)


@triton.jit
def members(x, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the first and the second members of pairs of channels [lanes, HN / 2], of heads [lanes, HN]."""
    LANES: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if not INTERLEAVED:
        x = tl.permute(tl.reshape(x, (LANES, HALF // R, 2, R)), (0, 1, 3, 2))
    return tl.split(tl.reshape(x, (LANES, HALF, 2)))


@triton.jit
def heads_of(first, second, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return heads [lanes, HN] of what `members` returned."""
    LANES: tl.constexpr = first.shape[0]
    HALF: tl.constexpr = first.shape[1]
    x = tl.join(first, second)
    if not INTERLEAVED:
        x = tl.permute(tl.reshape(x, (LANES, HALF // R, R, 2)), (0, 1, 3, 2))
    return tl.reshape(x, (LANES, 2 * HALF))


@triton.jit
def turned_back(x, cos, sin, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return gradients of heads [lanes, HN], fp32, before their rotation by these cosines and sines."""
    first, second = members(x, R, INTERLEAVED)
    return heads_of(first * cos + second * sin, second * cos - first * sin, R, INTERLEAVED)
