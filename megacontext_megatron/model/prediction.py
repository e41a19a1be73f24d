"""Prediction of coming gists: rows that end at block edges are asked for the gist of the next K^level tokens.

The answer is read from a row's final hidden state, and the target is that gist of the same forward, held fixed: with
gradients, both could agree on a constant.  Nothing of a target reaches the rows, so that it may lie behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megacontext_megatron.config import ContextConfig, PredictionConfig
from megacontext_megatron.context.gists import Gists, summing_dtype
from megacontext_megatron.spans.metadata import SpanMetadata

TEMPERATURE = 0.07
"""What cosines are divided by before the cross-entropy over gists."""

LEAST_LEAD = 1e-4
"""By how much more cosine a prediction must be nearer to its own gist than to any other to be accepted.

Blocks of the same tokens have the same gist: which of them a rounding error puts ahead means nothing.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeRows:
    """Which row of each context ends at each multiple of a width that has a whole span of that width behind it.

    `number` is the row's number in the context, int64 [m, b], for the edges width, 2 width, ..., m width; it means
    nothing where `found`, bool, says that no row of this rank ends there.  `level` is the row's own, int8.
    """

    number: Tensor
    found: Tensor
    level: Tensor

    @classmethod
    def of(cls, spans: SpanMetadata, width: int, source_length: int) -> EdgeRows:
        """Return the edge rows among rows [b, s] in order of time, which no two of a context end at the same token."""
        end = spans.end
        edges = torch.arange(width, source_length - width + 1, width, device=end.device)
        edges = edges.expand(end.shape[0], -1).contiguous()
        number = torch.searchsorted(end, edges).clamp_max_(end.shape[1] - 1)
        found = end.gather(1, number) == edges
        return cls(number=number.t(), found=found.t(), level=spans.level.gather(1, number).t())

    def every(self, step: int, count: int) -> EdgeRows:
        """Return the first `count` of every `step`-th edge: those of a level above."""
        number, found, level = (t[step - 1 :: step][:count] for t in (self.number, self.found, self.level))
        return EdgeRows(number=number, found=found, level=level)


def states_at(hidden: Tensor, number: Tensor, scattered_over: ProcessGroup | None) -> Tensor:
    """Return the hidden states [m, b, h] of rows `number` [m, b], whole on every tensor-parallel rank.

    `hidden` is [s, b, h], or this rank's [s / TP, b, h] where rows are scattered over a group.  Only the rows asked for
    travel.  The gradient of the result must be the same on all ranks of the group.
    """
    batch = hidden.shape[1]
    place = number * batch + torch.arange(batch, device=number.device)
    rows = hidden.flatten(0, 1)
    if scattered_over is None:
        return functional.embedding(place, rows)
    place = place - scattered_over.rank() * rows.shape[0]
    elsewhere = (place < 0) | (place >= rows.shape[0])
    own = functional.embedding(place.clamp(0, rows.shape[0] - 1), rows)
    own = own.masked_fill(elsewhere.unsqueeze(-1), 0.0)
    return reduce_from_tensor_model_parallel_region(own, group=scattered_over)


def expected_embedding(logits: Tensor, table: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the mean of the embeddings `table` [v, h] under softmax(logits [..., v]): [..., h] in summing dtype.

    The v tokens are this rank's part of the vocabulary where a tensor-parallel `group` is given; the result is whole.
    The table is held fixed: moved towards gists, embeddings would make them easy to predict instead of being predicted.
    """
    logits = logits.to(summing_dtype(logits.dtype))
    highest = logits.detach().amax(dim=-1, keepdim=True)
    if group is not None:
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    weights = (logits - highest).exp()
    mean = (weights.to(table.dtype) @ table.detach()).to(weights.dtype)
    sums = torch.cat([mean, weights.sum(dim=-1, keepdim=True)], dim=-1)
    if group is not None:
        sums = reduce_from_tensor_model_parallel_region(sums, group=group)
    return sums[..., :-1] / sums[..., -1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """What this rank's rows predicted in a micro-batch.

    `losses` holds, by level, the sum of the rows' losses, which carries gradients, and their count: [2].  `sums` are
    detached (sum, count), fp32 [k, 2], for telemetry: `predict/loss`, `predict/agreement` (cosine of prediction and
    gist) and `predict/accept`, k = max_level; `predict/by_width`, agreement by target level and, within it, by the
    level of the predicting row, k = max_level (max_level + 1).  A row is accepted whose prediction is nearer to its own
    gist than to every other gist of that level in the micro-batch, by LEAST_LEAD.
    """

    losses: dict[int, Tensor]
    sums: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class GistPredictor:
    """Compares what rows predict with the gists that come.

    `scattered_over` is the tensor-parallel group where rows are scattered over it, `embed` what makes expected input
    embeddings of hidden states, [m, b, h] each.
    """

    context: ContextConfig
    settings: PredictionConfig
    embed: Callable[[Tensor], Tensor]
    scattered_over: ProcessGroup | None = None

    def __call__(self, hidden: Tensor, levels: Sequence[Gists], spans: SpanMetadata) -> Predicted:
        """Return what the rows `spans` [b V, s] predict from their final hidden states [s, b V, h].

        `levels` are the gists of b raw samples, from level 1 on.
        """
        context, active = self.context, [n for n, weight in enumerate(self.settings.weights, start=1) if weight]
        lowest = active[0]
        edges = EdgeRows.of(spans, context.block_size**lowest, context.source_length)
        states = states_at(hidden, edges.number, self.scattered_over)
        answers = self.embed(states) if self.settings.readout == "soft-embed" else states
        losses: dict[int, Tensor] = {}
        sums = self._no_sums(hidden.device)
        for level in active:
            step = context.block_size ** (level - lowest)
            rows = edges.every(step, context.source_length // context.block_size**level - 1)
            compared = Comparison.of(answers[step - 1 :: step][: len(rows.number)], levels[level - 1].vectors, context)
            loss = compared.contrast() if self.settings.readout == "infonce" else 1.0 - compared.agreement
            losses[level] = torch.stack([_counted_sum(loss, rows.found), rows.found.sum().to(loss.dtype)])
            self._add(sums, level, rows, (loss, compared))
        return Predicted(losses=losses, sums=sums)

    def _no_sums(self, device: torch.device) -> dict[str, Tensor]:
        most = self.context.max_level
        sizes = {"loss": most, "agreement": most, "accept": most, "by_width": most * (most + 1)}
        return {f"predict/{name}": torch.zeros(size, 2, device=device) for name, size in sizes.items()}

    @torch.no_grad()
    def _add(self, sums: dict[str, Tensor], level: int, rows: EdgeRows, results: tuple[Tensor, Comparison]) -> None:
        loss, compared = results
        values = {"loss": loss, "agreement": compared.agreement, "accept": compared.accepted()}
        for name, value in values.items():
            sums[f"predict/{name}"][level - 1] = _pair(value, rows.found)
        kinds = self.context.max_level + 1
        for row_level in range(kinds):
            of_level = rows.found & (rows.level == row_level)
            sums["predict/by_width"][(level - 1) * kinds + row_level] = _pair(compared.agreement, of_level)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Predictions [n, b V, h] of the gists 1 to n of a level, beside all gists [n + 1, b, h], each of length 1.

    The first gist of a sample has no row before it.  `agreement` [n, b V] is the cosine with the row's own gist.
    """

    predictions: Tensor
    gists: Tensor
    agreement: Tensor
    variants: int

    @classmethod
    def of(cls, predictions: Tensor, gists: Tensor, context: ContextConfig) -> Comparison:
        """Compare predictions with gists of any length; gists are held fixed."""
        dtype = summing_dtype(predictions.dtype)
        predictions = functional.normalize(predictions.to(dtype), dim=-1)
        gists = functional.normalize(gists.detach().to(dtype), dim=-1)
        own = gists[1 : len(predictions) + 1].repeat_interleave(context.variants, dim=1)
        agreement = torch.linalg.vecdot(predictions, own)
        return cls(predictions=predictions, gists=gists, agreement=agreement, variants=context.variants)

    def _cosines(self) -> tuple[Tensor, Tensor]:
        """Return cosines with all gists of the micro-batch, [n b V, m b], and which of them is the own, int64."""
        rows, contexts = self.agreement.shape
        samples = self.gists.shape[1]
        block = torch.arange(1, rows + 1, device=self.gists.device).unsqueeze(1)
        sample = torch.arange(contexts, device=self.gists.device).div(self.variants, rounding_mode="floor")
        cosines = self.predictions.flatten(0, 1) @ self.gists.flatten(0, 1).t()
        return cosines, (block * samples + sample).flatten()

    def contrast(self) -> Tensor:
        """Return each row's cross-entropy, [n, b V], of its own gist among all gists of the micro-batch."""
        cosines, own = self._cosines()
        return functional.cross_entropy(cosines / TEMPERATURE, own, reduction="none").view_as(self.agreement)

    @torch.no_grad()
    def accepted(self) -> Tensor:
        """Return whether each prediction [n, b V] is nearer to its own gist than to every other."""
        cosines, own = self._cosines()
        own = own.unsqueeze(1)
        best_other = cosines.scatter(1, own, -torch.inf).amax(dim=1)
        return (cosines.gather(1, own).squeeze(1) - best_other > LEAST_LEAD).view_as(self.agreement)


def prediction_terms(
    predicted: Predicted, settings: PredictionConfig, over_context: Callable[[Tensor], Tensor]
) -> dict[str, tuple[float, Tensor]]:
    """Return weight and mean loss of each predicted level; a level that no row predicts has the loss 0."""
    terms: dict[str, tuple[float, Tensor]] = {}
    for level, sums in predicted.losses.items():
        total, count = over_context(sums).unbind()
        terms[f"predict_level{level}"] = settings.weights[level - 1], total / count.clamp_min(1.0)
    return terms


def _counted_sum(values: Tensor, counts: Tensor) -> Tensor:
    return values.masked_fill(~counts, 0.0).sum()


def _pair(values: Tensor, counts: Tensor) -> Tensor:
    return torch.stack([_counted_sum(values.float(), counts), counts.sum().float()])
