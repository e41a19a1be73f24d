"""Terms of the objective that are made of gists alone, on the first stage: contrast and pooling regression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.context.gists import Gists, summing_dtype

MARGIN = 0.2
"""Gists of different blocks should be apart by this much: 1 minus their cosine."""

GistObserver = Callable[[dict[str, Tensor]], None]
"""Receives detached sums by name, fp32 [1, 2] of (sum, count)."""


def detached_gists(levels: list[Gists]) -> list[Gists]:
    """Return the gists without their gradients: a context.assembly.GistControl."""
    return [
        Gists(level.vectors.detach(), level.rms.detach(), None if level.shift is None else level.shift.detach())
        for level in levels
    ]


def contrast(levels: list[Gists], context: ContextConfig) -> tuple[Tensor, int]:
    """Return sum and number, over pairs of gists, of max(0, MARGIN - (1 - cosine)).

    Pairs are of one level and of different blocks that may stand in rows: each with one half the sample away, of the
    next sample where there are several.  A level with one such block has none.
    """
    total, pairs = levels[0].vectors.new_zeros((), dtype=torch.float32), 0
    for number, level in enumerate(levels, start=1):
        gists = level.vectors[context.nodes(number)]
        blocks, samples = gists.shape[:2]
        if blocks * samples < 2:
            continue
        vectors = gists.to(summing_dtype(gists.dtype)).flatten(0, 1)
        others = vectors.roll(blocks // 2 * samples + (samples > 1), dims=0)
        cosine = functional.cosine_similarity(vectors, others, dim=-1)
        total = total + (cosine - (1.0 - MARGIN)).relu().sum()
        pairs += blocks * samples
    return total, pairs


def pooling(gists: Gists, states: Tensor) -> tuple[Tensor, int]:
    """Return sum and number, over level-1 gists [m, b, h], of their mean squared distance from the teacher's states.

    `states` [b, m, h] are a teacher's hidden states, averaged over each block.  Both are scaled to a root mean square
    of 1 over channels, so that the direction counts and the mean is 2 - 2 cosine.
    """
    dtype = summing_dtype(gists.vectors.dtype)
    pair = (gists.vectors.to(dtype), states.transpose(0, 1).to(dtype))
    found, wanted = (functional.rms_norm(each, each.shape[-1:], eps=torch.finfo(dtype).tiny) for each in pair)
    return (found - wanted).square().mean(dim=-1).sum(), found.shape[0] * found.shape[1]


@torch.no_grad()
def spread(gists: Gists) -> Tensor:
    """Return how unlike the directions of gists are, fp32 [1, 2]: squared deviations from their mean, and squares.

    Both are sums over all blocks of the micro-batch, of vectors scaled to a length of 1; the first is exactly 0 where
    all gists are the same.
    """
    vectors = functional.normalize(gists.vectors.float().flatten(0, 1), dim=-1)
    # A mean of equal values may round; that of zeros cannot.
    apart = vectors - vectors[:1]
    apart = apart - apart.mean(dim=0)
    return torch.stack([apart.square().sum(), vectors.square().sum()]).unsqueeze(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GistTerms:
    """Makes the scalar that a RowRequest's `gist_loss` asks for: each term's mean times its weight, times `scale`.

    `weights` is by name; a term of weight 0 is computed for `observe` alone.  `states` [b, C / K, h] are those of the
    teacher, None without any.  `scale` is what makes the gradient of a mean over this micro-batch that of the step's
    loss.
    """

    context: ContextConfig
    weights: dict[str, float]
    scale: Tensor
    states: Tensor | None = None
    observe: GistObserver | None = None

    def __call__(self, levels: list[Gists]) -> Tensor:
        """Return the scalar, and let `observe` hear the detached sums `contrast`, `pooling` and `spread`."""
        sums: dict[str, Tensor] = {}
        loss = torch.zeros((), device=self.scale.device)
        for name, term in self._terms().items():
            weight = self.weights.get(name, 0.0)
            total, count = term(levels if weight else detached_gists(levels))
            if weight and count:
                loss = loss + weight * total.float() / count
            total = total.detach().float()
            sums[name] = torch.stack([total, torch.full_like(total, count)]).unsqueeze(0)
        if self.observe is not None:
            self.observe(sums | {"spread": spread(levels[0])})
        return loss * self.scale

    def _terms(self) -> dict[str, Callable[[list[Gists]], tuple[Tensor, int]]]:
        terms: dict[str, Callable[[list[Gists]], tuple[Tensor, int]]] = {
            "contrast": lambda levels: contrast(levels, self.context)
        }
        states = self.states
        if states is not None:
            terms["pooling"] = lambda levels: pooling(levels[0], states)
        return terms
