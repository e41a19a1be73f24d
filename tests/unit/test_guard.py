"""The guard of the training contract: every period must show tokens and gists beyond the recency baseline."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.model.guard import GistGuard
from megacontext_megatron.spans.plan import plan_rows

WINDOW = 6


def small(variants: int) -> ContextConfig:
    """Return a context of 6 rows."""
    return ContextConfig(window=WINDOW, source_length=8, variants=variants, block_size=2, recent_tokens=2, horizon=1)


def levels(*contexts: Sequence[int]) -> Tensor:
    """Return a micro-batch of contexts, each given by the levels that its rows repeat."""
    return torch.tensor([[row[n % len(row)] for n in range(WINDOW)] for row in contexts])


TOKENS, LEVEL1, LEVEL2, MIXED = (0,), (1,), (2,), (1, 0)


@pytest.mark.parametrize(
    ("variants", "batch", "missing"),
    [
        (1, levels(TOKENS, TOKENS), "gist"),
        (1, levels(LEVEL1, LEVEL2), "token"),
        (2, levels(TOKENS, TOKENS), "gist"),
        (2, levels(TOKENS, LEVEL2), "token"),
        (2, levels(MIXED, TOKENS), "gist"),
        (3, levels(TOKENS, TOKENS, TOKENS), "gist"),
        (3, levels(TOKENS, LEVEL1, LEVEL2), "token"),
    ],
)
def test_a_period_of_one_kind_is_refused(variants: int, batch: Tensor, missing: str):
    guard = GistGuard(small(variants), period=1)
    with pytest.raises(RuntimeError, match=f"no {missing} row in 1 micro-batches") as caught:
        guard.count(batch)
    for flag in ("--mc-source-length", "--mc-eod-policy", "--mc-plan"):
        assert flag in str(caught.value)


@pytest.mark.parametrize(
    ("variants", "batch"),
    [
        (1, levels(MIXED)),
        (1, levels(TOKENS, LEVEL2)),
        (2, levels(TOKENS, MIXED)),
        (3, levels(TOKENS, TOKENS, LEVEL1)),
    ],
)
def test_a_period_of_both_kinds_passes(variants: int, batch: Tensor):
    guard = GistGuard(small(variants), period=1)
    for _ in range(3):
        guard.count(batch)


def test_kinds_may_be_in_different_micro_batches_of_a_period():
    guard = GistGuard(small(1), period=3)
    for _ in range(2):
        for batch in (TOKENS, TOKENS, LEVEL1):
            guard.count(levels(batch))


def test_a_period_does_not_help_the_next():
    guard = GistGuard(small(1), period=2)
    guard.count(levels(MIXED))
    guard.count(levels(MIXED))
    guard.count(levels(TOKENS))
    with pytest.raises(RuntimeError, match="no gist row in 2 micro-batches"):
        guard.count(levels(TOKENS))


def test_an_unfinished_period_is_not_judged():
    guard = GistGuard(small(1), period=4)
    for _ in range(3):
        guard.count(levels(TOKENS))


@given(period=st.integers(1, 4), mixes=st.lists(st.sampled_from([TOKENS, LEVEL1, LEVEL2, MIXED]), max_size=12))
def test_guard_agrees_with_a_count_of_each_period(period: int, mixes: list[tuple[int, ...]]):
    guard = GistGuard(small(2), period)
    for n, mix in enumerate(mixes, start=1):
        begin = (n - 1) // period * period
        seen = {level > 0 for other in mixes[begin:n] for level in other}
        if n % period == 0 and len(seen) < 2:
            with pytest.raises(RuntimeError, match=f"no {'token' if True in seen else 'gist'} row in {period} "):
                guard.count(levels(TOKENS, mix))
            return
        guard.count(levels(TOKENS, mix))


@pytest.mark.parametrize("variants", [1, 2, 3])
def test_planned_contexts_pass(variants: int):
    context = small(variants)
    guard = GistGuard(context, period=1)
    for sample in range(8):
        plans = [plan_rows(context, (1, 0, sample, variant)).level for variant in range(variants)]
        guard.count(torch.stack([torch.from_numpy(plan) for plan in plans]))
