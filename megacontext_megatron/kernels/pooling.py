"""Slot pooling on the GPU: one learned query's attention over the rows of each block, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacontext_megatron.kernels.pooling_device import pool_backward, pool_forward
from megacontext_megatron.kernels.rotary_backward import sum_partials

_OF_A_WARP = 2048
"""Elements of keys, and as many of values, that a warp holds in registers."""

_MOST_WARPS = 16

_BLOCKS_OF_A_PROGRAM = 4
"""Whose gradients of the query the backward pass adds up before it writes them."""

_LINES = 1024
_COLUMNS = 4
"""Of partial sums, handled at once by a program of eight warps."""


def slot_pooling(query: Tensor, mixed: Tensor, heads: int) -> Tensor:
    """Return softmax(q k / sqrt(hn)) v over the K rows of each block, by heads of hn channels: [n, heads hn].

    `query` is [1, heads hn] and shared by all blocks, `mixed` [n, K, 2 heads hn]: each row's keys, then its values; of
    one dtype, that of the result.  Computed in fp32; gradients of both are deterministic.  Raises ValueError for what
    does not fit.  The same in plain PyTorch: context.gistnet.attend.
    """
    width = query.shape[-1]
    if query.numel() != width or mixed.dim() != 3 or mixed.shape[2] != 2 * width or heads < 1 or width % heads:
        raise ValueError(f"a query {tuple(query.shape)} of {heads} heads for keys and values {tuple(mixed.shape)}")
    if query.dtype != mixed.dtype:
        raise ValueError(f"a query of {query.dtype} for keys and values of {mixed.dtype}")
    if not holds(mixed.shape[1], width // heads):
        raise ValueError(f"blocks of {mixed.shape[1]} rows of {width // heads} channels do not fit the kernel")
    return _SlotPooling.apply(query.contiguous(), mixed.contiguous(), heads)


def holds(rows: int, channels: int) -> bool:
    """Return whether a program can hold one head's keys and values of a block of `rows`."""
    return 0 < _tile(rows, channels) <= _OF_A_WARP * _MOST_WARPS


def _tile(rows: int, channels: int) -> int:
    """Return the elements of one head of a block's keys, padded."""
    sides: tuple[Any, Any] = triton.next_power_of_2(rows), triton.next_power_of_2(channels)
    return sides[0] * sides[1]


def _constants(mixed: Tensor, heads: int) -> dict[str, Any]:
    """Return the arguments that forward and backward share."""
    rows, hn = mixed.shape[1], mixed.shape[2] // (2 * heads)
    return {
        "rate": math.log2(math.e) / math.sqrt(hn),
        "K": rows, "HEADS": heads, "HN": hn,
        "BLOCK_K": triton.next_power_of_2(rows), "BLOCK_HN": triton.next_power_of_2(hn),
        "num_warps": max(1, _tile(rows, hn) // _OF_A_WARP),
    }  # fmt: skip


def _launch(kernel: Any, grid: int, **arguments: Any) -> None:
    kernel[(grid,)](**arguments)


class _SlotPooling(torch.autograd.Function):
    """Called with a query, keys and values of blocks, and the number of heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, mixed: Tensor, heads: int) -> Tensor:
        out = mixed.new_empty(len(mixed), query.shape[-1])
        _launch(pool_forward, len(mixed) * heads, query=query, mixed=mixed, out=out, **_constants(mixed, heads))
        ctx.save_for_backward(query, mixed)
        ctx.heads = heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        query, mixed = ctx.saved_tensors
        blocks, width, heads = len(mixed), query.shape[-1], ctx.heads
        groups = -(-blocks // _BLOCKS_OF_A_PROGRAM)
        mixed_grad = torch.empty_like(mixed)
        partials = mixed.new_empty(groups, width, dtype=torch.float32)
        _launch(
            pool_backward, groups * heads,
            query=query, mixed=mixed, out_grad=gradients[0].contiguous(), mixed_grad=mixed_grad,
            query_partial=partials, blocks=blocks, scale=1.0 / math.sqrt(width // heads), STEPS=_BLOCKS_OF_A_PROGRAM,
            **_constants(mixed, heads),
        )  # fmt: skip
        total = partials.new_empty(query.shape)
        _launch(
            sum_partials, -(-width // _COLUMNS),
            partials=partials, total=total, programs=groups,
            STEPS=-(-groups // _LINES), WIDTH=width, BLOCK=_LINES, COLUMNS=_COLUMNS, num_warps=8,
        )  # fmt: skip
        return total.to(query.dtype), mixed_grad, None
