"""KL divergence of a teacher's predictions from a model's, each rank with a part of the vocabulary."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megacontext_megatron.context.gists import summing_dtype


def real_columns(padded: int, vocabulary: int, rank: int) -> int:
    """Return how many of the `padded` vocabulary entries that a tensor-parallel rank holds are no padding."""
    return min(max(vocabulary - rank * padded, 0), padded)


def divergence(student: Tensor, teacher: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return KL(teacher || student), fp32 [...], of logits [..., v] over the vocabulary.

    The v entries are this rank's part of the vocabulary where a tensor-parallel `group` is given, in which case every
    rank of it must call; a part may be empty.  Gradients reach the student alone, p_student - p_teacher times that of
    the result, which must be the same on all ranks of the group.  float64 logits are computed in float64.
    """
    return cast(Tensor, _Divergence.apply(student, teacher.detach(), group))


class _Divergence(torch.autograd.Function):
    """Keeps one tensor of the logits' size: the difference of the two distributions."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, group: ProcessGroup | None) -> Tensor:
        dtype = summing_dtype(student.dtype)
        logits = torch.stack([student.to(dtype), teacher.to(dtype)])
        highest = logits.amax(dim=-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
        _reduce(highest, dist.ReduceOp.MAX, group)
        logits -= highest.unsqueeze(-1)
        total = logits.exp().sum(dim=-1)
        _reduce(total, dist.ReduceOp.SUM, group)
        logits -= total.log().unsqueeze(-1)
        of_student, of_teacher = logits.exp()
        value = (of_teacher * (logits[1] - logits[0])).sum(dim=-1)
        _reduce(value, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(of_student - of_teacher)
        ctx.dtype = student.dtype
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (difference,) = ctx.saved_tensors
        return (difference * gradient.unsqueeze(-1)).to(ctx.dtype), None, None


def _reduce(value: Tensor, operation: Any, group: ProcessGroup | None) -> None:
    # A context-parallel rank without rows has nothing to say, and neither have its tensor-parallel ranks.
    if group is not None and group.size() > 1 and value.numel():
        dist.all_reduce(value, op=operation, group=group)
