"""Collects sums on the device through an interval of steps and reduces them once, where all ranks meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext_megatron.config import Settings
from megacontext_megatron.position.gaussian import GaussianRotary
from megacontext_megatron.spans.metadata import base_sigma
from megacontext_megatron.telemetry import names
from megacontext_megatron.telemetry.watching import Moves, Watched

HISTOGRAM_FACTORS = 16
"""How many values stand for the rows of a level in its histogram of sigma."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """What an interval of steps showed: scalars by name, and values for histograms by name (fp32 on the CPU)."""

    scalars: dict[str, float]
    histograms: dict[str, Tensor]


class RowSums:
    """Adds up the row sums of model.losses.row_sums over micro-batches, without leaving the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor]) -> None:
        """Add one micro-batch's sums, fp32 [k, 2] each."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def reduced(self, group: dist.ProcessGroup) -> dict[str, Tensor]:
        """Return the sums over all ranks of `group`, float64 [k, 2] each, and start again; one all-reduce."""
        if not self._sums:
            return {}
        sizes = {name: value.shape[0] for name, value in self._sums.items()}
        flat = torch.cat(list(self._sums.values())).double()
        dist.all_reduce(flat, group=group)
        self._sums = {}
        return dict(zip(sizes, flat.split(list(sizes.values())), strict=True))


class HostCopy:
    """Tensors on their way to the host, which nobody waits for until they are asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._values = {name: value.to("cpu", non_blocking=True) for name, value in tensors.items()}
        self._arrived: torch.cuda.Event | None = None
        if any(value.is_cuda for value in tensors.values()):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> dict[str, Tensor]:
        """Return the tensors on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


def row_scalars(sums: dict[str, Tensor], settings: Settings, variants: Sequence[str], steps: int) -> dict[str, float]:
    """Return the scalars of reduced row sums over `steps` steps; a level or variant without rows gets no name."""
    context = settings.context
    out: dict[str, float] = {names.LOSS.at(): _ratio(sums["level"].sum(dim=0))}
    for level in range(context.max_level + 1):
        total, count = sums["level"][level].tolist()
        if count:
            out[names.LOD_LOSS.at(level=level)] = total / count
        rows, all_rows = sums["rows"][level].tolist()
        out[names.LOD_COUNT.at(level=level)] = rows / steps
        out[names.FRAC_LEVEL.at(level=level)] = rows / all_rows if all_rows else 0.0
    for variant, pair in zip(variants, sums["variant"], strict=True):
        if pair[1]:
            out[names.NLL_LAST.at(H=context.horizon, variant=variant)] = _ratio(pair)
    if len(variants) > 1 and sums["variant"][:, 1].all():
        out[names.ADVANTAGE.at()] = _ratio(sums["variant"][1:].sum(dim=0)) - _ratio(sums["variant"][0])
    out[names.SPAN_WIDTH.at()] = _ratio(sums["width"][0])
    out[names.SHORTENED.at()] = _ratio(sums["shortened"][0])
    out[names.COMPRESSION.at()] = context.source_length / context.window
    return out


def term_scalars(sums: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean of every term of the objective on the last stage, by metric."""
    prefix = "term/"
    return {
        names.TERM.at(name=name.removeprefix(prefix)): _ratio(pairs[0])
        for name, pairs in sums.items()
        if name.startswith(prefix)
    }


def prediction_scalars(sums: dict[str, Tensor]) -> dict[str, float]:
    """Return the metrics of model.prediction.Predicted's sums; what no row predicted gets no name."""
    out: dict[str, float] = {}
    metrics = {"loss": names.PREDICTION_LOSS, "agreement": names.AGREEMENT, "accept": names.ACCEPTED}
    for name, metric in metrics.items():
        for level, pair in enumerate(sums.get(f"predict/{name}", ()), start=1):
            if pair[1]:
                out[metric.at(level=level)] = _ratio(pair)
    if (table := sums.get("predict/by_width")) is not None:
        kinds = len(sums["predict/loss"]) + 1
        for number, pair in enumerate(table):
            level, row_level = divmod(number, kinds)
            if pair[1]:
                out[names.AGREEMENT_FROM.at(level=level + 1, row_level=row_level)] = _ratio(pair)
    return out


def _ratio(pair: Tensor) -> float:
    """Return the mean, 0 of nothing, as Megatron has it."""
    return float(pair[0] / pair[1]) if pair[1] else 0.0


def sigma_table(
    model: Sequence[torch.nn.Module], settings: Settings, shape: tuple[int, int], pipeline: dist.ProcessGroup
) -> Tensor | None:
    """Return the learned factors on sigma of all layers, fp32 [layers, levels, groups], 0 where a layer has none.

    `shape` is the number of layers and of query groups.  None where nothing is learned.  Every pipeline rank must call
    it: one all-reduce over `pipeline`.
    """
    gaussian, levels = settings.gaussian, settings.context.max_level
    if gaussian is None or gaussian.learnable_sigma == "none":
        return None
    num_layers, query_groups = shape
    groups = query_groups if gaussian.learnable_sigma == "head" else 1
    table = torch.zeros(num_layers, levels + 1, groups, device=torch.cuda.current_device())
    for chunk in model:
        for module in chunk.modules():
            rotary = getattr(module, "rotary", None)
            if isinstance(rotary, GaussianRotary) and rotary.sigma_scale is not None:
                table[cast(int, module.layer_number) - 1] = rotary.sigma_scale.all_scales()
    dist.all_reduce(table, group=pipeline)
    return table[:, 1:]


def watched_scalars(watched: Watched) -> dict[str, float]:
    """Return gradient norms by part, and the means of what the first stage saw of gists."""
    out = {names.GRADIENT.at(part=part): math.sqrt(square) for part, square in watched.squares.items()}
    for name, (total, count) in watched.gists.items():
        metric = names.SPREAD.at() if name == "spread" else names.TERM.at(name=name)
        out[metric] = total / count
    for level, moves in enumerate(watched.moves, start=1):
        if moves.rows:
            out[names.OFFSET.at(level=level)] = moves.offset
    return out


def spread_of(watched: Watched) -> float | None:
    """Return the spread of gists, None where none are learned."""
    if "spread" not in watched.gists:
        return None
    total, squares = watched.gists["spread"]
    return total / squares


def sigma_interval(table: Tensor | None, settings: Settings, moves: Sequence[Moves] = ()) -> Interval:
    """Return the sigmas by level: their scalars, and histograms over layers and query groups, in tokens.

    `table` is that of sigma_table, on the CPU.  Where gists move their own spans, `moves` by level, the histograms are
    over gist rows too.
    """
    scalars: dict[str, float] = {}
    histograms: dict[str, Tensor] = {}
    context, gaussian = settings.context, settings.gaussian
    if gaussian is None or not settings.megacontext:
        return Interval(scalars=scalars, histograms=histograms)
    for level in range(1, context.max_level + 1):
        base = base_sigma(torch.tensor(context.block_size**level), gaussian.sigma)
        scales = torch.ones(1) if table is None else table[:, level - 1].flatten()
        sigma = base * scales[scales != 0]
        mean = float(sigma.mean())
        if moves and moves[level - 1].rows:
            mean *= moves[level - 1].factor
            sigma = torch.outer(sigma, moves[level - 1].factors(HISTOGRAM_FACTORS).float()).flatten()
        histograms[names.SIGMA_HISTOGRAM.at(level=level)] = sigma
        scalars[names.SIGMA_MEAN.at(level=level)] = mean
        if table is not None:
            for layer, row in enumerate(table[:, level - 1], start=1):
                if row.all():
                    scalars[names.SIGMA_SCALE.at(layer=layer, level=level)] = float(row.mean())
    return Interval(scalars=scalars, histograms=histograms)
