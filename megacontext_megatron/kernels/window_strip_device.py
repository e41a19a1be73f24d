"""What the kernels that march along strips of rows share: layouts, products, and the ring of keys and values.

A program owns a strip of rows of one query group.  Keys and values of the group live in a ring of four blocks of 64
rows in shared memory, and each is read from memory once, and once more where strips of two blocks or more meet.  A tile
is 16 rows of 4 heads, 64 lanes.  Its rows see 128 keys each: the block before their own whole, 32 keys more, and two
triangles of 32 keys, the oldest and the newest, which fill one another up: wherever a lane sees a column of the one, it
does not see that column of the other.  So weights of exactly 128 columns for each lane are in registers at once.  A
warpgroup owns one half of each block, two tiles.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

LANES = gl.constexpr(64)
TILE_ROWS = gl.constexpr(16)
TILES = gl.constexpr(4)
"""Of rows in a block."""
PACK = gl.constexpr(4)
"""Query heads of a group."""
HN = gl.constexpr(128)
BLOCK = gl.constexpr(64)
"""Rows of keys."""
RING = gl.constexpr(4)
EDGE = gl.constexpr(32)
"""Keys of a triangle."""


@gluon.constexpr_function
def products(keys):
    """Return the layout of products with so many columns, of one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, keys, 16])


@gluon.constexpr_function
def operand(columns):
    """Return the layout of a left operand, for products with so many columns."""
    return gl.DotOperandLayout(0, products(columns), 2)


@gluon.constexpr_function
def lanes_of(columns):
    """Return the layout of one number a lane, of products with so many columns."""
    return gl.SliceLayout(1, products(columns))


@gluon.jit
def as_lanes(x, COLUMNS: gl.constexpr):
    """Return numbers a lane in the layout of products with so many columns: all such layouts are the same."""
    return gl.convert_layout(x, lanes_of(COLUMNS), assert_trivial=True)


@gluon.jit
def scores(q, block, START: gl.constexpr, KEYS: gl.constexpr):
    """Start the products of lanes with KEYS rows of a block from row START on."""
    q = gl.convert_layout(q, operand(KEYS), assert_trivial=True)
    zero = gl.zeros([LANES, KEYS], gl.float32, products(KEYS))
    return warpgroup_mma(q, block.slice(START, KEYS, 0).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def weigh(acc, weight, block, START: gl.constexpr, FIRST: gl.constexpr):
    """Start acc + weight times the rows of a block from row START on."""
    KEYS: gl.constexpr = weight.shape[1]
    weight = gl.convert_layout(weight.to(block.dtype), operand(HN), assert_trivial=True)
    return warpgroup_mma(weight, block.slice(START, KEYS, 0), acc, use_acc=not FIRST, is_async=True)


@gluon.jit
def own_or_before(turn):
    """Return whether a column of the newest triangle is a lane's own row or before it, of the turn-th tile of a half.

    Where it is not, that column of the oldest triangle is seen instead.
    """
    own = gl.arange(0, LANES, lanes_of(EDGE)) // PACK + turn * TILE_ROWS
    return gl.arange(0, EDGE, gl.SliceLayout(0, products(EDGE)))[None, :] <= own[:, None]


@gluon.jit
def hidden_before(block, NUMBER: gl.constexpr):
    """Return minus infinity where the block NUMBER before a block lies before row 0 of keys, else 0.

    `block` is the block's number, counted such that blocks from 0 on hold rows.
    """
    return gl.where(block < NUMBER, float("-inf"), 0.0)


@gluon.jit
def part_of(sq, strip, NG: gl.constexpr):
    """Return sequence and group, the first block and the number of blocks of this program."""
    number = gl.program_id(0)
    first = gl.program_id(1) * strip
    return number // NG, number % NG, first, gl.minimum(strip, (sq + BLOCK - 1) // BLOCK - first)


@gluon.jit
def load_block(key, value, keys, values, full, number, row, key_at, value_at):
    """Start the load of the block of keys and values at `row`, as the strip's `number`-th."""
    slot = number % RING
    arrived = full.index(slot)
    mbarrier.expect(arrived, 2 * key.block_type.nbytes)
    tma.async_copy_global_to_shared(key, [row, key_at], arrived, keys.index(slot))
    tma.async_copy_global_to_shared(value, [row, value_at], arrived, values.index(slot))


@gluon.jit
def three_blocks(ring, step):
    """Return the blocks two before, one before, and at a strip's `step`."""
    return ring.index(step % RING), ring.index((step + 1) % RING), ring.index((step + 2) % RING)
