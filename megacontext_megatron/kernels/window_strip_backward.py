"""The gradient of queries in windows of 128 rows for Hopper: two warpgroups compute, and a warp loads ahead of them.

With P the weights and dP = dO V': dS = P (dP - delta) and dQ = dS K.  All weights of a lane are in registers, so delta
is found as the sum of P dP, which is rowsum(dO O) (Dao et al., "FlashAttention", appendix B) without reading O.
"""

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

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _weights(score, power, log):
    return gl.exp2(score * power - as_lanes(log, score.shape[1])[:, None])


@gluon.jit
def _sums(weight, change):
    return as_lanes(gl.sum(weight * change, axis=1), HN)


@gluon.jit
def _through(weight, change, along):
    """Return the gradient of scores."""
    return weight * (change - as_lanes(along, weight.shape[1])[:, None])


@gluon.jit
def _gradient(q, grad, log, keys, values, step, block, turn, power, HALF: gl.constexpr):
    """Return the gradient of the lanes of the turn-th tile of a half, but for the scale of scores, and delta."""
    START: gl.constexpr = HALF * EDGE
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
    change = scores(grad, value_1, 0, BLOCK)
    change_rest = scores(grad, value_2 if OLD else value_0, REST, EDGE)
    change_old = scores(grad, value_2, START, EDGE)
    change_new = scores(grad, value_0, START, EDGE)
    whole = _weights(whole, power, log - hidden_1)
    rest = _weights(rest, power, log - hidden_rest)
    edge = _weights(edge, power, log)
    change, change_rest, change_old, change_new = warpgroup_mma_wait(
        0, deps=(change, change_rest, change_old, change_new)
    )
    change_edge = gl.where(newer, change_new, change_old)
    along = _sums(whole, change) + _sums(rest, change_rest) + _sums(edge, change_edge)
    acc = gl.zeros([LANES, HN], gl.float32, products(HN))
    acc = weigh(acc, _through(whole, change, along), key_1, 0, True)
    acc = weigh(acc, _through(rest, change_rest, along), key_2 if OLD else key_0, REST, False)
    change_edge = _through(edge, change_edge, along)
    acc = weigh(acc, gl.where(newer, change_edge, 0.0), key_0, START, False)
    acc = weigh(acc, gl.where(newer, 0.0, change_edge), key_2, START, False)
    return warpgroup_mma_wait(0, deps=(acc,)), along


@gluon.jit
def _turned_back(x, table, planes, line, R: gl.constexpr, INTERLEAVED: gl.constexpr):
    """Return gradients of lanes [LANES, HN] before the rotation whose cosines and sines are at table lines."""
    HALF: gl.constexpr = HN // 2
    if not INTERLEAVED:
        x = gl.permute(gl.reshape(x, [LANES, HALF // R, 2, R]), (0, 1, 3, 2))
    first, second = gl.split(gl.reshape(x, [LANES, HALF, 2]))
    pairs: gl.constexpr = first.type.layout
    pair = gl.arange(0, HALF, gl.SliceLayout(0, pairs))[None, :]
    at = table + gl.convert_layout(line, gl.SliceLayout(1, pairs), assert_trivial=True)[:, None] * R + pair
    cos, sin = gl.load(at, mask=pair < R, other=1.0), gl.load(at + planes, mask=pair < R, other=0.0)
    x = gl.join(first * cos + second * sin, second * cos - first * sin)
    if not INTERLEAVED:
        x = gl.permute(gl.reshape(x, [LANES, HALF // R, R, 2]), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(x, [LANES, HN]), products(HN), assert_trivial=True)


@gluon.jit
def _load(
    query, key, value, out_grad, query_tiles, grad_tiles, keys, values, tile_full, tile_empty, full, empty, sq, before,
    strip, query_b, query_g, key_b, key_g, value_b, value_g, out_b, NG: gl.constexpr,
):  # fmt: skip
    sequence, group, first, steps = part_of(sq, strip, NG)
    row = before + (first - 2) * BLOCK
    key_at, value_at = sequence * key_b + group * key_g, sequence * value_b + group * value_g
    head, out_head = sequence * query_b + group * query_g, sequence * out_b + group * PACK
    for ahead in gl.static_range(RING - 1):
        load_block(key, value, keys, values, full, gl.to_tensor(ahead), row + ahead * BLOCK, key_at, value_at)
    for step in range(steps):
        for tile in gl.static_range(TILES):
            if tile == 2:
                # Both warpgroups are past the last step once the first has the first tile of this one.
                number = step + RING - 1
                if number < steps + 2:
                    mbarrier.wait(empty.index(number % RING), ((number // RING) & 1) ^ 1)
                    load_block(key, value, keys, values, full, number, row + number * BLOCK, key_at, value_at)
            mbarrier.wait(tile_empty.index(tile % 2), (tile // 2) ^ 1)
            arrived = tile_full.index(tile % 2)
            mbarrier.expect(arrived, 2 * query.block_type.nbytes)
            at = (first + step) * BLOCK + (tile % 2) * EDGE + (tile // 2) * TILE_ROWS
            tma.async_copy_global_to_shared(query, [at, head, 0], arrived, query_tiles.index(tile % 2))
            tma.async_copy_global_to_shared(out_grad, [at, out_head, 0], arrived, grad_tiles.index(tile % 2))


@gluon.jit
def _compute(
    normaliser, delta, table, query_grad, query_tiles, grad_tiles, keys, values, out_tile, tile_full, tile_empty, full,
    empty, scale, sq, before, strip, seen, planes, query_grad_b, query_grad_g, batch, NG: gl.constexpr,
    HALF: gl.constexpr, ROTATE: gl.constexpr, TABLE_GROUPS: gl.constexpr, R: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """Compute the tiles of one half of each block of a strip."""
    sequence, group, first, steps = part_of(sq, strip, NG)
    head = sequence * query_grad_b + group * query_grad_g
    lines = (sequence * NG + group).to(gl.int64) * sq
    lane = gl.arange(0, LANES, lanes_of(HN))
    tile_full, tile_empty = tile_full.index(HALF), tile_empty.index(HALF)
    query_tile = query_tiles.index(HALF).reshape([LANES, HN])
    grad_tile = grad_tiles.index(HALF).reshape([LANES, HN])
    mbarrier.wait(full.index(0), 0)
    mbarrier.wait(full.index(1), 0)
    for tile in range(2 * steps):
        step, turn = tile // 2, tile % 2
        mbarrier.wait(full.index((step + 2) % RING), ((step + 2) // RING) & 1)
        row = (first + step) * BLOCK + HALF * EDGE + turn * TILE_ROWS
        inside = lane < (sq - row) * PACK
        at = (lines + row) * PACK + lane
        # Lanes that nothing belongs to get no weight.
        log = gl.load(normaliser + at, mask=inside, other=float("inf"))
        mbarrier.wait(tile_full, turn)
        q = query_tile.load(operand(BLOCK))
        grad = grad_tile.load(operand(BLOCK))
        # What copies next into these tiles must come after these loads.
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(tile_empty, count=1)
        acc, along = _gradient(q, grad, log, keys, values, step, first + step + seen, turn, scale * LOG2_E, HALF)
        # All four warps have waited for their products before one gives the oldest block back.
        gl.thread_barrier()
        if turn == 1:
            mbarrier.arrive(empty.index(step % RING), count=1)
        gl.store(delta + at, along, mask=inside)
        acc = acc * scale
        if ROTATE:
            own = before + gl.minimum(row + lane // PACK, sq - 1)
            line = (own.to(gl.int64) * batch + sequence) * TABLE_GROUPS + group % TABLE_GROUPS
            acc = _turned_back(acc, table, planes, line, R, INTERLEAVED)
        finished = acc.to(query_grad.dtype)
        tma.store_wait(0)
        gl.thread_barrier()
        out_tile.reshape([LANES, HN]).store(finished)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(query_grad, [row, head, 0], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["sq", "before", "strip", "seen", "batch"])
def strip_query_kernel(
    query, key, value, out_grad, query_grad, normaliser, delta, table, scale, sq, before, strip, seen, batch, planes,
    query_b, query_g, key_b, key_g, value_b, value_g, out_b, query_grad_b, query_grad_g, NG: gl.constexpr,
    ROTATE: gl.constexpr, TABLE_GROUPS: gl.constexpr, R: gl.constexpr, INTERLEAVED: gl.constexpr,
):  # fmt: skip
    """Write gradients of queries, turned back with ROTATE, and delta fp32 [b, ng, sq, PACK].

    `out_b`, of `out_grad` [sq, b, np, hn], `query_grad_b` and `query_grad_g` count heads, and `scale` is that of scores
    in nats; the rest as in strip_forward_kernel.
    """
    query_tiles = gl.allocate_shared_memory(query.dtype, [2, TILE_ROWS, PACK, HN], query.layout)
    grad_tiles = gl.allocate_shared_memory(out_grad.dtype, [2, TILE_ROWS, PACK, HN], out_grad.layout)
    keys = gl.allocate_shared_memory(key.dtype, [RING, BLOCK, HN], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [RING, BLOCK, HN], value.layout)
    out_tiles = gl.allocate_shared_memory(query_grad.dtype, [2, TILE_ROWS, PACK, HN], query_grad.layout)
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(tile_full.index(slot), count=1)
        mbarrier.init(tile_empty.index(slot), count=1)
    for slot in gl.static_range(RING):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    # The unit that copies must see the barriers as they are now.
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (normaliser, delta, table, query_grad, query_tiles, grad_tiles, keys, values,
                        out_tiles.index(0), tile_full, tile_empty, full, empty, scale, sq, before, strip, seen, planes,
                        query_grad_b, query_grad_g, batch, NG, 0, ROTATE, TABLE_GROUPS, R, INTERLEAVED)),
            (_compute, (normaliser, delta, table, query_grad, query_tiles, grad_tiles, keys, values,
                        out_tiles.index(1), tile_full, tile_empty, full, empty, scale, sq, before, strip, seen, planes,
                        query_grad_b, query_grad_g, batch, NG, 1, ROTATE, TABLE_GROUPS, R, INTERLEAVED)),
            (_load, (query, key, value, out_grad, query_tiles, grad_tiles, keys, values, tile_full, tile_empty, full,
                     empty, sq, before, strip, query_b, query_g, key_b, key_g, value_b, value_g, out_b, NG)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
