"""The observer of a training run: collects at every micro-batch, reports on every log interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from megacontext_megatron.config import Settings
from megacontext_megatron.model.guard import TrainingGuard
from megacontext_megatron.model.losses import variant_names
from megacontext_megatron.model.parallel_groups import pipeline_group, row_group
from megacontext_megatron.telemetry import names
from megacontext_megatron.telemetry.collector import (
    HostCopy,
    Interval,
    RowSums,
    prediction_scalars,
    row_scalars,
    sigma_interval,
    sigma_table,
    spread_of,
    term_scalars,
    watched_scalars,
)
from megacontext_megatron.telemetry.probes import Prober
from megacontext_megatron.telemetry.sinks import Sinks
from megacontext_megatron.telemetry.watching import Watch, Watched

SIGMA = "sigma"
"""The name of the table of sigma_table among an interval's row sums."""

WATCHED = "watched"
"""The name of the vector of Watch.reduced among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """An interval that has ended, and what is on its way to the host of it; `idle` parts were not meant to train."""

    iteration: int
    consumed_samples: int
    steps: int
    values: HostCopy
    probed: dict[str, float]
    idle: set[str]


class TrainingObserver:
    """Hears of every micro-batch's row sums, and sums them up over ranks when a step's gradients are final.

    That is the one moment of a step at which all pipeline ranks are past their exchanges, so collectives are safe,
    probes among them.  The host does not wait for the sums: they are written, and judged by the guards on every rank,
    at the same moment of the next step, and where the flags say that there is none, at once.
    """

    def __init__(
        self,
        args: Any,
        settings: Settings,
        sinks: Callable[[], Sinks],
        prober: Prober,
        idle_parameters: Callable[[], tuple[str, ...]],
    ) -> None:
        """Take also what returns the ends of the names of parameters that are not meant to train at present."""
        self._args, self._settings, self._sinks, self._prober = args, settings, sinks, prober
        self._idle_parameters = idle_parameters
        self._rows, self._steps = RowSums(), 0
        self.watch = Watch(settings)
        self._guard = TrainingGuard(
            guards=settings.watch.guards,
            after=settings.watch.guard_after,
            dtype=args.params_dtype,
            scaled=args.fp16,
            sparse=bool(settings.objective.after_token) or args.eod_mask_loss,
        )
        self._report: _Report | None = None

    def hear(self, sums: dict[str, Tensor]) -> None:
        """Take one training micro-batch's sums on the last stage."""
        self._rows.add(sums)

    def finalizing(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """Return Megatron's finalize_model_grads followed by a report where one is due.

        Raises RuntimeError on every rank where a guard is broken.
        """

        def finalize_and_report(model: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
            finalize(model, *args, **kwargs)
            self._finish_and_judge()
            self._steps += 1
            iteration = self._args.curr_iteration + 1
            probed = self._prober(model) if self._prober.due(iteration) else {}
            if iteration % self._args.log_interval == 0:
                self._begin_report(model, iteration, probed)
            if self._is_last(iteration):
                self._finish_and_judge()

        return finalize_and_report

    def finish(self) -> None:
        """Write the report that is still on its way, if there is one."""
        report, self._report = self._report, None
        if report is not None:
            self._write(report)

    def _finish_and_judge(self) -> None:
        report, self._report = self._report, None
        if report is None:
            return
        watched = self._write(report)
        # Every rank has the same values, so all stop or none.
        if self._logs or self._settings.watch.guards == "fatal":
            self._guard.judge(report.iteration, watched.squares, report.idle, spread_of(watched))
        if self._logs:
            self._guard.warn_of_shuffled(report.iteration, report.probed.get(names.SHUFFLED.at()))

    def _write(self, report: _Report) -> Watched:
        """Write a report on the rank that logs; returns what all ranks watched."""
        settings, values = self._settings, report.values.wait()
        watched = self.watch.unpacked(values.pop(WATCHED))
        if not self._logs:
            return watched
        sigma = sigma_interval(values.pop(SIGMA, None), settings, watched.moves)
        scalars = row_scalars(values, settings, variant_names(settings.context), report.steps)
        scalars |= {**term_scalars(values), **prediction_scalars(values), **watched_scalars(watched)}
        shuffled = report.probed.get(names.SHUFFLED.at())
        verdict = {} if shuffled is None else {names.NOT_WORSE.at(): float(shuffled <= 0.0)}
        scalars |= {**sigma.scalars, **report.probed, **verdict}
        interval = Interval(scalars=scalars, histograms=sigma.histograms)
        self._sinks().write(interval, report.iteration, report.consumed_samples)
        return watched

    @property
    def _logs(self) -> bool:
        return self._args.rank == self._args.world_size - 1

    @torch.no_grad()
    def _begin_report(self, model: Sequence[torch.nn.Module], iteration: int, probed: dict[str, float]) -> None:
        table = sigma_table(model, self._settings, self._layers_and_groups(), pipeline_group())
        sums = self._rows.reduced(row_group())
        values = {WATCHED: self.watch.reduced(model, _loss_scale(model))}
        if self._logs:
            values |= sums if table is None else {**sums, SIGMA: table}
        steps, self._steps = self._steps, 0
        assert self.watch.parts is not None
        self._report = _Report(
            iteration=iteration,
            consumed_samples=self._args.consumed_train_samples + self._batch_size(),
            steps=steps,
            values=HostCopy(values),
            probed=probed,
            idle=self.watch.parts.idle(self._idle_parameters()),
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


def _loss_scale(model: Sequence[torch.nn.Module]) -> Tensor | None:
    """Return what a loss, and so every gradient, is multiplied by."""
    scaled = get_model_config(model[0]).grad_scale_func
    return None if scaled is None else scaled(torch.ones((), device=torch.cuda.current_device()))
