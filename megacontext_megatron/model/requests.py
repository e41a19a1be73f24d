"""What a forward is asked for beyond each row's loss, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from megacontext_megatron.context.assembly import GistControl
from megacontext_megatron.context.gists import Gists


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRequest:
    """What to do in a forward of MegaContextGPTModel; the default is each row's loss alone.

    `control` changes which vectors rows get of the gists.  `sigma_factor` scales every spread.  `gist_loss` makes a
    scalar of the gists of all levels, whose gradient is added on the first stage.  `last_rows` [n] numbers this rank's
    rows whose logits are wanted.
    """

    control: GistControl | None = None
    sigma_factor: float = 1.0
    gist_loss: Callable[[list[Gists]], Tensor] | None = None
    last_rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOutputs:
    """Losses of rows [b, s], fp32, and the logits [n, b, vocabulary / TP] of the rows asked for."""

    losses: Tensor
    last_logits: Tensor | None = None


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
