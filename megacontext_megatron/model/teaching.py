"""Lessons: what a teacher that sees the full context says of a micro-batch, from a cache or by a second forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from megacontext_megatron.config import ContextConfig, Settings
from megacontext_megatron.data.batch import Batch
from megacontext_megatron.model.divergence import real_columns
from megacontext_megatron.model.measures import last_rows
from megacontext_megatron.model.parallel_groups import context_parallel_group, tensor_parallel_group
from megacontext_megatron.model.requests import Lesson, RowRequest
from megacontext_megatron.spans.context_parallel import zigzag_rows
from megacontext_megatron.spans.metadata import SpanMetadata


def full_context(context: ContextConfig) -> ContextConfig:
    """Return the context of a teacher: all C tokens as rows."""
    return replace(context, variants=1, plan="recency", window=context.source_length)


def taught(model: torch.nn.Module, text: Tensor, settings: Settings, mask: Tensor | None) -> Lesson:
    """Return what a model says of raw samples `text`, int64 [b, C + 1], with all C tokens as rows; without gradients.

    `settings` are those of the student's contexts, `mask` the causal mask [1, 1, C, C] of Megatron's dense attention.
    For one pipeline stage and one context-parallel rank.
    """
    context, size = settings.context, text.shape[0]
    start = torch.arange(context.source_length, device=text.device).expand(size, -1).contiguous()
    spans = SpanMetadata.of_nodes(start, torch.zeros_like(start), context.block_size)
    rows = start[0, -context.horizon :]
    with torch.no_grad(), _as_teacher(model, replace(settings, context=full_context(context))):
        return model(
            input_ids=text[:, :-1],
            spans=spans,
            request=RowRequest(teach=True, last_rows=rows),
            attention_mask=mask,
            labels=text[:, 1:],
        )


@contextmanager
def _as_teacher(model: torch.nn.Module, settings: Settings) -> Iterator[None]:
    """Let a model work without dropout and under other settings in the block."""
    config, training = cast(Any, get_model_config(model)), model.training
    before, config.mc_settings = config.mc_settings, settings
    model.eval()
    try:
        yield
    finally:
        config.mc_settings = before
        model.train(training)


@dataclass(kw_only=True)
class Teacher:
    """Gives each training micro-batch its lesson.

    `vocabulary` is the number of token ids, without the padding of the vocabulary, `padded` that of a tensor-parallel
    rank's entries with it.  `needs_mask` says that Megatron's dense attention must be given a causal mask.
    """

    settings: Settings
    vocabulary: int
    padded: int
    needs_mask: bool
    _rows: Tensor | None = field(default=None, init=False)
    _places: Tensor | None = field(default=None, init=False)
    _mask: Tensor | None = field(default=None, init=False)

    def shapes(self, *, first: bool, last: bool) -> dict[str, tuple[int, ...]]:
        """Return what the first and the last stage need of a cache, by field of data.batch.Batch, for one sample."""
        return cached_shapes(self.settings, self.vocabulary, first=first, last=last)

    def __call__(self, model: torch.nn.Module, batch: Batch, *, last: bool) -> Lesson:
        """Return the lesson of a micro-batch; only the `last` stage hears of logits."""
        objective = self.settings.objective
        if not (objective.kl and last):
            return Lesson(states=batch.states)
        rows, places = self._last_rows(batch.start.device)
        first = tensor_parallel_group().rank() * self.padded
        width = real_columns(self.padded, self.vocabulary, tensor_parallel_group().rank())
        if objective.teacher == "cache":
            assert batch.logits is not None
            logits = batch.logits[..., first : first + width].index_select(1, places).transpose(0, 1)
            return Lesson(rows=rows, logits=logits, states=batch.states)
        assert batch.text is not None
        logits = taught(model, batch.text, self.settings, self._causal_mask(batch.text.device)).logits
        return Lesson(rows=rows, logits=cast(Tensor, logits)[..., :width])

    def _last_rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the numbers of this rank's rows among the last H, and their places among those, int64 [n]."""
        if self._rows is None or self._places is None:
            context, group = self.settings.context, context_parallel_group()
            rows = last_rows(context, group)
            places = zigzag_rows(context.window, group.size(), group.rank())[rows] - (context.window - context.horizon)
            self._rows, self._places = rows.to(device), places.to(device)
        return self._rows, self._places

    def _causal_mask(self, device: torch.device) -> Tensor | None:
        if self.needs_mask and self._mask is None:
            rows = self.settings.context.source_length
            self._mask = torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)[None, None]
        return self._mask


def cached_shapes(settings: Settings, vocabulary: int, *, first: bool, last: bool) -> dict[str, tuple[int, ...]]:
    """Return the arrays of a cache that the `first` or `last` stage learns from, and their shapes for one sample."""
    objective, context = settings.objective, settings.context
    if objective.teacher != "cache":
        return {}
    shapes = {}
    if objective.kl and last:
        shapes["logits"] = (context.horizon, vocabulary)
    if objective.pooling and first:
        shapes["states"] = (context.source_length // context.block_size, settings.gist.hidden)
    return shapes
