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
    kernels.window_attention.  Each rank sends the last `look_back` rows of its chunks to whoever has the chunk after,
    whatever the length of a sequence, and gets as many gradients back.  Raises ValueError where a chunk is shorter than
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

    @property
    def begins(self) -> tuple[tuple[int, int], ...]:
        """Chunks whose first rows see rows before them, each with the number of such rows that do not exist.

        Nothing lies before the first chunk of the first rank.
        """
        if not self.look_back:
            return ()
        return (0, 0 if self.group.rank() else self.look_back), (1, 0)


class _Chunked(NamedTuple):
    """Queries, keys and values [2, s / (2 cp), b, np or ng, hn] of both chunks of a rank, or what belongs to them."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, *heads: Tensor) -> _Chunked:
        """Return the chunks of a rank's rows, where they lie."""
        return cls(*(x.unflatten(0, (2, -1)) for x in heads))

    def rows_of_keys(self, rows: slice) -> Tensor:
        """Return copies of rows of keys and of values of each chunk, [2, rows, 2, b, ng, hn]."""
        return torch.stack((self.key[:, rows], self.value[:, rows]), dim=2)


def _together(x: Tensor) -> tuple[Tensor, ...]:
    """Return chunks [2, rows, b, n, hn] as few tensors [rows, sequences, n, hn]."""
    return (x[:, :, 0].transpose(0, 1),) if x.shape[2] == 1 else x.unbind()


class _Chunks(torch.autograd.Function):
    """Keeps for its backward pass, of each chunk, keys and values before and at its beginning, `near`.

    They are [2, 2 look_back, 2, b, ng, hn].
    """

    @staticmethod
    def forward(ctx: Any, windows: _Windows, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Triton is not everywhere that PyTorch is.
        from megacontext_megatron.kernels.window_attention import attend_rows

        depth, scale, group = windows
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        chunks, outs = _Chunked.of(query, key, value), out.unflatten(0, (2, -1))
        near = key.new_empty(2, 2 * depth, 2, *key.shape[1:])
        arriving = None
        if depth:
            arriving = fetch_before(chunks.rows_of_keys(slice(-depth, None)), near[:, :depth], group)
            near[:, depth:] = chunks.rows_of_keys(slice(depth))
        rest = [
            attend_rows((q[depth:], k, v), o[depth:], look_back=depth, scale=scale)
            for q, k, v, o in zip(*map(_together, (*chunks, outs)), strict=True)
        ]
        if arriving is not None:
            arriving.wait()
        begun = []
        for chunk, missing in windows.begins:
            keys, values = near[chunk, missing:].unbind(1)
            heads = chunks.query[chunk, :depth], keys, values
            begun.append(attend_rows(heads, outs[chunk, :depth], look_back=depth, scale=scale))
        ctx.windows = windows
        ctx.save_for_backward(query, key, value, out, near, *begun, *rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from megacontext_megatron.kernels.window_attention import gradients_of_rows
        from megacontext_megatron.kernels.window_strips import aligned

        query, key, value, out, near, *kept = ctx.saved_tensors
        windows: _Windows = ctx.windows
        depth, scale, group = windows
        wanted = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        chunks, into = _Chunked.of(query, key, value), _Chunked.of(*wanted)
        outs, grads = (x.unflatten(0, (2, -1)) for x in (out, aligned(gradients[0])))
        normalisers = iter(kept)
        # Gradients of keys and values by what the first rows of chunks see.
        begun = torch.empty_like(near)
        for chunk, missing in windows.begins:
            (keys, values), (to_keys, to_values) = (x[chunk, missing:].unbind(1) for x in (near, begun))
            gradients_of_rows(
                (chunks.query[chunk, :depth], keys, values),
                (outs[chunk, :depth], grads[chunk, :depth], next(normalisers)),
                (into.query[chunk, :depth], to_keys, to_values),
                look_back=depth, scale=scale,
            )  # fmt: skip
        tails, returning = near.new_zeros(2, depth, *near.shape[2:]), None
        if depth:
            returning = return_before(begun[:, :depth], tails, group)
        together = zip(*map(_together, (*chunks, outs, grads, *into)), normalisers, strict=True)
        for q, k, v, o, g, to_q, to_k, to_v, normaliser in together:
            gradients_of_rows(
                (q[depth:], k, v), (o[depth:], g[depth:], normaliser), (to_q[depth:], to_k, to_v),
                look_back=depth, scale=scale,
            )  # fmt: skip
        if returning is not None:
            returning.wait()
            for part, grad in enumerate((into.key, into.value)):
                grad[:, :depth] += begun[:, depth:, part]
                grad[:, -depth:] += tails[:, :, part]
        return None, *wanted
