"""The order of rows over a context-parallel group, for what needs all rows of a sequence."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megacontext_megatron.spans.context_parallel import gathered_order, zigzag_rows


class ZigzagOrder:
    """Gathers rows [s / cp, b, ...] of a group whose ranks hold them as spans.context_parallel slices them."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return all rows [s, b, ...] in the order of time; gradients are summed over the group."""
        size = self._group.size()
        if size == 1:
            return rows
        order = gathered_order(rows.shape[0] * size, size, rows.device)
        return gather_from_sequence_parallel_region(rows.contiguous(), group=self._group)[order]

    def own_rows(self, rows: Tensor) -> Tensor:
        """Return the rows [s / cp, b, ...] that this rank holds of all rows [s, b, ...] in the order of time."""
        size = self._group.size()
        if size == 1:
            return rows
        return rows[zigzag_rows(rows.shape[0], size, self._group.rank(), rows.device)]
