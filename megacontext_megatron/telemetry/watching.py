"""What every rank adds up for a report of an interval: gradients of parts, and what the first stage saw of gists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext_megatron.config import Settings
from megacontext_megatron.model.parallel_groups import tensor_parallel_group
from megacontext_megatron.model.parts import TrainableParts
from megacontext_megatron.spans.metadata import GREATEST_LOG_SCALE, SpanMetadata, SpanShift

GIST_SUMS = ("contrast", "pooling", "spread")
"""The sums of model.gist_terms that are reported."""

BINS = 33
"""Of the histogram of factors on sigma, evenly spaced in their logarithm; odd, so that 1 is the middle of one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """By how much gist rows of a level moved: how many `rows`, mean `factor` on sigma, mean |offset| in tokens.

    `histogram` counts rows by factor, float64 [BINS].
    """

    rows: float
    factor: float
    offset: float
    histogram: Tensor

    def factors(self, count: int) -> Tensor:
        """Return `count` factors that stand for the histogram, at evenly spaced shares of the rows."""
        width = 2.0 * GREATEST_LOG_SCALE / BINS
        shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        reached = self.histogram.cumsum(0) / self.histogram.sum()
        chosen = torch.searchsorted(reached, shares).clamp_max(BINS - 1)
        return (-GREATEST_LOG_SCALE + (chosen + 0.5) * width).exp()


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """What an interval showed, the same on every rank.

    `squares` are the squared gradient norms of the interval's last step by part.  `gists` are (sum, count) by name of
    GIST_SUMS, `moves` by level from 1 on; both empty where nothing was heard.
    """

    squares: dict[str, float]
    gists: dict[str, tuple[float, float]]
    moves: list[Moves]


class Watch:
    """Hears of gists on the first stage, and adds everything up over the whole world in one all-reduce."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._gists: Tensor | None = None
        self._moves: Tensor | None = None
        self.parts: TrainableParts | None = None

    def hear_gists(self, sums: dict[str, Tensor]) -> None:
        """Take one training micro-batch's sums on the first stage, [1, 2] each; unknown names are left out."""
        known = torch.cat([sums[name] if name in sums else sums["spread"].new_zeros(1, 2) for name in GIST_SUMS])
        self._gists = known if self._gists is None else self._gists + known

    @torch.no_grad()
    def hear_moves(self, shift: SpanShift, spans: SpanMetadata) -> None:
        """Take how this rank's rows [b, s] of a training micro-batch moved."""
        bins = (shift.log_scale + GREATEST_LOG_SCALE) * (BINS / (2.0 * GREATEST_LOG_SCALE))
        bins = bins.long().clamp(0, BINS - 1).unsqueeze(-1) == torch.arange(BINS, device=shift.offset.device)
        found = []
        for level in range(1, self._settings.context.max_level + 1):
            rows = (spans.level == level).float()
            values = [rows, rows * shift.log_scale.exp(), rows * shift.offset.abs()]
            sums = torch.stack([value.sum() for value in values])
            found.append(torch.cat([sums, (bins * rows.unsqueeze(-1)).sum(dim=(0, 1))]))
        moves = torch.stack(found)
        self._moves = moves if self._moves is None else self._moves + moves

    def reduced(self, model: Sequence[torch.nn.Module], loss_scale: Tensor | None) -> Tensor:
        """Return all sums of the interval over the world, float64 [n], and start again.

        `loss_scale` is what gradients are multiplied by until the optimizer has seen them.  Collective.
        """
        self.parts = self.parts or TrainableParts(model)
        squares = self.parts.squares()
        if loss_scale is not None:
            squares = squares / loss_scale.double().square()
        # Ranks of a tensor-parallel group hear the same.
        copies = tensor_parallel_group().size()
        heard = [
            (torch.zeros(size, dtype=torch.float64, device=squares.device) if sums is None else sums.double().flatten())
            for sums, size in ((self._gists, self._sizes[0]), (self._moves, self._sizes[1]))
        ]
        self._gists = self._moves = None
        flat = torch.cat([squares, *(sums / copies for sums in heard)])
        dist.all_reduce(flat)
        return flat

    @property
    def _sizes(self) -> tuple[int, int]:
        return 2 * len(GIST_SUMS), self._settings.context.max_level * (3 + BINS)

    def unpacked(self, flat: Tensor) -> Watched:
        """Return what `reduced` added up, of its vector on the CPU."""
        assert self.parts is not None
        squares, gists, moves = flat.split([len(self.parts.names), *self._sizes])
        pairs = dict(zip(GIST_SUMS, gists.view(-1, 2).tolist(), strict=True))
        by_level = moves.view(-1, 3 + BINS)
        return Watched(
            squares=dict(zip(self.parts.names, squares.tolist(), strict=True)),
            gists={name: (total, count) for name, (total, count) in pairs.items() if count},
            moves=[_moves_of(sums) for sums in by_level] if by_level.any() else [],
        )


def _moves_of(sums: Tensor) -> Moves:
    rows, factor, offset = sums[:3].tolist()
    return Moves(
        rows=rows,
        factor=factor / rows if rows else 1.0,
        offset=offset / rows if rows else 0.0,
        histogram=sums[3:],
    )
