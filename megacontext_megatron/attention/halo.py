"""Rows before a context-parallel rank's chunks, fetched from the ranks that hold them while others are computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Arriving(NamedTuple):
    """Rows [2, depth, ...] on their way, a run for each chunk; `requests` and `sent` must live until they are here."""

    rows: Tensor
    requests: list[Any]
    sent: list[Tensor]

    def wait(self) -> Tensor:
        """Return the rows once they are here."""
        for request in self.requests:
            request.wait()
        return self.rows


def fetch_before(first_tail: Tensor, second_tail: Tensor, group: dist.ProcessGroup) -> Arriving:
    """Send the last rows of both zigzag chunks to where the next chunks are, and ask for those before this rank's.

    Nothing lies before the first chunk of the first rank, which gets zeros.  What is sent does not depend on how long a
    sequence is.
    """
    size, rank = group.size(), group.rank()
    received = first_tail.new_zeros(2, *first_tail.shape)
    if rank == size - 1:
        received[1] = first_tail
    peers = []
    if rank > 0:
        peers.append((rank - 1, second_tail, received[0]))
    if rank < size - 1:
        peers.append((rank + 1, first_tail, received[1]))
    return _swap(received, peers, group)


def return_before(before_first: Tensor, before_second: Tensor, group: dist.ProcessGroup) -> Arriving:
    """Send gradients of what preceded this rank's chunks back to its owners, and ask for those of its own last rows."""
    size, rank = group.size(), group.rank()
    received = before_first.new_zeros(2, *before_first.shape)
    if rank == size - 1:
        received[0] = before_second
    peers = []
    if rank > 0:
        peers.append((rank - 1, before_first, received[1]))
    if rank < size - 1:
        peers.append((rank + 1, before_second, received[0]))
    return _swap(received, peers, group)


def _swap(received: Tensor, peers: list[tuple[int, Tensor, Tensor]], group: dist.ProcessGroup) -> Arriving:
    """Start to send to and receive from each of `peers`, (rank in the group, what it gets, where its answer goes)."""
    operations, sent = [], []
    for peer, rows, answer in peers:
        other = dist.get_global_rank(group, peer)
        sent.append(rows.contiguous())
        operations.append(dist.P2POp(dist.isend, sent[-1], other, group))
        operations.append(dist.P2POp(dist.irecv, answer, other, group))
    return Arriving(received, dist.batch_isend_irecv(operations) if operations else [], sent)
