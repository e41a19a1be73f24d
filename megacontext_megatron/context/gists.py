"""Gists: one embedding that stands for a complete block of tokens, or of lower gists."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

GREATEST_GAIN = 1024.0
"""An average is scaled up by at most this factor; that of 1024 unrelated embeddings needs 32."""

LEAST_RMS = math.sqrt(torch.finfo(torch.float32).tiny)
"""What an embedding of nothing but zeros counts as: a root has no gradient at 0."""


class Gists(NamedTuple):
    """The gists of one level: `vectors` [m, b, h], and `rms` [m, b], the mean RMS of their tokens' embeddings.

    `shift` [m, b, 2], where gists move their own centre and spread, is what spans.metadata.SpanShift is made of, before
    it is bounded; fp32.
    """

    vectors: Tensor
    rms: Tensor
    shift: Tensor | None = None


class Gister(Protocol):
    """Makes the next level from a level: the replaceable part of working-context assembly."""

    def __call__(self, below: Tensor, rms: Tensor, block_size: int) -> Gists:
        """Return the gists of `below` [n, b, h], n / K of them in each sample.

        `rms` [n, b] is the mean RMS of the token embeddings that each entry of `below` stands for.  A gist may depend
        on nothing outside its block.
        """
        ...


def summing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are added up: fp32, or float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def embedding_rms(embeddings: Tensor) -> Tensor:
    """Return the root mean square over channels, fp32 [n, b], of embeddings [n, b, h], at least LEAST_RMS.

    Of float64 embeddings it is float64.
    """
    norm = torch.linalg.vector_norm(embeddings, dim=-1, dtype=summing_dtype(embeddings.dtype))
    return (norm / math.sqrt(embeddings.shape[-1])).clamp_min(LEAST_RMS)


def rms_slope(gradient: Tensor, rms: Tensor, channels: int) -> Tensor:
    """Return what an embedding's gradient is a multiple of itself by, given its RMS [n, b] and the RMS's gradient."""
    return gradient / (rms * channels)


def mean_gists(below: Tensor, rms: Tensor, block_size: int) -> Gists:
    """Average each block and scale the average so that its RMS is the mean RMS of its own tokens' embeddings.

    Shapes as in Gister.  The scale reads the block alone, so no row learns of a later token.
    """
    return Gists(*cast(tuple[Tensor, Tensor], _ScaledMean.apply(below, rms, block_size)))


class _ScaledMean(torch.autograd.Function):
    """Reads `below` once and writes its gradient once, in its own dtype; what it keeps is as small as the gists.

    With the mean m of a block, its RMS s, the target t and the gain f = t / s, a gist is g = f m.  Its gradients are
    dm = f dg - (f / s) (dg . m) m / (h s) and dt = (dg . m) / s.  Where the gain is at its limit it is a constant.
    """

    @staticmethod
    def forward(ctx: Any, below: Tensor, rms: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        blocks = below.unflatten(0, (-1, block_size))
        mean = blocks.mean(dim=1, dtype=summing_dtype(below.dtype))
        target = rms.unflatten(0, (-1, block_size)).mean(dim=1)
        size = embedding_rms(mean)
        # The limit keeps the gradient finite where a block's embeddings all but cancel out.
        gain = (target / size).clamp_max(GREATEST_GAIN)
        ctx.save_for_backward(mean, size, gain)
        ctx.block_size, ctx.dtype = block_size, below.dtype
        return (mean * gain.unsqueeze(-1)).to(below.dtype), target

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (of_gist, of_target), (mean, size, gain) = gradients, ctx.saved_tensors
        of_gist = of_gist.to(mean.dtype)
        slope = (torch.linalg.vecdot(of_gist, mean) / size).masked_fill_(gain == GREATEST_GAIN, 0.0)
        share = gain / ctx.block_size
        along = (slope * share / size).unsqueeze(-1)
        of_mean = torch.addcmul(of_gist * share.unsqueeze(-1), mean, along, value=-1.0 / mean.shape[-1])
        of_below = _repeated(of_mean.to(ctx.dtype), ctx.block_size)
        return of_below, _repeated((of_target + slope) / ctx.block_size, ctx.block_size), None


def _repeated(blocks: Tensor, block_size: int) -> Tensor:
    """Return each of `blocks` [n, ...] as often as it has entries: [n K, ...]."""
    return blocks.unsqueeze(1).expand(-1, block_size, *blocks.shape[1:]).flatten(0, 1)
