"""Assembly: from the embeddings of a sample's C tokens to the W rows of each of its working contexts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.context.gists import Gister, Gists, embedding_rms, rms_slope, summing_dtype
from megacontext_megatron.spans.levels import entry_index
from megacontext_megatron.spans.metadata import SpanMetadata, SpanShift


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """The rows [s, b V, h] of working contexts, the gists of every level from 1 on, and by how much rows move."""

    rows: Tensor
    levels: list[Gists]
    shift: SpanShift | None = None


def assemble_rows(
    tokens: Tensor, spans: SpanMetadata, context: ContextConfig, gister: Gister, *, control: GistControl | None = None
) -> Assembly:
    """Return the rows that `spans` [b V, s] name, from the embeddings [C, b, h] of raw samples' tokens.

    Context j reads raw sample j div V; its rows cover every token at most once.  The table of entries is never built:
    tokens are gathered first, and the few rows that are gists are then written over.  Gradients are summed in the
    same order in every run.  `control` changes which gist a row gets (see GistControl).
    """
    contexts, rows_each = spans.start.shape
    number = torch.arange(contexts, device=tokens.device).unsqueeze(1)
    sample = number.div(contexts // tokens.shape[1], rounding_mode="floor")
    is_token = spans.level == 0
    place = spans.start * tokens.shape[1] + sample
    tokens, rms, rows = cast(tuple[Tensor, Tensor, Tensor], _TokenRows.apply(tokens, place.t(), is_token.t()))
    levels = gists_of(tokens, rms, context, gister)
    most = min(rows_each, sum(level.vectors.shape[0] for level in levels))
    if most == 0:
        return Assembly(rows=rows, levels=levels)
    # As many rows of each context as could be gists, those that are first: no shape depends on a plan.
    row = is_token.to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    start, level = spans.start.gather(1, row), spans.level.gather(1, row)
    entry = entry_index(start, level.long(), context.source_length, context.block_size)
    node = ((entry - context.source_length) * tokens.shape[1] + sample).clamp_min_(0)
    chosen = control(levels) if control else levels
    vectors = torch.cat([level.vectors for level in chosen])
    # Rows are numbered in the order of [s, b V].
    rows = cast(Tensor, _WithGists.apply(rows, row * contexts + number, (node, level == 0), vectors))
    return Assembly(rows=rows, levels=levels, shift=_shift_of(chosen, spans, row, (node, level == 0)))


def _shift_of(levels: list[Gists], spans: SpanMetadata, row: Tensor, nodes: tuple[Tensor, Tensor]) -> SpanShift | None:
    """Return by how much each row [b V, s] moves; `row` and `nodes` as in _WithGists, rows numbered in a context."""
    shifts = [level.shift for level in levels if level.shift is not None]
    if not shifts:
        return None
    node, is_token = nodes
    table = torch.cat(shifts).flatten(0, 1)
    chosen = functional.embedding(node, table).masked_fill(is_token.unsqueeze(-1), 0.0)
    whole = table.new_zeros(*spans.start.shape, table.shape[-1])
    return SpanShift.bounded(whole.scatter(1, row.unsqueeze(-1).expand_as(chosen), chosen), spans.width)


class GistControl(Protocol):
    """Changes what rows get of gists: for a control experiment (shuffled_gists), or to keep gradients from them."""

    def __call__(self, levels: list[Gists], /) -> list[Gists]:
        """Return the levels that rows get their gists from."""
        ...


def shuffled_gists(levels: list[Gists], context: ContextConfig) -> list[Gists]:
    """Give every gist that may stand in a row the vector and shift of another such gist of its level.

    They are of another raw sample, or, where there is one, from another place of it.  Nothing of the tokens that never
    collapse gets into a row.  A level with one such gist keeps it.
    """
    shuffled = []
    for number, level in enumerate(levels, start=1):
        inside = context.nodes(number)
        shift = None if level.shift is None else _rolled(level.shift, inside)
        shuffled.append(level._replace(vectors=_rolled(level.vectors, inside), shift=shift))
    return shuffled


def _rolled(values: Tensor, inside: slice) -> Tensor:
    """Return values [m, b, ...] with those of the blocks `inside` moved by half of them, and on to the next sample."""
    before, moved, behind = values.tensor_split([inside.start, inside.stop])
    blocks, samples = moved.shape[:2]
    far = blocks // 2 * samples + (samples > 1)
    return torch.cat([before, moved.flatten(0, 1).roll(far, dims=0).view_as(moved), behind])


def gists_of(tokens: Tensor, rms: Tensor, context: ContextConfig, gister: Gister) -> list[Gists]:
    """Return the gists of every complete block of each level from 1 on, C div K^level in each sample.

    `rms` [C, b] is that of the `tokens` [C, b, h].  A plan of tokens alone has no gists.
    """
    levels: list[Gists] = []
    below = tokens
    for _ in range(context.max_level if context.plan != "recency" else 0):
        complete = below.shape[0] // context.block_size * context.block_size
        if complete == 0:
            break
        if complete < below.shape[0]:
            below, rms = below[:complete], rms[:complete]
        levels.append(gister(below, rms, context.block_size))
        below, rms = levels[-1].vectors, levels[-1].rms
    return levels


class _TokenRows(torch.autograd.Function):
    """Hands tokens [C, b, h] to all that read them: as they are, their RMS [C, b], and the rows [s, b V, h] of tokens.

    `place` [s, b V] is each row's token among C b.  A row that `is_token` [s, b V] denies names the first token it
    covers, which is no other row of its context, and gives it no gradient.  Summing the three gradients in one buffer
    here spares autograd as many passes over all tokens.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, place: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rms = embedding_rms(tokens)
        # Not a view, so that gists can be written into it.
        rows = functional.embedding(place, tokens.flatten(0, 1))
        ctx.save_for_backward(tokens, rms, place, is_token)
        return tokens, rms, rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        of_tokens, of_rms, of_rows = gradients
        tokens, rms, place, is_token = ctx.saved_tensors
        slope = rms_slope(of_rms, rms, tokens.shape[-1]).unsqueeze(-1)
        shape = (tokens.shape[1], -1)
        # Each variant's sum rounds in half precision, so that the errors of more than two would add up.
        sums = summing_dtype(tokens.dtype) if place.shape[1] > 2 * tokens.shape[1] else tokens.dtype
        out = torch.empty(tokens.shape, dtype=sums, device=tokens.device)
        torch.addcmul(of_tokens, tokens, slope, out=out)
        flat = out.view(-1, tokens.shape[-1])
        by_variant = [t.unflatten(1, shape).unbind(2) for t in (place, is_token.to(out.dtype), of_rows)]
        # Rows of one context have tokens of their own, so each variant is added without collisions.
        for places, keep, gradient in zip(*by_variant, strict=True):
            index = places.flatten()
            here = flat.index_select(0, index)
            here.addcmul_(gradient.flatten(0, 1).to(sums), keep.reshape(-1, 1))
            flat.index_copy_(0, index, here)
        return out.to(tokens.dtype), None, None


class _WithGists(torch.autograd.Function):
    """Writes gists [m, b, h] into rows [s, b V, h], in place.

    `row` [b V, n] numbers different rows of each context.  `nodes` are the number of the gist among m b for each, and
    whether it is a token, which is left alone.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row: Tensor, nodes: tuple[Tensor, Tensor], gists: Tensor) -> Tensor:
        flat, index, (node, is_token) = rows.view(-1, rows.shape[-1]), row.flatten(), nodes
        is_token = is_token.view(-1, 1)
        chosen = gists.flatten(0, 1).index_select(0, node.flatten())
        flat.index_copy_(0, index, torch.where(is_token, flat.index_select(0, index), chosen))
        ctx.save_for_backward(index, node, is_token)
        ctx.shape = gists.shape
        ctx.mark_dirty(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor, None, None, Tensor]:  # type: ignore[override]
        index, node, is_token = ctx.saved_tensors
        blocks, count, hidden = ctx.shape
        written = of_rows.flatten(0, 1).index_select(0, index).to(summing_dtype(of_rows.dtype))
        written.masked_fill_(is_token, 0.0)
        out = written.new_zeros(blocks * count, hidden)
        shape = (count, -1, node.shape[1])
        # Gists of one context differ, and what is no gist adds 0 to the first.
        for nodes, gradient in zip(node.view(shape).unbind(1), written.view(*shape, hidden).unbind(1), strict=True):
            out.index_add_(0, nodes.flatten(), gradient.flatten(0, 1))
        return of_rows, None, None, out.to(of_rows.dtype).view(ctx.shape)
