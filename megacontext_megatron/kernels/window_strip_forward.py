"""The forward kernel of windows of 128 rows for Hopper: two warpgroups compute, and a warp loads ahead of them."""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from megacontext_megatron.kernels.window_strip_device import (
    BLOCK,
    EDGE,
    HN,
    LANES,
    PACK,
    RING,
    TILE_ROWS,
    TILES,
    as_lanes,
    hidden_before,
    lanes_of,
    load_block,
    operand,
    own_or_before,
    part_of,
    products,
    scores,
    three_blocks,
    weigh,
)


@gluon.jit
def _highest(score):
    return as_lanes(gl.max(score, axis=1), HN)


@gluon.jit
def _weights(score, scale, top):
    """Return exp2(score scale - top), and its sum of each lane."""
    weight = gl.exp2(score * scale - as_lanes(top, score.shape[1])[:, None])
    return weight, as_lanes(gl.sum(weight, axis=1), HN)


@gluon.jit
def _attend(q, keys, values, step, block, turn, scale, HALF: gl.constexpr):
    """Return unscaled output, the highest score and the sum of weights of the lanes of the turn-th tile of a half."""
    START: gl.constexpr = HALF * EDGE
    # Of the two blocks that hold a triangle, all lanes see the other half: of the older one after, of the newer one
    # before the triangle.
    OLD: gl.constexpr = HALF == 0
    REST: gl.constexpr = EDGE - START
    key_2, key_1, key_0 = three_blocks(keys, step)
    value_2, value_1, value_0 = three_blocks(values, step)
    whole = scores(q, key_1, 0, BLOCK)
    rest = scores(q, key_2 if OLD else key_0, REST, EDGE)
    old = scores(q, key_2, START, EDGE)
    new = scores(q, key_0, START, EDGE)
    hidden_2 = hidden_before(block, 2)
    hidden_1 = hidden_before(block, 1)
    hidden_rest = hidden_2 if OLD else 0.0
    newer = own_or_before(turn)
    whole, rest, old, new = warpgroup_mma_wait(0, deps=(whole, rest, old, new))
    edge = gl.where(newer, new, old + hidden_2)
    top = gl.maximum(_highest(edge), _highest(whole) + hidden_1)
    top = gl.maximum(top, _highest(rest) + hidden_rest) * scale
    acc = gl.zeros([LANES, HN], gl.float32, products(HN))
    weight, total = _weights(whole, scale, top - hidden_1)
    acc = weigh(acc, weight, value_1, 0, True)
    weight, more = _weights(rest, scale, top - hidden_rest)
    acc = weigh(acc, weight, value_2 if OLD else value_0, REST, False)
    total += more
    weight, more = _weights(edge, scale, top)
    acc = weigh(acc, gl.where(newer, weight, 0.0), value_0, START, False)
    acc = weigh(acc, gl.where(newer, 0.0, weight), value_2, START, False)
    return warpgroup_mma_wait(0, deps=(acc,)), top, total + more


@gluon.jit
def _load(
    query, key, value, query_tiles, keys, values, query_full, query_empty, full, empty, sq, before, strip,
    query_b, query_g, key_b, key_g, value_b, value_g, NG: gl.constexpr,
):  # fmt: skip
    sequence, group, first, steps = part_of(sq, strip, NG)
    row = before + (first - 2) * BLOCK
    key_at, value_at = sequence * key_b + group * key_g, sequence * value_b + group * value_g
    head = sequence * query_b + group * query_g
    for ahead in gl.static_range(RING - 1):
        load_block(key, value, keys, values, full, gl.to_tensor(ahead), row + ahead * BLOCK, key_at, value_at)
    for step in range(steps):
        for at in gl.static_range(TILES):
            # In the order in which they are asked for: the first of each half, then the second.
            mbarrier.wait(query_empty.index(at), (step & 1) ^ 1)
            arrived = query_full.index(at)
            mbarrier.expect(arrived, query.block_type.nbytes)
            line = (first + step) * BLOCK + (at % 2) * EDGE + (at // 2) * TILE_ROWS
            tma.async_copy_global_to_shared(query, [line, head, 0], arrived, query_tiles.index(at))
        number = step + RING - 1
        if number < steps + 2:
            mbarrier.wait(empty.index(number % RING), ((number // RING) & 1) ^ 1)
            load_block(key, value, keys, values, full, number, row + number * BLOCK, key_at, value_at)


@gluon.jit
def _write(acc, top, total, out, out_tile, normaliser, row, head, part, sq):
    """Write a tile that begins at `row` and `head`: its output through shared memory, and its normalisers."""
    finished = (acc * (1.0 / total)[:, None]).to(out.dtype)
    tma.store_wait(0)
    gl.thread_barrier()
    out_tile.reshape([LANES, HN]).store(finished)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out, [row, head, 0], out_tile)
    lane = gl.arange(0, LANES, lanes_of(HN))
    at = (part.to(gl.int64) * sq + row) * PACK + lane
    gl.store(normaliser + at, top + gl.log2(total), mask=lane < (sq - row) * PACK)


@gluon.jit
def _compute(
    out, normaliser, query_tiles, keys, values, out_tile, query_full, query_empty, full, empty, scale, sq, strip,
    seen, out_b, NG: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Compute the tiles of one half of each block of a strip."""
    sequence, group, first, steps = part_of(sq, strip, NG)
    part = sequence * NG + group
    head = sequence * out_b + group * PACK
    mbarrier.wait(full.index(0), 0)
    mbarrier.wait(full.index(1), 0)
    for tile in range(2 * steps):
        step, turn = tile // 2, tile % 2
        mbarrier.wait(full.index((step + 2) % RING), ((step + 2) // RING) & 1)
        slot = 2 * turn + HALF
        mbarrier.wait(query_full.index(slot), step & 1)
        q = query_tiles.index(slot).reshape([LANES, HN]).load(operand(BLOCK))
        # What copies next into this tile must come after these loads.
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(query_empty.index(slot), count=1)
        acc, top, total = _attend(q, keys, values, step, first + step + seen, turn, scale, HALF)
        # All four warps have waited for their products before one gives the oldest block back.
        gl.thread_barrier()
        if turn == 1:
            mbarrier.arrive(empty.index(step % RING), count=1)
        row = (first + step) * BLOCK + HALF * EDGE + turn * TILE_ROWS
        _write(acc, top, total, out, out_tile, normaliser, row, head, part, sq)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["sq", "before", "strip", "seen"])
def strip_forward_kernel(
    query, key, value, out, normaliser, scale, sq, before, strip, seen,
    query_b, query_g, key_b, key_g, value_b, value_g, out_b, NG: gl.constexpr,
):  # fmt: skip
    """Write attention [sq, b, np, hn] and log2 of each lane's sum of weights, fp32 [b, ng, sq, PACK].

    Of queries rows and heads are described, of keys and values rows and channels; `query_b`, `query_g` and `out_b`
    count heads, `key_b` and the like channels.  `before` is how many rows of keys lie before the first query, `strip`
    how many blocks of rows a program owns, and `seen` how many blocks of keys before the first are there.  `scale`
    includes log2 e and is positive.
    """
    query_tiles = gl.allocate_shared_memory(query.dtype, [TILES, TILE_ROWS, PACK, HN], query.layout)
    keys = gl.allocate_shared_memory(key.dtype, [RING, BLOCK, HN], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [RING, BLOCK, HN], value.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [2, TILE_ROWS, PACK, HN], out.layout)
    query_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    query_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for tile in gl.static_range(TILES):
        mbarrier.init(query_full.index(tile), count=1)
        mbarrier.init(query_empty.index(tile), count=1)
    for slot in gl.static_range(RING):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    # The unit that copies must see the barriers as they are now.
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (out, normaliser, query_tiles, keys, values, out_tiles.index(0), query_full, query_empty, full,
                        empty, scale, sq, strip, seen, out_b, NG, 0)),
            (_compute, (out, normaliser, query_tiles, keys, values, out_tiles.index(1), query_full, query_empty, full,
                        empty, scale, sq, strip, seen, out_b, NG, 1)),
            (_load, (query, key, value, query_tiles, keys, values, query_full, query_empty, full, empty, sq, before,
                     strip, query_b, query_g, key_b, key_g, value_b, value_g, NG)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
