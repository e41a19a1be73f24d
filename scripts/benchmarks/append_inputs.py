"""New rows and the pages they go to, for the group of appends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scripts.benchmarks import peers
from scripts.benchmarks.inputs import FIRST_TOKEN, Inputs, Shape

PAGE = 32


@dataclass(frozen=True, kw_only=True)
class Job:
    """New rows at the end of sequences, or in places all over them where `scattered`, and where their pages lie."""

    inputs: Inputs
    scattered: bool = False

    @classmethod
    def of(cls, rows: int, seed: int, device: str = "cuda") -> Job:
        """Return a job of so many rows at the shapes of performance figures."""
        return cls(inputs=Inputs(shape=Shape(rows=rows, batch=1), device=torch.device(device), seed=seed))

    @property
    def shape(self) -> Shape:
        """Rows, sequences and heads."""
        return self.inputs.shape

    @property
    def name(self) -> str:
        """Of its case."""
        rows = f"{self.shape.tokens} row{'s' if self.shape.tokens > 1 else ''}"
        return f"{rows} edited in places" if self.scattered else rows

    @property
    def pages(self) -> int:
        """Pages for each sequence: those of twice as many rows."""
        return 2 * (-(-self.shape.rows // PAGE) + 1)

    def _source(self) -> torch.Generator:
        return torch.Generator(self.inputs.device).manual_seed(self.inputs.seed)

    @cached_property
    def carrier(self) -> Tensor:
        """The spans of tokens and gists one after another, float64 [s, b, 1, 6]."""
        from megacontext_megatron.spans.metadata import SpanMetadata

        drawn = torch.rand(
            self.shape.batch, self.shape.rows, generator=self._source(), device=self.inputs.device, dtype=torch.float64
        )
        level = (drawn < 0.3).long()
        width = 32**level
        return SpanMetadata.of_nodes(FIRST_TOKEN + width.cumsum(1) - width, level, 32).pack("uniform")

    @cached_property
    def index(self) -> Tensor:
        """Numbers of the rows in their sequence, int64 [s, b]."""
        rows, batch = self.shape.rows, self.shape.batch
        if not self.scattered:
            return (PAGE // 2 + torch.arange(rows, device=self.inputs.device))[:, None].repeat(1, batch)
        drawn = torch.rand(self.pages * PAGE, batch, generator=self._source(), device=self.inputs.device)
        return drawn.argsort(0)[:rows].contiguous()

    @cached_property
    def page_table(self) -> Tensor:
        """Pages of every sequence, in no order, int32 [b, pages]."""
        batch = self.shape.batch
        drawn = torch.rand(batch * self.pages, generator=self._source(), device=self.inputs.device)
        return drawn.argsort().view(batch, self.pages).int()

    @property
    def slots(self) -> Tensor:
        """Lines of all pages that rows are stored in, int64 [s b]."""
        page = self.page_table.long().gather(1, (self.index // PAGE).T).T
        return (page * PAGE + self.index % PAGE).flatten()

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [s, b, np, hn], keys and values [s, b, ng, hn] of the projection."""
        return peers.split(self.inputs.mixed, self.shape.head_dim)
