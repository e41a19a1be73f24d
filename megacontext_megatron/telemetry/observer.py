"""The observer of a training run: collects at every micro-batch, reports at every log interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.config import Settings
from megacontext_megatron.model.losses import variant_names
from megacontext_megatron.model.parallel_groups import pipeline_group, row_group
from megacontext_megatron.telemetry.collector import Interval, RowSums, row_scalars, sigma_interval, sigma_table
from megacontext_megatron.telemetry.sinks import Sinks


class TrainingObserver:
    """Hears of every micro-batch's row sums, and reports when a step's gradients are final.

    That is the one moment of a step at which all pipeline ranks are past their exchanges, so collectives are safe.
    """

    def __init__(self, args: Any, settings: Settings, sinks: Callable[[], Sinks]) -> None:
        self._args, self._settings, self._sinks = args, settings, sinks
        self._rows, self._steps = RowSums(), 0

    def hear(self, sums: dict[str, Tensor]) -> None:
        """Take one training micro-batch's sums on the last stage."""
        self._rows.add(sums)

    def finalizing(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """Return Megatron's finalize_model_grads followed by a report where one is due."""

        def finalize_and_report(model: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
            finalize(model, *args, **kwargs)
            self._steps += 1
            iteration = self._args.curr_iteration + 1
            if iteration % self._args.log_interval == 0:
                self._report(model, iteration)

        return finalize_and_report

    @torch.no_grad()
    def _report(self, model: Sequence[torch.nn.Module], iteration: int) -> None:
        settings = self._settings
        table = sigma_table(model, settings, self._args.num_layers, pipeline_group())
        sums = self._rows.reduced(row_group())
        steps, self._steps = self._steps, 0
        if not sums or self._args.rank != self._args.world_size - 1:
            return
        interval = sigma_interval(table, settings)
        rows = row_scalars(sums, settings, variant_names(settings.context), steps)
        consumed = self._args.consumed_train_samples + self._batch_size()
        self._sinks().write(
            Interval(scalars={**rows, **interval.scalars}, histograms=interval.histograms), iteration, consumed
        )

    def _batch_size(self) -> int:
        from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

        return get_current_running_global_batch_size()
