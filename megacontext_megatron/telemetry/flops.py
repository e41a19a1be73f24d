"""What gists cost: GistNet's floating-point operations, and Megatron's count of a step made to hold them."""

from __future__ import annotations

import functools
from typing import Any

from megacontext_megatron.config import ContextConfig, GistConfig, Settings

FORWARD_AND_BACKWARD = 3
"""A backward pass multiplies twice for each product of the forward pass, as Megatron counts."""

_MARK = "_megacontext_gists"
_OPERATIONS = 2
"""A multiplication and an addition for each product of two numbers."""


def blocks_by_level(context: ContextConfig) -> tuple[int, ...]:
    """Return how many blocks of each level from 1 on are summed up in a raw sample; none where nothing collapses."""
    below, blocks = context.source_length, []
    for _ in range(context.max_level if context.plan != "recency" else 0):
        below //= context.block_size
        blocks.append(below)
    return tuple(blocks)


def block_flops(gist: GistConfig, block_size: int) -> int:
    """Return the operations of one forward pass of GistNet over one block of `block_size` entries.

    Matrix products alone, as in Megatron's count: the projection of each entry, for itself and for its two neighbours;
    four projections, scores, weighted sums and an MLP of four times the width in each layer; keys, values, scores and
    a sum where a query pools the block; and the heads of the block's one output.
    """
    h, d, k = gist.hidden, gist.hidden_size, block_size
    layer = k * (4 * d * d + 2 * k * d + 8 * d * d)
    pooling = k * (2 * d * d + 2 * d) if gist.pooling == "slot" else 0
    span_head = 2 * d if gist.span_head else 0
    return _OPERATIONS * (k * h * 3 * d + gist.layers * layer + pooling + d * h + span_head)


def gist_flops(settings: Settings, contexts: int) -> int:
    """Return the operations of GistNet in a step of `contexts` working contexts, forward and backward.

    A raw sample is summed up once for all its variants.  What several ranks compute alike counts once.  Mean gists
    have no matrix products and count 0.
    """
    context, gist = settings.context, settings.gist
    if not gist.learned:
        return 0
    blocks = sum(blocks_by_level(context)) * contexts // context.variants
    return FORWARD_AND_BACKWARD * blocks * block_flops(gist, context.block_size)


def install(settings: Settings) -> str:
    """Let Megatron's count of a step's operations hold those of `settings`' gists; returns a sentence that says so.

    Megatron reads the count for its TFLOP/s, and for the operations so far that checkpoints and progress logs hold.
    Installed again, it counts for the new settings alone.
    """
    from megatron.training import training

    count = getattr(training.num_floating_point_operations, _MARK, training.num_floating_point_operations)

    @functools.wraps(count)
    def with_gists(args: Any, batch_size: int, *rest: Any, **keywords: Any) -> float:
        return count(args, batch_size, *rest, **keywords) + gist_flops(settings, batch_size)

    setattr(with_gists, _MARK, count)
    training.num_floating_point_operations = with_gists
    return "operations of a step: GistNet's are counted with the model's"
