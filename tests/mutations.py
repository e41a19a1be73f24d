"""Faults and changed settings, put into the package in a rank before its training starts.

Each function is a ``before`` hook of ``tests.launch.train``.  A fault here is one that a layout could really have, so
a comparison that does not notice it proves nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.spans.metadata import SpanMetadata


def spread_parameters() -> None:
    """Start what starts at 0 away from it: positional parameters, at other values in each layer, and GistNet's answers.

    Gists are then about as much the answer as the mean of their block.
    """
    from megacontext_megatron.context.gistnet import BlockEncoder
    from megacontext_megatron.position.clex import ClexFrequencies
    from megacontext_megatron.position.parameters import PositionalParameters

    largest = itertools.count(6)
    real = BlockEncoder.initialise

    def spread(self: PositionalParameters, size: int) -> torch.nn.Parameter:
        # an exponent of frequencies would leave no digits of their phases
        gain = 0.01 if isinstance(self, ClexFrequencies) else 1.0
        return torch.nn.Parameter(gain * torch.linspace(next(largest) / 10, -0.4, size))

    @torch.no_grad()
    def initialise(self: BlockEncoder, seed: int) -> None:
        real(self, seed)
        for last, gain in ((self.answer, 8.0), (self.spans, 1.0)):
            if last is not None:
                values = torch.arange(last.weight.numel()).sin().view(last.weight.shape)
                last.weight.copy_(values * gain * last.in_features**-0.5)

    PositionalParameters.new_parameter = spread
    BlockEncoder.initialise = initialise


def shifted_starts(offset: int) -> None:
    """Let the layers see every row `offset` tokens later in the document."""
    _carry(lambda spans: dataclasses.replace(spans, start=spans.start + offset))


def zero_centres() -> None:
    """Put every row at the same place."""
    SpanMetadata.doubled_centre = property(lambda self: torch.zeros_like(self.start))  # type: ignore[assignment]


def zero_sigma() -> None:
    """Let gists be as sharp as tokens."""
    from megacontext_megatron.spans import metadata

    metadata.base_sigma = lambda width, rule: torch.zeros_like(width, dtype=torch.float32)


def next_plan() -> None:
    """Let the layers see the places of the next micro-batch's rows."""
    from megacontext_megatron.model.step import ForwardStep

    real = ForwardStep._next_batch
    ahead: dict[int | None, Any] = {}
    following: list[SpanMetadata] = []

    def look_ahead(self: ForwardStep, iterator: Any, model: torch.nn.Module, vp_stage: int | None) -> Any:
        batch = ahead.get(vp_stage) or real(self, iterator, model, vp_stage)
        ahead[vp_stage] = real(self, iterator, model, vp_stage)
        following[:] = [self._local_spans(ahead[vp_stage])]
        return batch

    ForwardStep._next_batch = look_ahead
    _carry(lambda _: following[0])


def latest_plan() -> None:
    """Let the layers read the newest places handed to the model, instead of those that came with their input."""
    from megacontext_megatron.attention.self_attention import SpanSelfAttention

    real = SpanSelfAttention.forward
    latest: list[Tensor] = []

    def keep(spans: SpanMetadata) -> SpanMetadata:
        latest[:] = [spans.pack("uniform")]
        return spans

    def read_late(self: SpanSelfAttention, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **{**kwargs, "rotary_pos_emb": latest[0]})

    _carry(keep)
    SpanSelfAttention.forward = read_late


def swapped_context_slices() -> None:
    """Give each context-parallel rank the places of another rank's rows."""
    from megacontext_megatron.model import step

    real_spans, real_slice = step.ForwardStep._local_spans, step.slice_rows
    others: list[SpanMetadata] = []

    def both(self: step.ForwardStep, batch: Any) -> SpanMetadata:
        step.slice_rows = lambda rows, size, rank: real_slice(rows, size, size - 1 - rank)
        others[:] = [real_spans(self, batch)]
        step.slice_rows = real_slice
        return real_spans(self, batch)

    step.ForwardStep._local_spans = both
    _carry(lambda _: others[0])


def repeated_sequence_slice() -> None:
    """Give every sequence-parallel rank the first rank's rows."""
    _scatter(lambda real, rows, group: real(rows.chunk(group.size())[0].repeat(group.size(), 1, 1), group=group))


def twice_scattered() -> None:
    """Scatter rows over sequence-parallel ranks that are scattered already."""
    _scatter(lambda real, rows, group: real(real(rows, group=group), group=group))


def neighbouring_gists() -> None:
    """Take each gist's row from the block after its own."""
    from megacontext_megatron.context import assembly

    real = assembly.entry_index

    def shifted(starts: Tensor, levels: Tensor, source_length: int, block_size: int) -> Tensor:
        return real(starts, levels, source_length, block_size) + (levels > 0).long()

    assembly.entry_index = shifted


def leaking_gists() -> None:
    """Scale gists by all of a sample's tokens, later ones included."""
    from megacontext_megatron.model.gpt import MegaContextGPTModel

    real = MegaContextGPTModel.gister

    def leaking(below: Tensor, rms: Tensor, block_size: int) -> Any:
        return real(below, rms.mean(dim=0, keepdim=True).expand_as(rms), block_size)

    MegaContextGPTModel.gister = staticmethod(leaking)


def unshifted_labels() -> None:
    """Ask each row for the last token that it covers itself."""
    from megacontext_megatron.model import step

    real = step.row_targets
    step.row_targets = lambda text, *rest: real(text.roll(1, dims=1), *rest)


def locally_averaged_loss() -> None:
    """Divide the loss by the number of targets that one context-parallel rank happens to hold."""
    from megacontext_megatron.model import step

    step._over_context_parallel = lambda total, count: (total, count)


def unsummed_positional_gradients() -> None:
    """Leave a positional parameter's gradient at what one tensor-parallel rank's heads give."""
    from megacontext_megatron.attention import self_attention

    self_attention.copy_to_tensor_model_parallel_region = lambda value, group: value


def unsummed_gist_gradients() -> None:
    """Leave the gradients of GistNet at what one tensor-parallel rank's share of the blocks gives."""
    from megacontext_megatron import run

    run.sum_partial_gradients = lambda model, attribute: None


def unsummed_gists() -> None:
    """Give a context-parallel rank's blocks the gradients of its own rows alone."""
    from megacontext_megatron.context import block_groups

    real = block_groups.gather_from_sequence_parallel_region

    def gather(results: Tensor, *, group: Any, tensor_parallel_output_grad: bool = False) -> Tensor:
        return real(results, tensor_parallel_output_grad=False, group=group)

    block_groups.gather_from_sequence_parallel_region = gather


def neighbouring_blocks() -> None:
    """Let GistNet read the block before the one whose gist it makes."""
    from megacontext_megatron.context.block_groups import BlockGroups

    real = BlockGroups.own
    BlockGroups.own = lambda self, blocks: real(self, blocks.roll(1, dims=0))


def later_blocks() -> None:
    """Let GistNet, away from the mean, also read the block after the one whose gist it makes."""
    from megacontext_megatron.context.block_groups import BlockGroups

    spread_parameters()
    real = BlockGroups.own
    BlockGroups.own = lambda self, blocks: real(self, blocks + 0.5 * blocks.roll(-1, dims=0))


def swapped_shares() -> None:
    """Give every tensor-parallel rank the other's share of the blocks, in a group of two."""
    from megacontext_megatron.context import block_groups

    real = block_groups.scatter_to_sequence_parallel_region

    def scatter(blocks: Tensor, *, group: Any) -> Tensor:
        return real(torch.cat(blocks.chunk(2)[::-1]), group=group)

    block_groups.scatter_to_sequence_parallel_region = scatter


def unsummed_moves() -> None:
    """Leave the gradients of moved spans at what one tensor-parallel rank's heads give."""
    from megacontext_megatron.model.gpt import MegaContextGPTModel

    MegaContextGPTModel._sum_over_ranks = lambda self, value: value


def fixed_spans() -> None:
    """Leave every span where it lies, whatever GistNet says."""
    from megacontext_megatron.context import assembly

    assembly._shift_of = lambda *args: None


def unmarked_norms() -> None:
    """Leave the gradients of norms at what one sequence-parallel rank's rows give."""
    from megacontext_megatron.attention.norm import PortableNorm

    real = PortableNorm.__new__

    def unmarked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        return real(cls, whole, *args, **kwargs)

    PortableNorm.__new__ = unmarked


def _carry(change: Callable[[SpanMetadata], SpanMetadata]) -> None:
    """Let the carrier hold changed metadata; rows, labels and losses keep their own."""
    from megacontext_megatron.model.carrier import SpanCarrier

    real = SpanCarrier.carrying

    def carrying(self: SpanCarrier, spans: SpanMetadata, *rest: Any, **more: Any) -> Any:
        return real(self, change(spans), *rest, **more)

    SpanCarrier.carrying = carrying


def _scatter(change: Callable[..., Tensor]) -> None:
    """Change how the first stage's rows are scattered over sequence-parallel ranks."""
    from megacontext_megatron.model import gpt

    real = gpt.scatter_to_sequence_parallel_region
    gpt.scatter_to_sequence_parallel_region = lambda rows, group: change(real, rows, group)
