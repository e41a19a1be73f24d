"""The objective: next-token loss of all rows, and the terms beside it, each a mean that joins with its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megacontext_megatron.config import ContextConfig, ObjectiveConfig, Settings
from megacontext_megatron.model.divergence import divergence
from megacontext_megatron.model.gist_terms import GistObserver, GistTerms, detached_gists
from megacontext_megatron.model.losses import Targets
from megacontext_megatron.model.parallel_groups import tensor_parallel_group
from megacontext_megatron.model.prediction import prediction_terms
from megacontext_megatron.model.requests import Lesson, RowOutputs, RowRequest
from megacontext_megatron.spans.metadata import SpanMetadata

SumOverContext = Callable[[Tensor], Tensor]
"""Adds a tensor up over context-parallel ranks; its gradient is added up over them too."""

Terms = dict[str, Tensor]
"""Means by name of a term, fp32 scalars that carry gradients; the same on all context-parallel ranks."""


SPAN_HEAD = "gist_net.encoder.spans.weight"
"""The parameter that moves gists' spans, which only rows that see gists can train."""


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


def imitation(
    student: Tensor,
    lesson: Lesson,
    mask: Tensor,
    variants: int,
    over_context: SumOverContext,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Return the mean KL(teacher || student) over counted last rows of mixed contexts (of all with one variant).

    `student` [n, b, padded vocabulary / TP] are this rank's logits of the rows that the lesson is about, in its order;
    entries that pad the vocabulary are left out.  `mask` [b, s] is that of all this rank's rows, `group` the
    tensor-parallel ranks that share out the vocabulary.
    """
    assert lesson.logits is not None
    assert lesson.rows is not None
    first = 1 if variants > 1 else 0
    mixed = student[..., : lesson.logits.shape[-1]].unflatten(1, (-1, variants))[:, :, first:]
    weight = mask.index_select(1, lesson.rows).t().unflatten(1, (-1, variants))[:, :, first:]
    values = divergence(mixed, lesson.logits.unsqueeze(2).expand_as(mixed), group)
    total, count = over_context(torch.stack([(values * weight).sum(), weight.sum()]))
    return total / count.clamp_min(1.0)


def counted(value: Tensor) -> Tensor:
    """Return a term's value as the sum and count that telemetry adds up, fp32 [1, 2]."""
    value = value.detach().float()
    return torch.stack([value, torch.ones_like(value)]).unsqueeze(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingObjective:
    """What a training step asks of the model, and the terms it makes of the answer.

    `over_context` is model.parallel_groups.sum_over_context.  `consumed` returns the contexts consumed before the step.
    """

    settings: Settings
    over_context: SumOverContext
    consumed: Callable[[], int] = lambda: 0

    @property
    def pools_only(self) -> bool:
        """Whether gists now learn from the pooling regression alone."""
        return self.settings.objective.pools_only(self.consumed())

    @property
    def idle_parameters(self) -> tuple[str, ...]:
        """Ends of the names of parameters that the present phase leaves without a gradient, on purpose."""
        return (SPAN_HEAD,) if self.pools_only and self.settings.gist.span_head else ()

    def request(
        self, lesson: Lesson, gist_scale: Tensor | None = None, observe: GistObserver | None = None
    ) -> RowRequest:
        """Return what the next micro-batch's forward is asked for.

        `gist_scale` and `observe` are those of model.gist_terms.GistTerms, for the first stage.
        """
        learned = self.settings.gist.learned
        gist_loss = None
        if learned and gist_scale is not None and (observe is not None or any(self.gist_weights.values())):
            gist_loss = GistTerms(
                context=self.settings.context,
                weights=self.gist_weights,
                scale=gist_scale,
                states=lesson.states,
                observe=observe,
            )
        return RowRequest(
            control=detached_gists if learned and self.pools_only else None,
            gist_loss=gist_loss,
            last_rows=lesson.rows,
            predict=self.settings.prediction.active,
        )

    @property
    def gist_weights(self) -> dict[str, float]:
        """The present weights of the terms that are made of gists alone; contrast waits while gists only pool."""
        objective = self.settings.objective
        return {"contrast": 0.0 if self.pools_only else objective.contrast, "pooling": objective.pooling}

    def terms(
        self, outputs: RowOutputs, targets: Targets, spans: SpanMetadata, lesson: Lesson
    ) -> dict[str, tuple[float, Tensor]]:
        """Return weight and value of every term of a micro-batch on the last stage, by name."""
        objective, context = self.settings.objective, self.settings.context
        terms: dict[str, tuple[float, Tensor]] = {}
        if objective.advantage:
            last = LastRows.of(outputs.losses.float(), targets, spans, context, self.over_context)
            terms["advantage"] = objective.advantage, advantage(last)
        if outputs.last_logits is not None and lesson.logits is not None:
            student, group = outputs.last_logits, tensor_parallel_group()
            value = imitation(student, lesson, targets.mask, context.variants, self.over_context, group=group)
            terms["kl"] = objective.kl, value
        if outputs.predicted is not None:
            terms |= prediction_terms(outputs.predicted, self.settings.prediction, self.over_context)
        return terms
