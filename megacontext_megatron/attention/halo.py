"""Rows before a context-parallel rank's chunks, fetched from the ranks that hold them while others are computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Arriving(NamedTuple):
    """Rows on their way; `sent` must live until they are here."""

    requests: list[Any]
    sent: Tensor

    def wait(self) -> None:
        """Return once the rows are here, or, on a GPU, let what is enqueued next find them here."""
        for request in self.requests:
            request.wait()


def fetch_before(tails: Tensor, before: Tensor, group: dist.ProcessGroup) -> Arriving:
    """Send the last rows of both zigzag chunks, [2, depth, ...], to where the next chunks are.

    Those before this rank's chunks come to `before`, of the same shape; nothing lies before the first chunk of the
    first rank, which gets none.  A chunk's rows are contiguous; how many they are does not depend on how long a
    sequence is.
    """
    size, rank = group.size(), group.rank()
    if rank == size - 1:
        before[1] = tails[0]
    peers = []
    if rank > 0:
        peers.append((rank - 1, tails[1], before[0]))
    if rank < size - 1:
        peers.append((rank + 1, tails[0], before[1]))
    return Arriving(_swap(peers, group), tails)


def return_before(before: Tensor, tails: Tensor, group: dist.ProcessGroup) -> Arriving:
    """Send gradients of what preceded this rank's chunks, [2, depth, ...], back to its owners.

    Those of its own last rows come to `tails`, of the same shape; nothing follows the second chunk of the first rank,
    which gets none.
    """
    size, rank = group.size(), group.rank()
    if rank == size - 1:
        tails[0] = before[1]
    peers = []
    if rank > 0:
        peers.append((rank - 1, before[0], tails[1]))
    if rank < size - 1:
        peers.append((rank + 1, before[1], tails[0]))
    return Arriving(_swap(peers, group), before)


def _swap(peers: list[tuple[int, Tensor, Tensor]], group: dist.ProcessGroup) -> list[Any]:
    """Start to send to and receive from each of `peers`, (rank in the group, what it gets, where its answer goes)."""
    operations = []
    for peer, rows, answer in peers:
        other = dist.get_global_rank(group, peer)
        operations.append(dist.P2POp(dist.isend, rows, other, group))
        operations.append(dist.P2POp(dist.irecv, answer, other, group))
    return dist.batch_isend_irecv(operations) if operations else []
