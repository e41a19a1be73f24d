"""Shapes and random inputs of the rotary groups."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.position.frequencies import RotaryFrequencies, rotary_frequencies

FIRST_TOKEN = 1_000_000_000
"""Where the benchmarked rows begin, in tokens."""

WIDTHS = (1, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Rows by sequences, heads, and the bytes that a rotation counts."""

    rows: int
    batch: int
    query_heads: int = 32
    groups: int = 8
    head_dim: int = 128

    @property
    def name(self) -> str:
        """As performance figures are labelled: rows x sequences."""
        return f"{self.rows}x{self.batch}"

    @property
    def tokens(self) -> int:
        """Rows of all sequences."""
        return self.rows * self.batch

    def head_bytes(self, heads: int, element: int = 2) -> int:
        """Return the bytes of `heads` heads of every row."""
        return self.tokens * heads * self.head_dim * element

    @property
    def qk_bytes(self) -> int:
        """N: the bytes of q and k in half precision."""
        return self.head_bytes(self.query_heads + self.groups)


SHAPES = (Shape(rows=4096, batch=1), Shape(rows=4096, batch=4), Shape(rows=32768, batch=1))
LARGE = frozenset({"4096x4", "32768x1"})
"""The shapes for which ratios have targets; 4096x1 is reported, and partly fits the cache."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random q, k, their gradients, and places of rows: mixed tokens and gists from FIRST_TOKEN on."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 1

    def _random(self, *size: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + seed)
        return torch.randn(*size, generator=generator, device=self.device).to(self.dtype)

    def _heads(self, heads: int, seed: int) -> Tensor:
        return self._random(self.shape.rows, self.shape.batch, heads, self.shape.head_dim, seed=seed)

    @cached_property
    def query(self) -> Tensor:
        """Queries [s, b, np, hn]."""
        return self._heads(self.shape.query_heads, 1)

    @cached_property
    def key(self) -> Tensor:
        """Keys [s, b, ng, hn]."""
        return self._heads(self.shape.groups, 2)

    @cached_property
    def upstream(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of finished q, k and v."""
        return (
            self._heads(self.shape.query_heads, 3),
            self._heads(self.shape.groups, 4),
            self._heads(self.shape.groups, 5),
        )

    @cached_property
    def mixed(self) -> Tensor:
        """Megatron's mixed projection [s, b, ng, (np / ng + 2) hn]."""
        width = (self.shape.query_heads // self.shape.groups + 2) * self.shape.head_dim
        return self._random(self.shape.rows, self.shape.batch, self.shape.groups, width, seed=6)

    @cached_property
    def norm_weights(self) -> tuple[Tensor, Tensor]:
        """Weights [hn] of the query and key norms, around 1."""
        return tuple((1 + 0.1 * self._random(self.shape.head_dim, seed=s).float()).to(self.dtype) for s in (7, 8))  # type: ignore[return-value]

    @cached_property
    def doubled_centre(self) -> Tensor:
        """Twice the centres of consecutive spans, int64 [s, b]."""
        shape = (self.shape.rows, self.shape.batch)
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + 9)
        gist = torch.rand(shape, generator=generator, device=self.device) < 0.3
        width = torch.where(gist, WIDTHS[1], WIDTHS[0])
        return 2 * (FIRST_TOKEN + width.cumsum(0) - width) + width - 1

    @cached_property
    def sigma(self) -> Tensor:
        """Spreads, fp32 [s, b] in tokens, between 0 and 8."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + 10)
        return 8 * torch.rand(self.shape.rows, self.shape.batch, generator=generator, device=self.device)

    @cached_property
    def anchor(self) -> Tensor:
        """A doubled centre in the middle of each sequence, int64 [b]."""
        return self.doubled_centre[self.shape.rows // 2].clone()

    @cached_property
    def frequencies(self) -> RotaryFrequencies:
        """Megatron's frequencies of the head, on the device."""
        return rotary_frequencies(RotaryConfig(head_dim=self.shape.head_dim)).to(self.device)

    def omega(self, *, per_group: bool) -> Tensor:
        """Return frequencies fp32 [1 or ng, r]; those of query groups differ by up to a factor of two."""
        shared = self.frequencies.omega.unsqueeze(0)
        if not per_group:
            return shared.clone()
        return shared * torch.linspace(0.5, 1.0, self.shape.groups, device=self.device).unsqueeze(1)
