"""Rows before a context-parallel rank's chunks, fetched from the ranks that hold them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Chunk(NamedTuple):
    """One zigzag chunk of a rank's keys and values [rows, b, ng, hn], behind the rows before it."""

    key: Tensor
    value: Tensor


def chunks_with_halo(key: Tensor, value: Tensor, depth: int, group: dist.ProcessGroup) -> tuple[Chunk, Chunk]:
    """Return both zigzag chunks of this rank's keys and values [s / cp, b, ng, hn], each behind `depth` rows more.

    The first chunk of the first rank has no rows before it and comes alone.  Each rank sends its chunks' last rows and
    receives as many, whatever the length of a sequence; gradients go back the same way.  Raises ValueError where a
    chunk is shorter than `depth`.
    """
    chunk = len(key) // 2
    if depth > chunk:
        raise ValueError(f"{depth} rows before a chunk of {chunk} lie on more than one rank")
    if depth == 0:
        return Chunk(key[:chunk], value[:chunk]), Chunk(key[chunk:], value[chunk:])
    key_before, value_before = cast(Tensor, _Halo.apply(depth, group, key, value)).unbind(1)
    first = Chunk(key[:chunk], value[:chunk])
    if group.rank() > 0:
        first = Chunk(
            *(torch.cat(parts) for parts in ((key_before[:depth], first.key), (value_before[:depth], first.value)))
        )
    second = (key_before[depth:], key[chunk:]), (value_before[depth:], value[chunk:])
    return first, Chunk(*(torch.cat(parts) for parts in second))


class _Halo(torch.autograd.Function):
    """Keys and values of the `depth` rows before each chunk of a rank, [2 depth, 2, b, ng, hn]."""

    @staticmethod
    def forward(ctx: Any, depth: int, group: dist.ProcessGroup, key: Tensor, value: Tensor) -> Tensor:
        ctx.depth, ctx.group, ctx.shape = depth, group, key.shape
        ends = len(key) // 2, len(key)
        first, second = (torch.stack([rows[end - depth : end] for rows in (key, value)], dim=1) for end in ends)
        return _exchanged(first, second, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor]:
        depth: int = ctx.depth
        length = ctx.shape[0]
        before_first, before_second = gradients[0].split(depth)
        tails = _returned(before_first, before_second, ctx.group).split(depth)
        both = []
        for part in range(2):
            gradient = gradients[0].new_zeros(ctx.shape)
            for end, tail in zip((length // 2, length), tails, strict=True):
                gradient[end - depth : end] = tail[:, part]
            both.append(gradient)
        return None, None, both[0], both[1]


def _exchanged(first_tail: Tensor, second_tail: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send the tails of both chunks to the ranks whose chunks follow them, and return what precedes this rank's."""
    size, rank = group.size(), group.rank()
    received = first_tail.new_zeros(2, *first_tail.shape)
    if rank == size - 1:
        received[1] = first_tail
    peers = []
    if rank > 0:
        peers.append((rank - 1, second_tail, received[0]))
    if rank < size - 1:
        peers.append((rank + 1, first_tail, received[1]))
    _swap(peers, group)
    return received.flatten(0, 1)


def _returned(before_first: Tensor, before_second: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send gradients of what preceded this rank's chunks back to its owners, and return those of its own tails."""
    size, rank = group.size(), group.rank()
    received = before_first.new_zeros(2, *before_first.shape)
    if rank == size - 1:
        received[0] = before_second
    peers = []
    if rank > 0:
        peers.append((rank - 1, before_first, received[1]))
    if rank < size - 1:
        peers.append((rank + 1, before_second, received[0]))
    _swap(peers, group)
    return received.flatten(0, 1)


def _swap(peers: list[tuple[int, Tensor, Tensor]], group: dist.ProcessGroup) -> None:
    """Send to and receive from each of `peers`, (rank in the group, what it gets, where its answer goes)."""
    operations = []
    for peer, sent, received in peers:
        other = dist.get_global_rank(group, peer)
        operations.append(dist.P2POp(dist.isend, sent.contiguous(), other, group))
        operations.append(dist.P2POp(dist.irecv, received, other, group))
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
