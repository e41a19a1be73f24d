"""Rows, queries and keys on which score biases are compared with their definitions, and the comparison.

Everything is float64, the biases' parameters too, so that only a wrong formula can exceed the tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.parameters import SumOverRanks
from megacontext_megatron.position.score_bias import BiasInputs, ScoreBias
from megacontext_megatron.position.score_biases import build_bias
from tests.sums_over_ranks import alone

HEADS, GROUPS, WIDTH, HIDDEN = 4, 2, 8, 12
LAYERS = (1,)
SHARE = HeadShare(heads=HEADS, groups=GROUPS, width=WIDTH)
TOLERANCE = 1e-11
"""Of sums of some hundred float64 terms of about 1 to 100."""
TOKENS = [1] * 10
GISTS = [1024, 32, 32, 1, 1, 1, 32, 1, 1]


def bias_of(name: Any, share: HeadShare = SHARE, sum_over_ranks: SumOverRanks = alone, **fields: Any) -> ScoreBias:
    """Return a bias of layer 1 as a model makes it."""
    config = BiasConfig(name=name, layers=LAYERS, **fields)
    return build_bias(config, share, sum_over_ranks, hidden_size=HIDDEN, layer_number=1, seed=7)


def precise(bias: ScoreBias, seed: int = 3, size: float = 0.5) -> ScoreBias:
    """Return the bias with float64 parameters, moved away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in bias.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data.double() + size * noise
    return bias


@dataclasses.dataclass(kw_only=True)
class Scene:
    """Rows whose spans follow one another, in `batch` sequences, with random contents that take gradients."""

    widths: Sequence[int]
    batch: int = 2
    heads: int = HEADS
    groups: int = GROUPS
    dtype: torch.dtype = torch.float64
    shift: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        rows = len(self.widths)

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(rows, self.batch, *shape, generator=generator, dtype=torch.float64)
            return drawn.to(self.dtype).requires_grad_()

        self.hidden, self.query, self.key = draw(HIDDEN), draw(self.heads, WIDTH), draw(self.groups, WIDTH)
        width = torch.tensor(self.widths, dtype=torch.int32)
        start = width.cumsum(0) - width + self.shift
        self.width = width[:, None].repeat(1, self.batch)
        self.centre = (start + (width.double() - 1) / 2)[:, None].repeat(1, self.batch).requires_grad_()

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What takes gradients."""
        return {"hidden": self.hidden, "query": self.query, "key": self.key, "centre": self.centre}

    def keys_by_head(self) -> Tensor:
        """Return the keys that each query head reads, [s, b, np, hn]."""
        return self.key.repeat_interleave(self.heads // self.groups, dim=2)

    def scores(self) -> Tensor:
        """Return the scores [b, np, s, s]."""
        return torch.einsum("qbhd,kbhd->bhqk", self.query, self.keys_by_head()) / math.sqrt(WIDTH)

    def part(self, heads: slice, groups: slice) -> Scene:
        """Return the scene of some heads, on the same leaves."""
        part = Scene(widths=self.widths, batch=self.batch, heads=heads.stop - heads.start, dtype=self.dtype)
        part.groups = groups.stop - groups.start
        part.hidden, part.centre, part.width = self.hidden, self.centre, self.width
        part.query, part.key = self.query[:, :, heads], self.key[:, :, groups]
        return part

    def inputs(self, bias: ScoreBias, rows: Tensor | None = None) -> BiasInputs:
        """Return what a bias reads for all queries, or for those of some rows."""
        features = bias.features(self.hidden, self.query, self.key)
        rows = torch.arange(len(self.widths)) if rows is None else rows
        return BiasInputs(
            query=self.query[rows],
            key=self.key,
            scores=self.scores()[:, :, rows],
            rows=rows,
            centre=self.centre,
            width=self.width,
            features=features,
        )

    def of(self, bias: ScoreBias, rows: Tensor | None = None) -> Tensor:
        """Return the bias of all queries, or of those of some rows, [b, np, sq, s], 0 right of the diagonal."""
        value = bias(self.inputs(bias, rows))
        everything = self.batch, self.heads, *value.shape[-2:]
        rows = torch.arange(len(self.widths)) if rows is None else rows
        return value.expand(everything).masked_fill(torch.arange(len(self.widths)) > rows[:, None], 0.0)


def visible(value: Tensor) -> Tensor:
    """Return [..., s, s] with 0 right of the diagonal."""
    return value.tril()


def gradients(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a fixed random mix of `value`; zeros for what it does not depend on."""
    mix = torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad((value * mix).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def assert_is(bias: ScoreBias, scene: Scene, oracle: Callable[[ScoreBias, Scene], Tensor]) -> None:
    """Check a bias and all its gradients against a definition [b, np, s, s], read on and left of the diagonal."""
    names = [*scene.leaves, *(name for name, _ in bias.named_parameters())]
    leaves = [*scene.leaves.values(), *bias.parameters()]
    found, expected = scene.of(bias), visible(oracle(bias, scene))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.expand_as(found), rtol=TOLERANCE, atol=TOLERANCE)
    for name, ours, theirs in zip(names, gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )
