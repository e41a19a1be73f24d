"""Learnable positional parameters: per layer, fp32, one-dimensional."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]
"""Megatron's copy_to_tensor_model_parallel_region: identity whose backward sums the gradient over TP ranks."""


class PositionalParameters(torch.nn.Module):
    """Keeps its own parameters in fp32 when the model around it is cast to half precision.

    They are replicated over tensor-parallel ranks but used on local heads: read them through `shared`, never
    directly, so that every replica gets the whole gradient.  One-dimensional parameters get no weight decay from
    Megatron.
    """

    def __init__(self, sum_over_ranks: SumOverRanks) -> None:
        super().__init__()
        self._sum_over_ranks = sum_over_ranks

    def new_parameter(self, size: int) -> torch.nn.Parameter:
        """Return `size` zeros as an fp32 parameter."""
        return torch.nn.Parameter(torch.zeros(size, dtype=torch.float32))

    def shared(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return the parameter's value for use on this rank's heads."""
        return self._sum_over_ranks(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionalParameters:
        before = {
            name: (p.detach().clone(), None if p.grad is None else p.grad.clone())
            for name, p in self.named_parameters(recurse=False)
        }
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype != torch.float32:
                value, gradient = before[name]
                parameter.data = value.to(parameter.device)
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        return self
