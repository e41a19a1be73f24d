"""What a forward without gradients changes in its contexts, and what it tells of their last H rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.context.assembly import shuffled_gists
from megacontext_megatron.data.batch import Batch
from megacontext_megatron.model.losses import Targets
from megacontext_megatron.model.parallel_groups import context_parallel_group, tensor_parallel_group
from megacontext_megatron.model.requests import RowOutputs, RowRequest
from megacontext_megatron.spans.context_parallel import zigzag_rows
from megacontext_megatron.spans.metadata import SpanMetadata

PERMUTATION_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One measurement: an intervention, and whether right predictions are counted.

    `shuffled` exchanges gists (see context.assembly.shuffled_gists), `permuted` puts the rows before the protected tail
    in another order, each with its own place, `sigma_factor` scales every spread.  `vocabulary` is the number of token
    ids, without the padding of the vocabulary; where it is given, predictions are counted.
    """

    shuffled: bool = False
    permuted: bool = False
    sigma_factor: float = 1.0
    vocabulary: int | None = None

    def reordered(self, batch: Batch, context: ContextConfig) -> Batch:
        """Return the micro-batch with its rows in the order of this measurement."""
        if not self.permuted:
            return batch
        order = far_permutation(context).to(batch.start.device)
        return replace(batch, start=batch.start[:, order], level=batch.level[:, order])

    def request(self, context: ContextConfig, device: torch.device) -> RowRequest:
        """Return what the model is asked for."""
        control = partial(shuffled_gists, context=context) if self.shuffled else None
        last = None if self.vocabulary is None else last_rows(context, context_parallel_group()).to(device)
        return RowRequest(control=control, sigma_factor=self.sigma_factor, last_rows=last)

    def of_contexts(
        self, outputs: RowOutputs, targets: Targets, spans: SpanMetadata, context: ContextConfig
    ) -> dict[str, Tensor]:
        """Return, by contexts, `last` [b, 3]: sums over this rank's rows among the last H of loss, count and hits."""
        last = targets.mask * (spans.end > context.source_length - context.horizon)
        hits = torch.zeros_like(last)
        if outputs.last_logits is not None and self.vocabulary is not None:
            rows = last_rows(context, context_parallel_group()).to(last.device)
            predicted = predictions(outputs.last_logits, self.vocabulary, tensor_parallel_group())
            hits[:, rows] = (predicted.t() == targets.labels[:, rows]).to(hits.dtype)
        losses = outputs.losses.detach().float()
        return {"last": torch.stack([(losses * last).sum(dim=1), last.sum(dim=1), (hits * last).sum(dim=1)], dim=1)}


def last_rows(context: ContextConfig, group: dist.ProcessGroup) -> Tensor:
    """Return the numbers, int64 on the CPU, of this context-parallel rank's rows that are among the last H."""
    rows = zigzag_rows(context.window, group.size(), group.rank())
    return (rows >= context.window - context.horizon).nonzero().squeeze(1)


def far_permutation(context: ContextConfig) -> Tensor:
    """Return an order of the W rows, int64 on the CPU, that changes those before the protected tail alone."""
    far = context.window - context.protected_tokens
    generator = torch.Generator().manual_seed(PERMUTATION_SEED)
    return torch.cat([torch.randperm(far, generator=generator), torch.arange(far, context.window)])


def predictions(logits: Tensor, vocabulary: int, group: dist.ProcessGroup) -> Tensor:
    """Return the most likely of the first `vocabulary` token ids, int64 [n, b], by logits [n, b, padded / TP].

    Of equally likely ids it is the smallest.  Two all-reduces over the tensor-parallel `group`.
    """
    share = logits.shape[-1]
    ids = torch.arange(share, device=logits.device) + group.rank() * share
    logits = logits.float().masked_fill(ids >= vocabulary, -torch.inf)
    best = logits.amax(dim=-1)
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    smallest = torch.where(logits == best.unsqueeze(-1), ids, vocabulary).amin(dim=-1)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    return smallest
