"""Measuring a model on held-out contexts in Megatron's own schedule, in any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.datasets.utils import Split
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megacontext_megatron.config import ContextConfig, Settings
from megacontext_megatron.model.datasets import DatasetProvider
from megacontext_megatron.model.measures import Measure
from megacontext_megatron.model.parallel_groups import context_parallel_group, pipeline_group
from megacontext_megatron.model.step import ForwardStep, needs_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class LastRowSums:
    """Loss, counted rows and right predictions of the last H rows of each context, float64 [contexts] on the CPU."""

    loss: Tensor
    count: Tensor
    hits: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurer:
    """Measures `samples` raw samples, one context of each, `micro_batch_size` at a time on each data-parallel rank.

    `raw` is DatasetProvider.held_out's; samples that do not fill a micro-batch on every rank are left out.
    """

    args: Any
    settings: Settings
    datasets: DatasetProvider
    raw: Any
    samples: int
    micro_batch_size: int

    @property
    def steps(self) -> int:
        """How many micro-batches each data-parallel rank takes."""
        return self.samples // (self.micro_batch_size * mpu.get_data_parallel_world_size())

    def __call__(
        self, model: Sequence[torch.nn.Module], context: ContextConfig, measure: Measure | None = None
    ) -> LastRowSums:
        """Return what `measure` tells of the samples under `context`, of one variant, on every rank; collective."""
        settings, size = replace(self.settings, context=context), self.micro_batch_size
        data = self.datasets.contexts(self.raw, context, Split.valid)
        iterators = [iter(self._loader(data)) for _ in model]
        with torch.no_grad(), _measuring(model, settings):
            reports = get_forward_backward_func()(
                forward_step_func=self._forward_step(settings, measure or Measure()).__call__,
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=list(model) if len(model) > 1 else model[0],
                num_microbatches=self.steps,
                seq_length=context.window,
                micro_batch_size=size,
                forward_only=True,
            )
            return self._gathered(cast(list[dict[str, Tensor]], reports))

    def _forward_step(self, settings: Settings, measure: Measure) -> ForwardStep:
        from megatron.training import get_timers

        args = self.args
        return ForwardStep(
            settings=settings,
            micro_batch_size=self.micro_batch_size,
            eval_micro_batch_size=self.micro_batch_size,
            needs_mask=needs_mask(args, settings),
            per_token_loss=args.calculate_per_token_loss,
            timers=get_timers(),
            measure=measure,
        )

    def _loader(self, data: Any) -> Any:
        """Return a data loader over this data-parallel rank's held-out contexts, in Megatron's order."""
        from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

        sampler = MegatronPretrainingSampler(
            total_samples=self.samples,
            consumed_samples=0,
            micro_batch_size=self.micro_batch_size,
            data_parallel_rank=mpu.get_data_parallel_rank(),
            data_parallel_size=mpu.get_data_parallel_world_size(),
        )
        # With a generator of its own, for a loader draws a number when it starts.
        return torch.utils.data.DataLoader(data, batch_sampler=sampler, generator=torch.Generator())

    def _gathered(self, reports: list[dict[str, Tensor]]) -> LastRowSums:
        """Return the sums of all samples in their order, from those of this rank's contexts and rows."""
        ranks, size = mpu.get_data_parallel_world_size(), self.micro_batch_size
        shape = (self.steps, ranks, size, 3)
        whole = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
        if reports:
            own = torch.stack([report["last"] for report in reports]).double()
            dist.all_reduce(own, group=context_parallel_group())
            whole[:, mpu.get_data_parallel_rank()] = own
            dist.all_reduce(whole, group=mpu.get_data_parallel_group())
        dist.broadcast(whole, src=mpu.get_pipeline_model_parallel_last_rank(), group=pipeline_group())
        loss, count, hits = whole.flatten(0, 2).cpu().unbind(dim=1)
        return LastRowSums(loss=loss, count=count, hits=hits)


@contextmanager
def _measuring(model: Sequence[torch.nn.Module], settings: Settings) -> Iterator[None]:
    """Put the model into evaluation mode and under other settings in the block, which may be inside a training step.

    A forward there must not run Megatron's timers, which run already; enter `no_sync`, which a schedule that only runs
    forward does not leave before its frame is collected; or gather parameters ahead, which have been gathered.
    """
    configs = [cast(Any, get_model_config(chunk)) for chunk in model]
    during = {"mc_settings": settings, "timers": None, "no_sync_func": None}
    before = [{name: getattr(config, name) for name in during} for config in configs]
    training = [chunk.training for chunk in model]
    gathering = [chunk for chunk in model if getattr(chunk, "remove_forward_pre_hook_handles", None)]
    for config, chunk in zip(configs, model, strict=True):
        vars(config).update(during)
        chunk.eval()
    for chunk in gathering:
        cast(Any, chunk).disable_forward_pre_hook(param_sync=False)
    try:
        yield
    finally:
        for chunk in gathering:
            cast(Any, chunk).enable_forward_pre_hook()
        for config, chunk, values, was in zip(configs, model, before, training, strict=True):
            vars(config).update(values)
            chunk.train(was)
