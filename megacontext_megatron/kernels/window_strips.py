"""Windows of 128 rows on Hopper: kernels that march along strips of rows, launched where heads lie."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megacontext_megatron.kernels.window_layout import WindowLayout
from megacontext_megatron.kernels.window_strip_backward import strip_query_kernel
from megacontext_megatron.kernels.window_strip_device import BLOCK, HN, PACK, RING, TILE_ROWS
from megacontext_megatron.kernels.window_strip_forward import strip_forward_kernel

__all__ = ["TurnedBack", "aligned", "strip_forward", "strip_query_gradient", "turns_back", "why_no_strips"]

_LOOK_BACK = 127
_BLOCK, _HN, _PACK, _TILE_ROWS = BLOCK.value, HN.value, PACK.value, TILE_ROWS.value
_WARPS = 4
_ALIGNED = 16
"""Bytes that the unit that copies takes rows and heads to begin at multiples of."""
_SHARED = (2 * RING.value + 6) * _BLOCK * _HN * 2 + 1024


class TurnedBack(NamedTuple):
    """The rotation that gradients of queries are turned back by: cosines and sines fp32 [2, sk b, groups, r]."""

    table: Tensor
    interleaved: bool


def aligned(x: Tensor) -> Tensor:
    """Return x contiguous, at a place in memory that the unit that copies can begin at."""
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNED == 0 else x.clone()


def why_no_strips(layout: WindowLayout, look_back: int, tensors: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """Return why queries, keys and values cannot be served in strips, in a sentence, or None."""
    query = tensors[0]
    if not layout.sq * layout.b:
        return "there are no queries"
    if query.dtype not in (torch.bfloat16, torch.float16) or layout.hn != _HN or layout.per_group != _PACK:
        return f"strips serve {_PACK} heads of {_HN} channels to a query group, bfloat16 or float16"
    if look_back != _LOOK_BACK:
        return f"strips serve windows of {_LOOK_BACK + 1} rows"
    if 0 < layout.sk - layout.sq < _LOOK_BACK:
        return "strips serve queries that have all or none of their window's keys before the first of them"
    unit = _ALIGNED // query.element_size()
    head = layout.query[3]
    if min(head, layout.query[0], layout.key[0], layout.value[0]) < _HN:
        return "rows or heads lie on top of one another"
    if any(stride % head for stride in layout.query[1:3]):
        return "query heads do not lie a multiple of their distance apart"
    if any(stride % unit for part in (layout.query, layout.key, layout.value) for stride in part):
        return f"rows or heads do not begin at multiples of {_ALIGNED} bytes"
    if any(x.data_ptr() % _ALIGNED for x in tensors):
        return f"tensors do not begin at multiples of {_ALIGNED} bytes"
    far = max(*layout.key[1:], *layout.value[1:], layout.sk)
    if max(_width(layout, layout.key), _width(layout, layout.value), _heads(layout), far) >= 2**31:
        return "heads take more places than 32 bits count"
    return _why_not_here(query.device)


def turns_back(pairs: int, *, interleaved: bool) -> bool:
    """Return whether strips can turn gradients back: both channels of a pair must lie in one thread.

    Of the products' layout a thread has neighbours, and channels a multiple of 8 apart.
    """
    return interleaved or pairs == 1 or pairs % 8 == 0


@cache
def _why_not_here(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "strips run on a GPU"
    properties = torch.cuda.get_device_properties(device)
    if properties.major != 9 or torch.version.hip is not None:
        return "strips are written for Hopper (compute capability 9)"
    if properties.shared_memory_per_block_optin < _SHARED:
        return f"strips take {_SHARED} bytes of shared memory"
    return None


def _width(layout: WindowLayout, strides: tuple[int, int, int]) -> int:
    """Return how many channels keys or values of a row span, all sequences and groups."""
    return (layout.b - 1) * strides[1] + (layout.ng - 1) * strides[2] + layout.hn


def _heads(layout: WindowLayout) -> int:
    """Return how many query heads, as far apart as those of a group, a row spans."""
    _, sequence, group, head = layout.query
    return (layout.b - 1) * sequence // head + (layout.ng - 1) * group // head + layout.per_group


@cache
def _shared_layout(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _described_queries(x: Tensor, layout: WindowLayout) -> tuple[TensorDescriptor, int, int]:
    """Return a descriptor of rows and heads, and how many heads apart sequences and groups lie."""
    row, sequence, group, head = layout.query
    shape, block = [layout.sq, _heads(layout), layout.hn], [_TILE_ROWS, _PACK, _HN]
    described = TensorDescriptor(x, shape, [row, head, 1], block, _shared_layout(3))
    return described, sequence // head, group // head


def _described_keys(x: Tensor, layout: WindowLayout, strides: tuple[int, int, int]) -> TensorDescriptor:
    """Return a descriptor of rows and channels."""
    width = _width(layout, strides)
    return TensorDescriptor(x, [layout.sk, width], [strides[0], 1], [_BLOCK, _HN], _shared_layout(2))


def blocks_of_strip(blocks: int, parts: int, programs: int) -> int:
    """Return how many blocks a program marches, of so many in each part: the fewest that run all programs at once."""
    strip = min(blocks, -(-blocks * parts // programs))
    while strip < blocks and -(-blocks // strip) * parts > programs:
        strip += 1
    return strip


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _places(layout: WindowLayout, device: torch.device) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid and the numbers that place rows, which both kernels take."""
    blocks, parts = -(-layout.sq // _BLOCK), layout.b * layout.ng
    strip = blocks_of_strip(blocks, parts, _processors(device))
    before = layout.sk - layout.sq
    numbers = {
        "sq": layout.sq, "before": before, "strip": strip, "seen": 2 if before else 0,
        "key_b": layout.key[1], "key_g": layout.key[2], "value_b": layout.value[1], "value_g": layout.value[2],
        "NG": layout.ng,
    }  # fmt: skip
    return (parts, -(-blocks // strip)), numbers


def strip_forward(
    layout: WindowLayout, tensors: tuple[Tensor, Tensor, Tensor], scale: float, out: Tensor, normaliser: Tensor
) -> None:
    """Write attention [sq, b, np, hn] and log2 of each lane's sum of weights, fp32 [b, ng, sq, np / ng].

    The heads of a row of `out` are dense; `tensors` begin where queries, keys and values do; `scale` includes log2 e.
    """
    query, key, value = tensors
    grid, numbers = _places(layout, query.device)
    described, query_b, query_g = _described_queries(query, layout)
    finished, out_b, _ = _described_queries(out, layout.of_output(out))
    strip_forward_kernel[grid](
        query=described, key=_described_keys(key, layout, layout.key),
        value=_described_keys(value, layout, layout.value),
        out=finished, normaliser=normaliser, scale=scale,
        query_b=query_b, query_g=query_g, out_b=out_b, **numbers, num_warps=_WARPS,
    )  # fmt: skip


def strip_query_gradient(
    layout: WindowLayout,
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    given: tuple[Tensor, Tensor],
    *,
    into: tuple[WindowLayout, Tensor, Tensor],
    turned: TurnedBack | None = None,
) -> None:
    """Write the gradient of queries where `into` says, turned back, and delta, shaped as normalisers.

    `given` are the incoming gradient, of dense heads, and normalisers; `scale` is that of scores in nats.
    """
    query, key, value = tensors
    out_grad, normaliser = given
    to, query_grad, delta = into
    grid, numbers = _places(layout, query.device)
    described, query_b, query_g = _described_queries(query, layout)
    incoming, out_b, _ = _described_queries(out_grad, layout.of_output(out_grad))
    gradient, query_grad_b, query_grad_g = _described_queries(query_grad, to)
    table = None if turned is None else turned.table
    strip_query_kernel[grid](
        query=described, key=_described_keys(key, layout, layout.key),
        value=_described_keys(value, layout, layout.value),
        out_grad=incoming, query_grad=gradient,
        normaliser=normaliser, delta=delta, table=table, scale=scale, batch=layout.b,
        planes=0 if table is None else table.stride(0),
        query_b=query_b, query_g=query_g, out_b=out_b, query_grad_b=query_grad_b, query_grad_g=query_grad_g, **numbers,
        ROTATE=turned is not None, TABLE_GROUPS=1 if table is None else table.shape[2],
        R=1 if table is None else table.shape[3],
        INTERLEAVED=turned is not None and turned.interleaved, num_warps=_WARPS,
    )  # fmt: skip
