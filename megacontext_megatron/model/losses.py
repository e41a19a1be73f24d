"""Losses of rows: the next-token loss Megatron trains on, and the sums telemetry and evaluation are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext_megatron.config import NLL_LAST, ContextConfig
from megacontext_megatron.spans.metadata import SpanMetadata

Report = dict[str, Tensor]
"""Name to [sum, count], fp32 [2]: what Megatron adds up over micro-batches and ranks before it divides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What each row [b, s] must predict: the token at its end, int64 `labels`, where fp32 `mask` is 1."""

    labels: Tensor
    mask: Tensor


def row_targets(text: Tensor, token_mask: Tensor, spans: SpanMetadata, after_tokens: tuple[int, ...] = ()) -> Targets:
    """Return the targets of rows [b, s] over raw samples: `text` int64 [b / V, C + 1], `token_mask` [b / V, C].

    A row counts where the last token it covers counts in Megatron's own loss mask, and is one of `after_tokens` if
    there are any.
    """
    contexts = spans.start.shape[0]
    sample = torch.arange(contexts, device=text.device) // (contexts // text.shape[0])
    end = spans.end.long()
    mask = token_mask[sample].gather(1, end - 1).float()
    if after_tokens:
        last = text[sample].gather(1, end - 1)
        mask = mask * torch.stack([last == token for token in after_tokens]).any(dim=0)
    return Targets(labels=text[sample].gather(1, end), mask=mask)


def row_sums(losses: Tensor, targets: Targets, spans: SpanMetadata, context: ContextConfig) -> dict[str, Tensor]:
    """Return detached sums over this rank's rows, each fp32 [k, 2] of (sum, count).

    `level`: loss by level, k = max_level + 1.  `variant`: loss of the last H rows by variant, k = V.  `width`: span
    width in tokens of the rows beyond the recency baseline, k = 1.  `rows`: 1 for each such row by level.
    """
    losses = losses.detach().float()
    mask = targets.mask
    levels = torch.arange(context.max_level + 1, device=losses.device).view(-1, 1, 1)
    at_level = (spans.level.unsqueeze(0) == levels).float()
    last = mask * (spans.end > context.source_length - context.horizon).float()
    variant = torch.arange(losses.shape[0], device=losses.device) % context.variants
    of_variant = (variant == torch.arange(context.variants, device=losses.device).unsqueeze(1)).float().unsqueeze(2)
    mixed = (variant > 0).float() if context.variants > 1 else torch.ones_like(variant, dtype=torch.float32)
    mixed = mixed.unsqueeze(1).expand_as(losses)
    return {
        "level": _pairs(losses * mask, at_level, at_level * mask),
        "variant": _pairs(losses * last, of_variant, of_variant * last),
        "width": _pairs(spans.width.float() * mixed, torch.ones_like(at_level[:1]), mixed.unsqueeze(0)),
        "rows": _pairs(mixed, at_level, mixed.unsqueeze(0).expand_as(at_level)),
    }


def shortened_sums(shortened: Tensor, context: ContextConfig) -> dict[str, Tensor]:
    """Return `shortened`, fp32 [1, 2]: history tokens left out, int64 [b, 1], and the mixed contexts they are of."""
    mixed = shortened.view(-1, context.variants)[:, 1 if context.variants > 1 else 0 :].float()
    return {"shortened": torch.stack([mixed, torch.ones_like(mixed)]).sum(dim=(1, 2)).unsqueeze(0)}


def _pairs(value: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Return [sum of value * weights, sum of counts] over rows for each of k weightings [k, b, s]: [k, 2]."""
    return torch.stack([(value * weights).sum(dim=(1, 2)), counts.expand_as(weights * value).sum(dim=(1, 2))], dim=1)


def evaluation_report(sums: dict[str, Tensor], context: ContextConfig) -> Report:
    """Return what validation prints and logs beside the loss: NLL of the last H rows, by variant."""
    names = variant_names(context)
    return {NLL_LAST.format(H=context.horizon, variant=name): sums["variant"][k] for k, name in enumerate(names)}


def variant_names(context: ContextConfig) -> list[str]:
    """Return a name for each variant: recency first where there are several, then the planner's."""
    if context.variants == 1:
        return [context.plan]
    if context.variants == 2:
        return ["recency", context.plan]
    return ["recency", *(f"{context.plan}{k}" for k in range(1, context.variants))]
