"""Gists: one embedding that stands for a complete block of tokens, or of lower gists."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

GREATEST_GAIN = 1024.0
"""An average is scaled up by at most this factor; that of 1024 unrelated embeddings needs 32."""


class Gister(Protocol):
    """Makes the next level from a level: the replaceable part of working-context assembly."""

    def __call__(self, below: Tensor, rms: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Return gists [n / K, b, h] of `below` [n, b, h], and the mean RMS of their tokens' embeddings [n / K, b].

        `rms` [n, b] is that mean for each entry of `below`.  A gist may depend on nothing outside its block.
        """
        ...


def embedding_rms(embeddings: Tensor) -> Tensor:
    """Return the root mean square over channels, fp32 [n, b], of embeddings [n, b, h]."""
    # The square root has no gradient at 0.
    return embeddings.float().square().mean(dim=-1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


def mean_gists(below: Tensor, rms: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Average each block and scale the average so that its RMS is the mean RMS of its own tokens' embeddings.

    Shapes as in Gister.  The scale reads the block alone, so no row learns of a later token.
    """
    n, batch, hidden = below.shape
    mean = below.float().view(n // block_size, block_size, batch, hidden).mean(dim=1)
    target = rms.view(n // block_size, block_size, batch).mean(dim=1)
    # The floor keeps the gradient finite where a block's embeddings all but cancel out.
    scale = target / torch.maximum(embedding_rms(mean), target / GREATEST_GAIN)
    return (mean * scale.unsqueeze(-1)).to(below.dtype), target
