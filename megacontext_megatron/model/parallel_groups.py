"""The process groups of this rank, with the type Megatron's accessors leave open, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import Tensor
from torch.distributed import ProcessGroup


def tensor_parallel_group() -> ProcessGroup:
    """Return the group over which heads are split."""
    return cast(ProcessGroup, mpu.get_tensor_model_parallel_group())


def pipeline_group() -> ProcessGroup:
    """Return the group of this rank's pipeline stages."""
    return cast(ProcessGroup, mpu.get_pipeline_model_parallel_group())


def row_group() -> ProcessGroup:
    """Return the group over which rows are split: data parallel and context parallel together."""
    return cast(ProcessGroup, mpu.get_data_parallel_group(with_context_parallel=True))


def context_parallel_group() -> ProcessGroup:
    """Return the group over which the rows of a context are split."""
    return cast(ProcessGroup, mpu.get_context_parallel_group())


def sum_over_context(value: Tensor) -> Tensor:
    """Return the sum of a tensor over context-parallel ranks; its gradient is summed over them too."""
    group = context_parallel_group()
    return value if group.size() == 1 else cast(Tensor, _Summed.apply(value, group))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        dist.all_reduce(value := value.clone(), group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        dist.all_reduce(gradient := gradient.clone(), group=ctx.group)
        return gradient, None


def sum_partial_gradients(model: Sequence[torch.nn.Module], attribute: str) -> None:
    """Add up, over tensor-parallel ranks, the final gradients of all parameters with `attribute`; one all-reduce."""
    group = tensor_parallel_group()
    parts = [
        cast(Tensor, cast(Any, parameter).main_grad)
        for chunk in model
        for parameter in chunk.parameters()
        if getattr(parameter, attribute, False) and parameter.requires_grad
    ]
    if group.size() == 1 or not parts:
        return
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    for part, whole in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(whole.view_as(part))
