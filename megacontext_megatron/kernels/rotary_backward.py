"""The backward kernel of the span rotary: all gradients in one launch, without atomics.

With y the rotated and damped pair and g its gradient, let A = g2 y1 - g1 y2 and B = g1 y1 + g2 y2.  Then per pair
d omega = (mu - c) A - omega sigma^2 B, d sigma = -sigma omega^2 B, d mu = omega A, each summed over heads (and rows):
no division by the damping, so a pair that is damped to nothing has finite gradients.  Attention sees only differences
of centres, so A sums to zero over the queries and keys of a sequence and c is free: counting from a near place keeps
the digits of d omega.

Sums over rows are left as one partial sum for each program, in an order that depends on shapes alone.
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
def _heads_gradient(
    gradient,
    seen,
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
    READ: tl.constexpr,
):
    """Write the gradient of heads; return A, B and what the norm's weight gets from each lane, fp32.

    `seen` is what went in where there is a norm, and what came out where there is none.
    """
    first_grad, second_grad = load_pairs(gradient, pair, inside, R, BLOCK_R, INTERLEAVED)
    turn = tl.zeros_like(first_grad)
    shrink = tl.zeros_like(first_grad)
    first_weight_grad = tl.zeros_like(first_grad)
    second_weight_grad = tl.zeros_like(first_grad)
    rest_weight_grad = tl.zeros([first_grad.shape[0], rest.shape[1]], tl.float32)
    if 2 * R < HN or NORM:
        rest_grad = load_rest(gradient, rest, inside, HN, R)
    first_back = first_grad * cos + second_grad * sin
    second_back = second_grad * cos - first_grad * sin
    if READ or NORM:
        first, second = load_pairs(seen, pair, inside, R, BLOCK_R, INTERLEAVED)
    if NORM:
        passed = load_rest(seen, rest, inside, HN, R)
        scale = inverse_rms(first, second, passed, eps, HN)
        first, second, passed = first * scale, second * scale, passed * scale
        first_weight, second_weight, rest_weight = load_weight(weight, pair, rest, HN, R, INTERLEAVED, CENTRED)
        first_weight_grad = first_back * first
        second_weight_grad = second_back * second
        rest_weight_grad = rest_grad * passed
        first_back *= first_weight
        second_back *= second_weight
        rest_grad *= rest_weight
        along = tl.sum(first_back * first + second_back * second, axis=1) + tl.sum(rest_grad * passed, axis=1)
        along = along[:, None] / HN
        first_back = scale * (first_back - first * along)
        second_back = scale * (second_back - second * along)
        rest_grad = scale * (rest_grad - passed * along)
        if READ:
            one, other = first * first_weight, second * second_weight
            first, second = one * cos - other * sin, other * cos + one * sin
    if READ:
        turn = second_grad * first - first_grad * second
        shrink = first_grad * first + second_grad * second
    store_pairs(target, first_back, second_back, pair, inside, R, BLOCK_R, INTERLEAVED)
    if 2 * R < HN:
        tl.store(target + 2 * R + rest, rest_grad.to(target.dtype.element_ty), mask=inside & (rest < HN - 2 * R))
    return turn, shrink, first_weight_grad, second_weight_grad, rest_weight_grad


@triton.jit
def _store_weight(
    target, first, second, passed, pair, rest, HN: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Write a norm weight's gradient, summed over lanes, in the order of channels."""
    step: tl.constexpr = 2 if INTERLEAVED else 1
    other: tl.constexpr = 1 if INTERLEAVED else R
    tl.store(target + step * pair, tl.sum(first, axis=0)[None, :], mask=pair < R)
    tl.store(target + step * pair + other, tl.sum(second, axis=0)[None, :], mask=pair < R)
    tl.store(target + 2 * R + rest, tl.sum(passed, axis=0)[None, :], mask=rest < HN - 2 * R)


@triton.jit
def backward_kernel(
    query_grad,
    key_grad,
    value_grad,
    query_seen,
    key_seen,
    query_out,
    key_out,
    value_out,
    doubled_centre,
    sigma,
    offset,
    anchor,
    words,
    omega,
    query_weight,
    key_weight,
    omega_partial,
    weight_partial,
    sigma_grad,
    offset_grad,
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
    HAS_ANCHOR: tl.constexpr,
    DAMP_QUERY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    COPY_VALUE: tl.constexpr,
    GRAD_OMEGA: tl.constexpr,
    GRAD_SIGMA: tl.constexpr,
    GRAD_OFFSET: tl.constexpr,
):
    """Write gradients of queries, keys and values, and partial or whole gradients of places, frequencies and weights.

    Incoming gradients are contiguous [T, heads, hn]; the strides are those of what is written, and with NORM also of
    what is read.  `sigma_grad` is [T, 1 or ng], `offset_grad` [T], `omega_partial` [programs, groups, R], where groups
    is ng if query groups differ, and `weight_partial` [programs, 2, hn].
    """
    PER_GROUP: tl.constexpr = NP // NG
    BY_GROUP: tl.constexpr = FREQUENCY_GROUPS > 1 or SIGMA_GROUPS > 1
    GROUPS: tl.constexpr = NG if BY_GROUP else 1
    QUERY_HEADS: tl.constexpr = NP // GROUPS
    KEY_HEADS: tl.constexpr = NG // GROUPS
    READ: tl.constexpr = GRAD_OMEGA or GRAD_SIGMA or GRAD_OFFSET
    pair = tl.arange(0, BLOCK_R)[None, :]
    rest = tl.arange(0, BLOCK_REST)[None, :]
    lane = tl.arange(0, ROWS * HEADS)[:, None]
    own_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    number = tl.program_id(0) * ROWS + lane // HEADS
    live = number < rows
    doubled = load_of_row(doubled_centre, number, live, batch, centre_s, centre_b).to(tl.int64)
    moved = tl.zeros([ROWS * HEADS, 1], tl.float32)
    if HAS_OFFSET:
        moved = load_of_row(offset, number, live, batch, offset_s, offset_b).to(tl.float32)
    distance = moved
    if GRAD_OMEGA:
        near = doubled
        if HAS_ANCHOR:
            near -= tl.load(anchor + number % batch)
        distance += near.to(tl.float32) * 0.5
    row = number.to(tl.int64)
    query_first = tl.zeros([ROWS * HEADS, BLOCK_R], tl.float32)
    query_second = tl.zeros([ROWS * HEADS, BLOCK_R], tl.float32)
    query_rest = tl.zeros([ROWS * HEADS, BLOCK_REST], tl.float32)
    key_first = tl.zeros([ROWS * HEADS, BLOCK_R], tl.float32)
    key_second = tl.zeros([ROWS * HEADS, BLOCK_R], tl.float32)
    key_rest = tl.zeros([ROWS * HEADS, BLOCK_REST], tl.float32)
    sigma_sum = tl.zeros([ROWS], tl.float32)
    offset_sum = tl.zeros([ROWS], tl.float32)
    for group in tl.range(0, GROUPS):
        frequency_group = group if FREQUENCY_GROUPS > 1 else 0
        rate = tl.load(omega + frequency_group * R + pair, mask=pair < R, other=0.0)
        cos, sin = row_angles(doubled, moved, words, frequency_group, rate, pair, R, FREQUENCY_GROUPS, HAS_OFFSET)
        key_cos, key_sin = cos, sin
        spread = tl.zeros([ROWS * HEADS, 1], tl.float32)
        if SIGMA_GROUPS > 0:
            spreads = sigma + (group * sigma_g if SIGMA_GROUPS > 1 else 0)
            spread = load_of_row(spreads, number, live, batch, sigma_s, sigma_b).to(tl.float32)
            damp = damping(spread, rate)
            key_cos, key_sin = cos * damp, sin * damp
            if DAMP_QUERY:
                cos, sin = key_cos, key_sin
        turns = tl.zeros([ROWS * HEADS, BLOCK_R], tl.float32)
        shrinks = tl.zeros([ROWS * HEADS, BLOCK_R], tl.float32)
        for start in tl.range(0, QUERY_HEADS, HEADS):
            inside = live & (start + lane % HEADS < QUERY_HEADS)
            head = group * QUERY_HEADS + start + lane % HEADS
            dense = row * (NP * HN) + head * HN
            target = row * query_row + (head // PER_GROUP) * query_group + (head % PER_GROUP) * query_head
            turn, shrink, first, second, passed = _heads_gradient(
                query_grad + dense, query_seen + (target if NORM else dense), query_out + target,
                cos, sin, query_weight, pair, rest, inside, eps,
                HN, R, BLOCK_R, INTERLEAVED, NORM, CENTRED, READ,
            )  # fmt: skip
            turns += turn
            if DAMP_QUERY:
                shrinks += shrink
            if NORM:
                query_first, query_second, query_rest = query_first + first, query_second + second, query_rest + passed
        for start in tl.range(0, KEY_HEADS, HEADS):
            inside = live & (start + lane % HEADS < KEY_HEADS)
            head = group * KEY_HEADS + start + lane % HEADS
            dense = row * (NG * HN) + head * HN
            target = row * key_row + head * key_group
            turn, shrink, first, second, passed = _heads_gradient(
                key_grad + dense, key_seen + (target if NORM else dense), key_out + target,
                key_cos, key_sin, key_weight, pair, rest, inside, eps,
                HN, R, BLOCK_R, INTERLEAVED, NORM, CENTRED, READ,
            )  # fmt: skip
            turns += turn
            shrinks += shrink
            if NORM:
                key_first, key_second, key_rest = key_first + first, key_second + second, key_rest + passed
            if COPY_VALUE:
                copy_heads(value_grad + dense, value_out + row * value_row + head * value_group, inside, HN, BLOCK_HN)
        if GRAD_OMEGA:
            omega_sum = distance * turns
            if SIGMA_GROUPS > 0:
                omega_sum -= (rate * spread * spread) * shrinks
            target = omega_partial + (tl.program_id(0) * GROUPS + group) * R + pair
            tl.store(target, tl.sum(omega_sum, axis=0)[None, :], mask=pair < R)
        if GRAD_SIGMA:
            of_lane = -spread * tl.sum(rate * rate * shrinks, axis=1)[:, None]
            of_row = tl.sum(tl.reshape(of_lane, (ROWS, HEADS)), axis=1)
            if SIGMA_GROUPS > 1:
                tl.store(sigma_grad + own_row * NG + group, of_row, mask=own_row < rows)
            else:
                sigma_sum += of_row
        if GRAD_OFFSET:
            offset_sum += tl.sum(tl.reshape(tl.sum(rate * turns, axis=1), (ROWS, HEADS)), axis=1)
    if GRAD_SIGMA and SIGMA_GROUPS == 1:
        tl.store(sigma_grad + own_row, sigma_sum, mask=own_row < rows)
    if GRAD_OFFSET:
        tl.store(offset_grad + own_row, offset_sum, mask=own_row < rows)
    if NORM:
        weight_target = weight_partial + tl.program_id(0) * 2 * HN
        _store_weight(weight_target, query_first, query_second, query_rest, pair, rest, HN, R, INTERLEAVED)
        _store_weight(weight_target + HN, key_first, key_second, key_rest, pair, rest, HN, R, INTERLEAVED)


@triton.jit
def sum_partials(
    partials, total, programs, STEPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write sums over programs of partial sums [programs, WIDTH], always in the same order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    line = tl.arange(0, BLOCK)[:, None]
    inside = column < WIDTH
    sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for step in range(STEPS):
        at = step * BLOCK + line
        sums += tl.load(partials + at.to(tl.int64) * WIDTH + column, mask=inside & (at < programs), other=0.0)
    tl.store(total + column, tl.sum(sums, axis=0)[None, :], mask=inside)
