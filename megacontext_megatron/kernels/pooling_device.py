"""The kernels of slot pooling: attention of one query over a block's rows, forward and backward.

One program owns a head of a block, whose keys and values it holds in registers: each is read once, all at once.
"""

# Names in capitals are compile-time constants, as in all Triton code.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _heads(mixed, block, head, inside, K: tl.constexpr, HEADS: tl.constexpr, HN: tl.constexpr,
           BLOCK_K: tl.constexpr, BLOCK_HN: tl.constexpr):  # fmt: skip
    """Return keys and values [BLOCK_K, BLOCK_HN] of one head of a block, where keys lie, and what is no padding."""
    row = tl.arange(0, BLOCK_K)[:, None]
    channel = tl.arange(0, BLOCK_HN)[None, :]
    inside = inside & (row < K) & (channel < HN)
    at = block.to(tl.int64) * (2 * K * HEADS * HN) + row * (2 * HEADS * HN) + head * HN + channel
    key = tl.load(mixed + at, mask=inside, other=0.0)
    value = tl.load(mixed + at + HEADS * HN, mask=inside, other=0.0)
    return key, value, at, inside


@triton.jit
def _shares(key, query, rate, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the softmax, fp32 [BLOCK_K], of scores q k; `rate` is their scale in units of ln 2."""
    scores = tl.sum(key * query, axis=1)
    if K < BLOCK_K:
        scores = tl.where(tl.arange(0, BLOCK_K) < K, scores, -float("inf"))
    weights = tl.exp2((scores - tl.max(scores, axis=0)) * rate)
    return weights / tl.sum(weights, axis=0)


@triton.jit
def pool_forward(
    query, mixed, out, rate,
    K: tl.constexpr, HEADS: tl.constexpr, HN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HN: tl.constexpr,
):  # fmt: skip
    """Write pooled values [n, HEADS HN] of blocks [n, K, 2 HEADS HN] for queries [HEADS HN]."""
    block = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    channel = tl.arange(0, BLOCK_HN)
    key, value, _, _ = _heads(mixed, block, head, True, K, HEADS, HN, BLOCK_K, BLOCK_HN)
    q = tl.load(query + head * HN + channel, mask=channel < HN, other=0.0).to(tl.float32)
    share = _shares(key.to(tl.float32), q[None, :], rate, K, BLOCK_K)
    pooled = tl.sum(share[:, None] * value.to(tl.float32), axis=0)
    at = block.to(tl.int64) * (HEADS * HN) + head * HN + channel
    tl.store(out + at, pooled.to(out.dtype.element_ty), mask=channel < HN)


@triton.jit
def pool_backward(
    query, mixed, out_grad, mixed_grad, query_partial, blocks, rate, scale,
    K: tl.constexpr, HEADS: tl.constexpr, HN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HN: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `mixed`, and that of queries summed over each program's STEPS blocks, fp32 [..., HEADS HN].

    With shares p and dp = dy v: dv = p dy, ds = p (dp - sum p dp), dk = scale ds q, dq = scale sum ds k.
    """
    group = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    channel = tl.arange(0, BLOCK_HN)
    q = tl.load(query + head * HN + channel, mask=channel < HN, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_HN], tl.float32)
    for step in tl.range(0, STEPS):
        block = group * STEPS + step
        key, value, at, inside = _heads(mixed, block, head, block < blocks, K, HEADS, HN, BLOCK_K, BLOCK_HN)
        of_block = block.to(tl.int64) * (HEADS * HN) + head * HN + channel
        grad = tl.load(out_grad + of_block, mask=(channel < HN) & (block < blocks), other=0.0).to(tl.float32)
        key = key.to(tl.float32)
        share = _shares(key, q[None, :], rate, K, BLOCK_K)
        of_share = tl.sum(value.to(tl.float32) * grad[None, :], axis=1)
        of_score = share * (of_share - tl.sum(share * of_share, axis=0)) * scale
        total += tl.sum(of_score[:, None] * key, axis=0)
        of_key, of_value = of_score[:, None] * q[None, :], share[:, None] * grad[None, :]
        tl.store(mixed_grad + at, of_key.to(mixed_grad.dtype.element_ty), mask=inside)
        tl.store(mixed_grad + at + HEADS * HN, of_value.to(mixed_grad.dtype.element_ty), mask=inside)
    tl.store(query_partial + group * (HEADS * HN) + head * HN + channel, total, mask=channel < HN)
