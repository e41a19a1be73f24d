"""Plans: which blocks of a sample's history collapse, so that exactly `window` rows remain.

A plan is a pure function of (seed, split, sample, variant), and under `no-cross` of the places of the sample's
end-of-document tokens, so every rank and every resumed run derives the same rows without communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megacontext_megatron.config import ContextConfig

NEAR_TO_MIDDLE = 8
"""The cold-start heuristic keeps at most this many tokens at level 1 for each token at level 0."""

Draws = NDArray[np.uint64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlan:
    """The rows of one working context in time order.

    `start` is int64 [W] (tokens), `level` int64 [W]; `shortened` counts history tokens that were left out beyond the
    remainder, which happens only under `no-cross`.
    """

    start: Indices
    level: Indices
    shortened: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Room:
    """What may collapse in one sample: node indices per level, and how many merges reach the window."""

    dropped: int
    merges: int
    blocks: Indices
    supers: Indices
    shortened: int


def variant_plan(context: ContextConfig, variant: int) -> Literal["recency", "random", "heuristic", "mix"]:
    """Return the planner of a variant: with several variants the first is the recency baseline."""
    return "recency" if context.variants > 1 and variant == 0 else context.plan


def plan_rows(
    context: ContextConfig,
    key: tuple[int, int, int, int],
    end_of_document: Indices | None = None,
) -> RowPlan:
    """Return the rows of the context that `key` = (seed, split, sample, variant) names.

    `end_of_document` holds the places of EOD tokens among the sample's first C tokens; it is read only under
    `no-cross`.
    """
    planner = variant_plan(context, key[3])
    if planner == "recency":
        start = np.arange(context.source_length - context.window, context.source_length, dtype=np.int64)
        return RowPlan(start=start, level=np.zeros_like(start))
    room = _room(context, end_of_document)
    draws = np.random.Philox(np.random.SeedSequence(key)).random_raw(1 + room.supers.size + room.blocks.size)
    if planner == "mix":
        planner = "heuristic" if draws[0] & 1 else "random"
    choose = _heuristic if planner == "heuristic" else _random
    supers, blocks = choose(context, room, draws[1:])
    return _rows(context, room, supers, blocks)


def _room(context: ContextConfig, end_of_document: Indices | None) -> _Room:
    """Find the fewest dropped tokens with which the window can be reached (ContextConfig checks the common case)."""
    k, c = context.block_size, context.source_length
    last = (c - context.protected_tokens) // k
    free = np.ones(last, dtype=bool)
    free_super = np.full(last // k if context.max_level >= 2 else 0, fill_value=True)
    if context.eod_policy == "no-cross" and end_of_document is not None:
        inside = end_of_document[(end_of_document + 1) % k != 0] // k
        free[inside[inside < last]] = False
        inside = end_of_document[(end_of_document + 1) % (k * k) != 0] // (k * k)
        free_super[inside[inside < free_super.size]] = False
    steps = np.arange(context.merges + 1)
    dropped = context.dropped_tokens + (k - 1) * steps
    blocks_left = _left_from(free, -(-dropped // k))
    supers_left = _left_from(free_super, -(-dropped // (k * k)))
    merges = context.merges - steps
    low = np.maximum(0, merges - blocks_left)
    step = int(np.flatnonzero(low <= np.minimum(supers_left, merges // (k + 1)))[0])
    first_token = int(dropped[step])
    blocks = np.flatnonzero(free)
    supers = np.flatnonzero(free_super)
    return _Room(
        dropped=first_token,
        merges=int(merges[step]),
        blocks=blocks[blocks * k >= first_token],
        supers=supers[supers * k * k >= first_token],
        shortened=first_token - context.dropped_tokens,
    )


def _left_from(free: NDArray[np.bool_], first: Indices) -> Indices:
    """Count the free nodes from each index of `first` on."""
    suffix = np.concatenate([np.cumsum(free[::-1])[::-1], [0]])
    return suffix[np.minimum(first, free.size)]


def _random(context: ContextConfig, room: _Room, draws: Draws) -> tuple[Indices, Indices]:
    """Collapse level-2 blocks with probability `level2_prob`, then random level-1 blocks up to the window."""
    low, high = context.superblock_bounds(room.merges, room.blocks.size, room.supers.size)
    super_draws, block_draws = draws[: room.supers.size], draws[room.supers.size :]
    wanted = int((super_draws.astype(np.float64) < context.level2_prob * 2.0**64).sum())
    supers = room.supers[np.argsort(super_draws, kind="stable")[: min(max(wanted, low), high)]]
    rest = ~np.isin(room.blocks // context.block_size, supers)
    candidates, keys = room.blocks[rest], block_draws[rest]
    needed = room.merges - (context.block_size + 1) * supers.size
    return supers, candidates[np.argsort(keys, kind="stable")[:needed]]


def _heuristic(context: ContextConfig, room: _Room, draws: Draws) -> tuple[Indices, Indices]:
    """Collapse by age alone: oldest at level 2, then level 1, newest as tokens (the cold-start rule)."""
    del draws
    k = context.block_size
    low, high = context.superblock_bounds(room.merges, room.blocks.size, room.supers.size)
    counts = np.arange(low, high + 1)
    middle = (room.merges - (k + 1) * counts) * k
    near = context.source_length - room.dropped - middle - k * k * counts
    balanced = np.flatnonzero(middle <= NEAR_TO_MIDDLE * near)
    supers = room.supers[: counts[balanced[0]] if balanced.size else high]
    candidates = room.blocks[~np.isin(room.blocks // k, supers)]
    return supers, candidates[: room.merges - (k + 1) * supers.size]


def _rows(context: ContextConfig, room: _Room, supers: Indices, blocks: Indices) -> RowPlan:
    """Return the rows left when the given nodes collapse; O(C)."""
    k = context.block_size
    level = np.zeros(context.source_length, dtype=np.int64)
    level[: room.dropped] = -1
    for nodes, width, lod in ((blocks, k, 1), (supers, k * k, 2)):
        level[(nodes[:, None] * width + np.arange(width)).ravel()] = -1
        level[nodes * width] = lod
    start = np.flatnonzero(level >= 0)
    return RowPlan(start=start, level=level[start], shortened=room.shortened)
