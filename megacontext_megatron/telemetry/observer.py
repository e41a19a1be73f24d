"""The observer of a training run: collects at every micro-batch, reports on every log interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.config import Settings
from megacontext_megatron.model.losses import variant_names
from megacontext_megatron.model.parallel_groups import pipeline_group, row_group
from megacontext_megatron.telemetry.collector import (
    HostCopy,
    Interval,
    RowSums,
    row_scalars,
    sigma_interval,
    sigma_table,
)
from megacontext_megatron.telemetry.sinks import Sinks

SIGMA = "sigma"
"""The name of the table of sigma_table among an interval's row sums."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """An interval that has ended, and what is on its way to the host of it."""

    iteration: int
    consumed_samples: int
    steps: int
    values: HostCopy


class TrainingObserver:
    """Hears of every micro-batch's row sums, and sums them up over ranks when a step's gradients are final.

    That is the one moment of a step at which all pipeline ranks are past their exchanges, so collectives are safe.
    The host does not wait for the sums: they are written at the same moment of the next step, and where the flags say
    that there is none, at once.
    """

    def __init__(self, args: Any, settings: Settings, sinks: Callable[[], Sinks]) -> None:
        self._args, self._settings, self._sinks = args, settings, sinks
        self._rows, self._steps = RowSums(), 0
        self._report: _Report | None = None

    def hear(self, sums: dict[str, Tensor]) -> None:
        """Take one training micro-batch's sums on the last stage."""
        self._rows.add(sums)

    def finalizing(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """Return Megatron's finalize_model_grads followed by a report where one is due."""

        def finalize_and_report(model: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
            finalize(model, *args, **kwargs)
            self.finish()
            self._steps += 1
            iteration = self._args.curr_iteration + 1
            if iteration % self._args.log_interval == 0:
                self._begin_report(model, iteration)
            if self._is_last(iteration):
                self.finish()

        return finalize_and_report

    def finish(self) -> None:
        """Write the report that is still on its way, if there is one."""
        report, self._report = self._report, None
        if report is None:
            return
        settings, values = self._settings, report.values.wait()
        interval = sigma_interval(values.pop(SIGMA, None), settings)
        rows = row_scalars(values, settings, variant_names(settings.context), report.steps)
        self._sinks().write(
            Interval(scalars={**rows, **interval.scalars}, histograms=interval.histograms),
            report.iteration,
            report.consumed_samples,
        )

    @torch.no_grad()
    def _begin_report(self, model: Sequence[torch.nn.Module], iteration: int) -> None:
        table = sigma_table(model, self._settings, self._layers_and_groups(), pipeline_group())
        sums = self._rows.reduced(row_group())
        steps, self._steps = self._steps, 0
        if not sums or self._args.rank != self._args.world_size - 1:
            return
        self._report = _Report(
            iteration=iteration,
            consumed_samples=self._args.consumed_train_samples + self._batch_size(),
            steps=steps,
            values=HostCopy(sums if table is None else {**sums, SIGMA: table}),
        )

    def _is_last(self, iteration: int) -> bool:
        """Return whether the run may end with this step, or resume behind it."""
        args = self._args
        intervals = [args.exit_interval, args.save_interval if args.save else None]
        return iteration == args.train_iters or any(each and iteration % each == 0 for each in intervals)

    def _layers_and_groups(self) -> tuple[int, int]:
        args = self._args
        return args.num_layers, args.num_query_groups if args.group_query_attention else args.num_attention_heads

    def _batch_size(self) -> int:
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

        return get_current_running_global_batch_size()
