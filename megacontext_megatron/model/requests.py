"""What a forward is asked for beyond each row's loss, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from megacontext_megatron.context.assembly import GistControl
from megacontext_megatron.context.gists import Gists
from megacontext_megatron.model.prediction import Predicted
from megacontext_megatron.spans.metadata import SpanMetadata, SpanShift


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRequest:
    """What to do in a forward of MegaContextGPTModel; the default is each row's loss alone.

    `control` changes which vectors rows get of the gists.  `sigma_factor` scales every spread.  `gist_loss` makes a
    scalar of the gists of all levels, whose gradient is added on the first stage.  `last_rows` [n] numbers this rank's
    rows whose logits are wanted.  `predict` asks rows for the gists that come.  `teach` asks for a Lesson instead of
    RowOutputs.  `observe_moves` hears by how much rows move on the first stage.
    """

    control: GistControl | None = None
    sigma_factor: float = 1.0
    gist_loss: Callable[[list[Gists]], Tensor] | None = None
    last_rows: Tensor | None = None
    predict: bool = False
    teach: bool = False
    observe_moves: Callable[[SpanShift, SpanMetadata], None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOutputs:
    """Losses of rows [b, s], fp32, the logits [n, b, vocabulary / TP] of the rows asked for, what rows predicted."""

    losses: Tensor
    last_logits: Tensor | None = None
    predicted: Predicted | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What a teacher says of a micro-batch's raw samples; None for what nobody learns from.

    `logits` [n, b / V, v] are those of the n rows `rows` of this rank, among the last H, over the v entries of this
    rank's part of the vocabulary; `states` [b / V, C / K, h] are final hidden states, averaged over each block.
    """

    rows: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None


class AttachedLoss(torch.autograd.Function):
    """Passes rows on, and lets the gradient of a scalar join theirs: how a first stage adds to the objective."""

    @staticmethod
    def attach(rows: Tensor, loss: Tensor) -> Tensor:
        """Return the rows; in the backward `loss` gets the gradient 1."""
        return cast(Tensor, AttachedLoss.apply(rows, loss))

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Tensor) -> Tensor:
        """Return the rows."""
        ctx.like = loss
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the rows' gradient, and 1."""
        return gradient, torch.ones_like(ctx.like)
