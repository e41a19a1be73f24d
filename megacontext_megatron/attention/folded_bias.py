"""Linear biases inside queries and keys: in the last channels of each head, which carry no content then.

What is the same for all keys of a row does not change its softmax, so -m (mu_q - mu_k) is m (mu_k - c) for any c that
all rows share.  That is a product of something of the query's head and something of the key, so any attention computes
it, and any exchange of keys over context-parallel ranks takes it along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.attention_config import MEGATRON
from megacontext_megatron.encoding_config import SPARE_CHANNELS


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasFold:
    """Writes linear biases into the spare channels of finished queries and keys of one layer.

    `scale` is that of the softmax, and `anchor` (tokens) the c of the module's docstring: the middle of the places that
    rows can have.  Places keep three numbers of the model's dtype, 24 bits in bf16, and slopes one, as weights do: a
    rounded slope is still a slope, and a rounded place would be another place.  Scores of s nats are exact to about
    2^-23 s.
    """

    scale: float
    anchor: float

    def __call__(self, query: Tensor, key: Tensor, slopes: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Return q [s, b, np, hn] and k [s, b, ng, hn] with the biases in them, written where q and k lie.

        `slopes` are fp32 [np] or [s, b, np], nats per token, `centre` float64 [s, b], tokens; both get gradients, and
        places that do are folded without the kernel.  The gradients of q and k hold in the spare channels what their
        makers must drop, as `split_spare` does.  Under slopes of rows q is copied before.
        """
        if slopes.dim() > 1:
            # Slopes of rows come from gates, whose backward pass reads queries as they were.
            query = query.clone()
        if _fuses(query):
            from megacontext_megatron.kernels.fold import FoldScale, fold, fold_fits

            if fold_fits(query, key, slopes, centre):
                return fold(query, key, slopes, centre, FoldScale(scale=self.scale, anchor=self.anchor))
        return self.plain(query, key, slopes, centre)

    def plain(self, query: Tensor, key: Tensor, slopes: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same q and k by PyTorch alone, from any device and dtype; q is overwritten in every case."""
        # A GPU would multiply by the inverse of a number, and the kernel divides.
        slopes = slopes / slopes.new_full((), self.scale)
        return _Fold.apply(query, key, slopes, centre - self.anchor)  # pyright: ignore[reportReturnType]


def bias_fold(config: MegaContextTransformerConfig, layer_number: int) -> BiasFold | None:
    """Return what folds the biases of a layer (counted from 1), None where its attention adds them or has none.

    The plugin's kernel adds them although the channels are spare, and so does dense attention in half precision, which
    would round scores of thousands of nats to 8 bits.
    """
    settings = config.settings
    backend = settings.attention.backend_of(layer_number)
    dense = backend == MEGATRON and config.transformer_impl != "transformer_engine"
    adds = backend == "triton" or (dense and config.params_dtype != torch.float32)
    if not settings.folded(layer_number) or adds:
        return None
    scale = config.softmax_scale or 1.0 / math.sqrt(settings.rotary.head_dim)
    return BiasFold(scale=scale, anchor=settings.context.source_length / 2)


def split_spare(mixed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [s, b, np, hn], k and v [s, b, ng, hn] of a projection [s, b, ng, (np / ng + 2) hn].

    The spare channels of q and k are 0 and give the projection a gradient of 0.  q and k are copies, v is a view.
    """
    if _fuses(mixed):
        from megacontext_megatron.kernels.fold import split, split_fits

        if split_fits(mixed):
            return split(mixed, head_dim)
    return plain_split_spare(mixed, head_dim)


def plain_split_spare(mixed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `split_spare` does by PyTorch alone, from any device and dtype."""
    return _Split.apply(mixed, head_dim)  # pyright: ignore[reportReturnType]


def cleared(heads: Tensor) -> Tensor:
    """Return heads [..., hn] with 0 in the spare channels, whose gradients are dropped."""
    return pad(heads[..., :-SPARE_CHANNELS], (0, SPARE_CHANNELS))


def total(slopes: Iterable[Tensor | None]) -> Tensor:
    """Return the sum of slopes [np] and [s, b, np]; raises RuntimeError for a bias that has none."""
    found = list(slopes)
    if not found or any(each is None for each in found):
        raise RuntimeError("a score bias that is not linear in the distance cannot be folded into queries and keys")
    return torch.stack(torch.broadcast_tensors(*(each for each in found if each is not None))).sum(0)


def _fuses(heads: Tensor) -> bool:
    return heads.is_cuda and find_spec("triton") is not None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = mixed.unflatten(-1, (-1, head_dim))
        rows, batch, groups, parts, _ = heads.shape
        # No views of what they are made as, which autograd would refuse to write to.
        query = mixed.new_empty(rows, batch, groups * (parts - 2), head_dim)
        query.unflatten(2, (groups, -1)).copy_(heads[..., :-2, :])
        key = heads[..., -2, :].clone(memory_format=torch.contiguous_format)
        for part in (query, key):
            part[..., -SPARE_CHANNELS:] = 0
        return query, key, heads[..., -1, :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        query, key, value = gradients
        groups = value.shape[2]
        by_group = query.unflatten(2, (groups, -1))
        mixed = torch.cat([by_group, key.unsqueeze(3), value.unsqueeze(3)], dim=3)
        mixed[..., :-1, -SPARE_CHANNELS:] = 0
        return mixed.flatten(3), None


class _Fold(torch.autograd.Function):
    """Queries hold (a, a, a, 0) for a = slope / scale, and keys (high, mid, low, 1) for d = centre - anchor.

    The last channel adds nothing.  It is there for the backward pass: gradients of a row's scores add up to 0, but
    attention rounds each of them to the model's dtype, and their products with d far from the anchor would leave that
    rounding times d in the gradient of a.  The query's gradient in the last channel is the sum of the rounded ones, so
    d can be counted from the row's own place after the fact.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, slope: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(place)
        ctx.slope = slope.shape, slope.dtype
        # Neither is marked as changed: autograd would refuse that of norms that hand out views.  It counts versions all
        # the same, so whoever had saved the old values would say so.
        query[..., -SPARE_CHANNELS:-1] = slope.unsqueeze(-1).to(query.dtype)
        query[..., -1] = 0
        pieces = [*_pieces(place, key.dtype), torch.ones_like(place, dtype=key.dtype)]
        key[..., -SPARE_CHANNELS:] = torch.stack(pieces, dim=-1).unsqueeze(2)
        return query, key

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key = gradients
        [place] = ctx.saved_tensors
        shape, dtype = ctx.slope
        slope = centre = None
        if ctx.needs_input_grad[2]:
            spare = query[..., -SPARE_CHANNELS:].double()
            slope = spare[..., :-1].sum(-1) - place.unsqueeze(-1) * spare[..., -1]
            slope = slope.sum_to_size(shape).to(dtype)
        if ctx.needs_input_grad[3]:
            centre = key[..., -SPARE_CHANNELS].sum(-1, dtype=place.dtype)
        return query, key, slope, centre


def _pieces(value: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Return three numbers of a dtype that add up to each value, the greatest first."""
    found = []
    for _ in range(3):
        piece = value.to(dtype)
        value = value - piece.to(value.dtype)
        found.append(piece)
    return found
