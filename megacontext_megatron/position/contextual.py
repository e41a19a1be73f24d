"""Contextual GRAPE-M: each token advances the phase by a learned step, so that a row's place depends on what it holds.

The step is what the authors' code computes (2512.07805, section 3; llama-mha-grape-m-ctx.py), a sigmoid of a scaled
logit, which its comments call a softplus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from megacontext_megatron.position.parameters import PositionalParameters, SumOverRanks
from megacontext_megatron.spans.metadata import SpanMetadata

INITIAL_LOGIT = -6.907255070523628
"""ln(e^0.001 - 1).  Meant for steps of 0.001, but a sigmoid of a sixteenth of it is 0.394."""


class RowOrder(Protocol):
    """Brings the rows that ranks of a context-parallel group hold into the order of time, and back."""

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return all rows [s cp, b] in order from this rank's [s, b]; gradients are summed over ranks."""
        ...

    def own_rows(self, rows: Tensor) -> Tensor:
        """Return this rank's rows [s, b] from all rows [s cp, b]."""
        ...


class WholeOrder:
    """The order of rows where one rank holds them all."""

    def all_rows(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows

    def own_rows(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextualPlaces:
    """Where steps put rows: `doubled_centre` int64 [s, b] / 2 + `offset` fp32 [s, b], in steps of one token.

    The offset is at most a quarter of a step, so that its fp32 keeps the digits of any place; it alone has gradients.
    `step` fp32 [s, b] is the stretch of each row's span, and `anchor` int64 [b] the doubled centre of the sequence.
    """

    doubled_centre: Tensor
    offset: Tensor
    step: Tensor
    anchor: Tensor


class ContextualSteps(PositionalParameters):
    """Learned steps of one layer: step = sigmoid((x weight + bias) / scale), one for all heads of a row.

    A row of w tokens advances the phase by w steps.  Its place is the middle of that: the sum of what the rows before
    it advance, plus (w - 1) / 2 of its own steps; a centre that a gist has moved by `offset` tokens, so many more.  For
    a single token this is the exclusive prefix sum of the authors.  `weight` starts at 0 and `bias` at INITIAL_LOGIT:
    every step is 0.394, and the rotation plain rope stretched by its inverse.
    """

    def __init__(
        self, hidden_size: int, scale: float, sum_over_ranks: SumOverRanks, order: RowOrder | None = None
    ) -> None:
        super().__init__(sum_over_ranks)
        self.weight, self.bias = self.new_parameter(hidden_size), self.new_parameter(1)
        self.bias.data += INITIAL_LOGIT
        self._scale, self._order = scale, order or WholeOrder()

    def forward(self, hidden: Tensor, spans: SpanMetadata) -> ContextualPlaces:
        """Return the places of rows from the attention's input [s, b, h] and spans [s, b] of this rank's rows.

        With tensor parallelism `hidden` gets the gradient of this rank's heads, which the caller sums over ranks.
        Prefix sums run in float64 over all rows of a sequence in order.
        """
        logit = cast(Tensor, _Product.apply(hidden, self.shared(self.weight))) + self.shared(self.bias)
        step = torch.sigmoid(logit / self._scale)
        wide, width = step.double(), spans.width.double()
        advance = self._order.all_rows(wide * width)
        reached = advance.cumsum(dim=0)
        inside = (width - 1) / 2 if spans.offset is None else (width - 1) / 2 + spans.offset
        place = self._order.own_rows(reached - advance) + wide * inside
        doubled = (2 * place.detach()).round()
        return ContextualPlaces(
            doubled_centre=doubled.long(),
            offset=(place - doubled / 2).float(),
            step=step.float(),
            anchor=reached.detach()[-1].round().long(),
        )


class _Product(torch.autograd.Function):
    """x [s, b, h] times weight [h] in fp32 at least, which keeps x as it is for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return the products [s, b]."""
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(wide) @ weight.to(wide)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the gradients of x and weight, in their dtypes."""
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            of_x = (gradient.unsqueeze(-1) * weight.to(gradient)).to(x.dtype)
            of_weight = x.to(gradient).flatten(0, 1).t() @ gradient.flatten()
        return of_x, of_weight.to(weight.dtype)
