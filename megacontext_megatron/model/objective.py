"""The objective: next-token loss of all rows, and the terms beside it, each a mean that joins with its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext_megatron.config import ContextConfig, ObjectiveConfig, Settings
from megacontext_megatron.model.losses import Targets
from megacontext_megatron.model.requests import RowOutputs, RowRequest
from megacontext_megatron.spans.metadata import SpanMetadata

SumOverContext = Callable[[Tensor], Tensor]
"""Adds a tensor up over context-parallel ranks; its gradient is added up over them too."""

Terms = dict[str, Tensor]
"""Means by name of a term, fp32 scalars that carry gradients; the same on all context-parallel ranks."""


def weighted_mask(targets: Targets, spans: SpanMetadata, objective: ObjectiveConfig) -> Tensor:
    """Return the weight of each row's next-token loss, fp32 [b, s]: its mask, and that of gist rows."""
    if objective.gist_rows == 1.0:
        return targets.mask
    return torch.where(spans.level > 0, objective.gist_rows * targets.mask, targets.mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class LastRows:
    """Sums of losses and masks of the last H rows of each context, fp32 [b / V, V], over context-parallel ranks."""

    total: Tensor
    count: Tensor

    @classmethod
    def of(
        cls, losses: Tensor, targets: Targets, spans: SpanMetadata, context: ContextConfig, over_context: SumOverContext
    ) -> LastRows:
        """Return the sums of losses [b, s] of this rank's rows and all others'."""
        last = targets.mask * (spans.end > context.source_length - context.horizon)
        sums = over_context(torch.stack([(losses * last).sum(dim=1), last.sum(dim=1)]))
        total, count = sums.view(2, -1, context.variants)
        return cls(total=total, count=count)

    @property
    def mean(self) -> Tensor:
        """Mean losses, fp32 [b / V, V]; 0 for a context none of whose last rows counts."""
        return self.total / self.count.clamp_min(1.0)


def advantage(last: LastRows) -> Tensor:
    """Return the mean over mixed contexts of relu(loss - loss of the recency variant, held fixed), a scalar."""
    mean = last.mean
    return (mean[:, 1:] - mean[:, :1].detach()).relu().mean()


def counted(value: Tensor) -> Tensor:
    """Return a term's value as the sum and count that telemetry adds up, fp32 [1, 2]."""
    value = value.detach().float()
    return torch.stack([value, torch.ones_like(value)]).unsqueeze(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingObjective:
    """What a training step asks of the model, and the terms it makes of the answer.

    `over_context` is model.parallel_groups.sum_over_context.
    """

    settings: Settings
    over_context: SumOverContext

    def request(self) -> RowRequest:
        """Return what the next micro-batch's forward is asked for."""
        return RowRequest()

    def terms(self, outputs: RowOutputs, targets: Targets, spans: SpanMetadata) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of every term of a micro-batch on the last stage, by name."""
        objective, context = self.settings.objective, self.settings.context
        terms: dict[str, tuple[float, Tensor]] = {}
        if objective.advantage:
            last = LastRows.of(outputs.losses.float(), targets, spans, context, self.over_context)
            terms["advantage"] = objective.advantage, advantage(last)
        return terms
