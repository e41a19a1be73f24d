"""Sharing out blocks over the ranks that would all make the same gists: tensor parallel and context parallel ones."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockGroups:
    """The groups over which blocks are shared out; None for a group of one.

    Every rank is given all blocks and gets the results of all.  Over `tensor` ranks the gradient of a result is the
    same and whole on each rank, that of a block becomes so, and that of a parameter is of the rank's own blocks.  Over
    `context` ranks all gradients are of a rank's own rows or blocks, to be added up where Megatron adds them.
    """

    tensor: ProcessGroup | None = None
    context: ProcessGroup | None = None

    @classmethod
    def of(cls, tensor: ProcessGroup, context: ProcessGroup) -> BlockGroups:
        """Return the groups, leaving out those of one rank."""
        return cls(tensor=tensor if tensor.size() > 1 else None, context=context if context.size() > 1 else None)

    @property
    def size(self) -> int:
        """The number of ranks that share out the blocks."""
        return _size(self.tensor) * _size(self.context)

    def own(self, blocks: Tensor) -> Tensor:
        """Return this rank's share of blocks [n, ...]: [n / size, ...] rounded up, filled up with zeros."""
        if self.size == 1:
            return blocks
        missing = -blocks.shape[0] % self.size
        blocks = functional.pad(blocks, (0, 0) * (blocks.dim() - 1) + (0, missing))
        if self.context is not None:
            blocks = blocks.chunk(self.context.size())[self.context.rank()]
        if self.tensor is not None:
            blocks = scatter_to_sequence_parallel_region(blocks, group=self.tensor)
        return blocks

    def all(self, results: Tensor, count: int) -> Tensor:
        """Return the results [count, ...] of all blocks from those of this rank's share."""
        if self.size == 1:
            return results
        results = results.contiguous()
        if self.tensor is not None:
            results = gather_from_sequence_parallel_region(
                results, tensor_parallel_output_grad=False, group=self.tensor
            )
        if self.context is not None:
            results = gather_from_sequence_parallel_region(results, group=self.context)
        return results[:count]


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()
