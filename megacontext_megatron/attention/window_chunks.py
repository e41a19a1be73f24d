"""Sliding windows over context-parallel ranks, each of which holds two zigzag chunks of rows.

A chunk's rows see at most `look_back` rows before it.  The rows that see none of them are computed where they lie while
those arrive; the few at a chunk's beginning then see copies of what came and of their own first rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacontext_megatron.attention.halo import fetch_before, return_before


def chunked_window_attention(
    query: Tensor, key: Tensor, value: Tensor, look_back: int, *, scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Return attention [s / cp, b, np, hn] of this rank's chunks, in a window that reaches into other ranks'.

    q is [s / cp, b, np, hn], k and v are [s / cp, b, ng, hn], in zigzag order; dtypes and shapes are those of
    kernels.window_attention.  Each rank sends the last `look_back` rows of its chunks and receives as many, whatever
    the length of a sequence, and gradients as many the other way.  Raises ValueError where a chunk is shorter than
    that.
    """
    chunk = len(query) // 2
    if look_back > chunk:
        raise ValueError(f"{look_back} rows before a chunk of {chunk} lie on more than one rank")
    return cast(Tensor, _Chunks.apply(_Windows(look_back, scale, group), query, key, value))


class _Windows(NamedTuple):
    look_back: int
    scale: float
    group: dist.ProcessGroup

    def spans(self, rows: int) -> tuple[_Span, _Span]:
        """Return both chunks of a rank."""
        chunk = rows // 2
        return _Span(0, chunk, self.look_back if self.group.rank() else 0), _Span(chunk, rows, self.look_back)


class _Span(NamedTuple):
    """Rows of a chunk, the first `reaching` of which see rows before it."""

    begin: int
    end: int
    reaching: int

    @property
    def all(self) -> slice:
        return slice(self.begin, self.end)

    @property
    def start(self) -> slice:
        return slice(self.begin, self.begin + self.reaching)

    @property
    def rest(self) -> slice:
        return slice(self.begin + self.reaching, self.end)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: _Windows, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Triton is not everywhere that PyTorch is.
        from megacontext_megatron.kernels.window_attention import attend_rows

        look_back, scale, group = windows
        spans, heads = windows.spans(len(query)), (key, value)
        arriving = None
        if look_back:
            arriving = fetch_before(_last(heads, spans[0], look_back), _last(heads, spans[1], look_back), group)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept = [
            attend_rows((query[x.rest], key[x.all], value[x.all]), out[x.rest], look_back=look_back, scale=scale)
            for x in spans
        ]
        before = () if arriving is None else arriving.wait().unbind()
        for span, rows in zip(spans, before, strict=False):
            if span.reaching:
                at = span.start
                keys, values = torch.cat((rows[:, 0], key[at])), torch.cat((rows[:, 1], value[at]))
                normaliser = attend_rows((query[at], keys, values), out[at], look_back=look_back, scale=scale)
                kept += [keys, values, normaliser]
        ctx.windows = windows
        ctx.save_for_backward(query, key, value, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from megacontext_megatron.kernels.window_attention import gradients_of_rows

        query, key, value, out, *kept = ctx.saved_tensors
        look_back, scale, group = ctx.windows
        grad = gradients[0].contiguous()
        query_grad, key_grad, value_grad = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        spans: tuple[_Span, _Span] = ctx.windows.spans(len(query))
        normalisers, starts = kept[: len(spans)], iter(kept[len(spans) :])
        # Of the keys and values before a chunk and its first rows, by what those rows see.
        begun: list[tuple[Tensor, Tensor]] = []
        for span in spans:
            if not span.reaching:
                begun.append((key.new_zeros(look_back, *key.shape[1:]),) * 2)
                continue
            keys, values, normaliser = next(starts), next(starts), next(starts)
            begun.append((torch.empty_like(keys), torch.empty_like(values)))
            at = span.start
            gradients_of_rows(
                (query[at], keys, values), (out[at], grad[at], normaliser), (query_grad[at], *begun[-1]),
                look_back=look_back, scale=scale,
            )  # fmt: skip
        returning = None
        if look_back:
            first, second = (torch.stack([x[:look_back] for x in made], dim=1) for made in begun)
            returning = return_before(first, second, group)
        for span, normaliser in zip(spans, normalisers, strict=True):
            gradients_of_rows(
                (query[span.rest], key[span.all], value[span.all]), (out[span.rest], grad[span.rest], normaliser),
                (query_grad[span.rest], key_grad[span.all], value_grad[span.all]),
                look_back=look_back, scale=scale,
            )  # fmt: skip
        tails = None if returning is None else returning.wait()
        for number, span in enumerate(spans):
            for part, x in enumerate((key_grad, value_grad)):
                x[span.start] += begun[number][part][look_back:]
                if tails is not None:
                    x[span.end - look_back : span.end] += tails[number][:, part]
        return None, query_grad, key_grad, value_grad


def _last(heads: tuple[Tensor, Tensor], span: _Span, rows: int) -> Tensor:
    """Return the last rows of a chunk's keys and values, [rows, 2, b, ng, hn]."""
    return torch.stack([x[span.end - rows : span.end] for x in heads], dim=1)
