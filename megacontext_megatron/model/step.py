"""The forward step Megatron's loop calls: one micro-batch of working contexts, and the loss of its rows."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megacontext_megatron.attention_config import MEGATRON
from megacontext_megatron.config import ContextConfig, Settings
from megacontext_megatron.data.batch import Batch, BatchLayout, broadcast_batch, next_item
from megacontext_megatron.data.samples import Item
from megacontext_megatron.model.guard import GistGuard
from megacontext_megatron.model.losses import Report, Targets, evaluation_report, row_sums, row_targets, shortened_sums
from megacontext_megatron.model.measures import Measure
from megacontext_megatron.model.objective import TrainingObjective, counted, weighted_mask
from megacontext_megatron.model.parallel_groups import tensor_parallel_group
from megacontext_megatron.model.requests import Lesson, RowOutputs, RowRequest
from megacontext_megatron.model.teaching import Teacher
from megacontext_megatron.spans.context_parallel import slice_rows
from megacontext_megatron.spans.metadata import SpanMetadata, SpanShift

Observer = Callable[[dict[str, Tensor]], None]
LossFunction = Callable[[Tensor | RowOutputs], tuple[Tensor, Tensor, Report]]


def reads_tokens(settings: Settings, vp_stage: int | None) -> bool:
    """Return whether this stage needs the text: the first and the last do, and all do where plans depend on it."""
    return (
        mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        or settings.context.eod_policy == "no-cross"
    )


def needs_mask(args: Namespace, settings: Settings) -> bool:
    """Return whether some layer runs Megatron's dense attention, which must be given a causal mask."""
    own = MEGATRON in settings.attention.backends_of(args.num_layers)
    return own and args.transformer_impl == "local" and args.context_parallel_size == 1


def pipeline_ends(vp_stage: int | None) -> dict[str, bool]:
    """Return whether this stage is the first and the last."""
    return {
        "first": mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "last": mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    }


@dataclass(kw_only=True)
class ForwardStep:
    """Megatron's `forward_step_func` for working contexts; call it with a data iterator and a model.

    `objective` is what training adds to the next-token loss, `teacher` what it learns from.  Of every training
    micro-batch `observe` receives the detached row sums on the last stage, `observe_gists` those of
    model.gist_terms.GistTerms and `observe_moves` how rows moved on the first, and `check` every loss.  `measure` is
    what an evaluation changes and reports.  `per_token_loss` is `--calculate-per-token-loss`, under which Megatron
    divides by all ranks' counts itself.  `timers` is Megatron's, whose `batch-generator` timer it runs.
    """

    settings: Settings
    micro_batch_size: int
    eval_micro_batch_size: int
    needs_mask: bool
    per_token_loss: bool
    timers: Any
    objective: TrainingObjective | None = None
    teacher: Teacher | None = None
    observe: Observer | None = None
    observe_gists: Observer | None = None
    observe_moves: Callable[[SpanShift, SpanMetadata], None] | None = None
    guard: GistGuard | None = None
    measure: Measure | None = None
    check: Callable[[Tensor], None] | None = None
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, data_iterator: Iterator[Item], model: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple[Tensor, LossFunction]:
        """Run one micro-batch; returns the stage's output and the function that reduces it to a loss."""
        if return_schedule_plan:
            raise RuntimeError("--overlap-moe-expert-parallel-comm is not supported")
        vp_stage = cast(int | None, get_attr_wrapped_model(model, "vp_stage"))
        self.timers("batch-generator", log_level=2).start()
        batch = self._next_batch(data_iterator, model, vp_stage)
        self.timers("batch-generator").stop()
        if self.measure is not None:
            batch = self.measure.reordered(batch, self.settings.context)
        spans = self._local_spans(batch)
        targets = None
        if batch.text is not None and batch.mask is not None:
            targets = row_targets(batch.text, batch.mask, spans, self.settings.objective.after_token)
        lesson, request = Lesson(), RowRequest()
        if self.objective is not None and model.training:
            if self.teacher is not None:
                lesson = self.teacher(model, batch, last=pipeline_ends(vp_stage)["last"])
            request = self.objective.request(lesson, self._gist_scale(model, targets), self.observe_gists)
            request = replace(request, observe_moves=self.observe_moves)
        if self.measure is not None:
            request = self.measure.request(self.settings.context, batch.start.device)
        output = self._run(model, batch, spans, targets, request)
        return output, self._loss_function(targets, spans, batch.shortened, lesson, training=model.training)

    def _next_batch(self, iterator: Iterator[Item], model: torch.nn.Module, vp_stage: int | None) -> Batch:
        context = self.settings.context
        layout = BatchLayout(
            micro_batch_size=self.micro_batch_size if model.training else self.eval_micro_batch_size,
            context=context,
            has_text=reads_tokens(self.settings, vp_stage),
            taught=self.teacher.shapes(**pipeline_ends(vp_stage)) if self.teacher and model.training else {},
        )
        item = None
        if mpu.get_tensor_model_parallel_rank() == 0:
            item = next_item(iterator, context.variants)
            if self.guard is not None and model.training:
                self.guard.count(item["level"])
        return broadcast_batch(item, layout, tensor_parallel_group())

    def _gist_scale(self, model: torch.nn.Module, targets: Targets | None) -> Tensor | None:
        """Return what a mean over this micro-batch is multiplied by where it joins the loss on the first stage.

        Megatron has divided the loss by the count and the number of micro-batches before it scales it for its dtype, or
        divides the gradients by all ranks' counts at the end.
        """
        if targets is None:
            return None
        count = targets.mask.sum()
        scale = count if self.per_token_loss else torch.full_like(count, 1.0 / get_num_microbatches())
        scaled = get_model_config(model).grad_scale_func
        return scale if scaled is None else scaled(scale)

    def _local_spans(self, batch: Batch) -> SpanMetadata:
        size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
        start, level = (slice_rows(rows, size, rank) for rows in (batch.start, batch.level))
        return SpanMetadata.of_nodes(start, level, self.settings.context.block_size)

    def _run(
        self,
        model: torch.nn.Module,
        batch: Batch,
        spans: SpanMetadata,
        targets: Targets | None,
        request: RowRequest,
    ) -> Tensor:
        common = {
            "attention_mask": self._mask(batch.start) if self.needs_mask else None,
            "labels": None if targets is None else targets.labels,
            "loss_mask": None if targets is None else targets.mask,
        }
        # Keywords: Megatron's half-precision wrapper casts positional floating-point arguments.
        if self.settings.gaussian is not None:
            tokens = None if batch.text is None else batch.text[:, :-1]
            return model(input_ids=tokens, spans=spans, request=request, **common)
        tokens = None if batch.text is None else batch.text.gather(1, spans.start)
        return model(input_ids=tokens, position_ids=spans.start, **common)

    def _mask(self, start: Tensor) -> Tensor:
        """Return the causal mask that Megatron's dense attention asks for, bool [1, 1, s, s], or [b, 1, s, s] by place.

        `start` [b, s] is that of the rows, which are in order unless a measurement changed it.
        """
        if self.measure is not None and self.measure.permuted:
            return (start.unsqueeze(1) > start.unsqueeze(2)).unsqueeze(1)
        rows = start.shape[1]
        if rows not in self._masks:
            self._masks[rows] = torch.ones(rows, rows, dtype=torch.bool, device=start.device).triu(1)[None, None]
        return self._masks[rows]

    def _loss_function(
        self, targets: Targets | None, spans: SpanMetadata, shortened: Tensor, lesson: Lesson, *, training: bool
    ) -> LossFunction:
        context: ContextConfig = self.settings.context

        def loss_function(outputs: Tensor | RowOutputs) -> tuple[Tensor, Tensor, Report]:
            assert targets is not None
            outputs = RowOutputs(losses=outputs) if isinstance(outputs, Tensor) else outputs
            losses = outputs.losses.float()
            count = targets.mask.sum()
            report = {"lm loss": torch.stack([(losses.detach() * targets.mask).sum(), count])}
            sums = row_sums(losses, targets, spans, context) | shortened_sums(shortened, context)
            terms = {}
            if training and self.objective is not None:
                terms = self.objective.terms(outputs, targets, spans, lesson)
            if not training:
                report |= evaluation_report(sums, context)
                if self.measure is not None:
                    report |= self.measure.of_contexts(outputs, targets, spans, context)
            elif self.observe is not None:
                sums |= outputs.predicted.sums if outputs.predicted is not None else {}
                self.observe(sums | {f"term/{name}": counted(value) for name, (_, value) in terms.items()})
            total = (losses * weighted_mask(targets, spans, self.settings.objective)).sum()
            count = count.to(torch.int)
            if not self.per_token_loss:
                total, count = _over_context_parallel(total, count)
            for weight, value in terms.values():
                # Megatron divides by the count.
                total = total + weight * value * count
            # Last, because it waits for the device, which would idle through what the host enqueues after it.
            if self.check is not None:
                self.check(total)
            return total, count, report

        return loss_function


def _over_context_parallel(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sum and count whose ratio, averaged over context-parallel ranks, is the mean over all their rows.

    Megatron divides by the count it is given and averages over the ranks, which weighs rows unequally where masks
    leave the ranks different numbers of rows.
    """
    size = mpu.get_context_parallel_world_size()
    if size == 1:
        return total, count
    torch.distributed.all_reduce(count := count.clone(), group=mpu.get_context_parallel_group())
    return total * size, count
