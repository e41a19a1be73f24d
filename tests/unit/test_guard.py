"""The guards of the training contract: rows of both kinds, parts that train, gists that differ."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacontext_megatron.config import ContextConfig, Guards
from megacontext_megatron.context.gists import Gists
from megacontext_megatron.model.gist_terms import spread
from megacontext_megatron.model.guard import GistGuard, TrainingGuard, least_spread
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


@pytest.mark.parametrize("guards", ["warn", "off"])
def test_a_bad_period_may_pass(guards: Guards, capsys: pytest.CaptureFixture[str]):
    guard = GistGuard(small(1), period=1, guards=guards)
    guard.count(levels(TOKENS))
    guard.count(levels(LEVEL1))
    printed = capsys.readouterr().out
    assert printed.count("WARNING: no ") == (2 if guards == "warn" else 0)


def training_guard(guards: Guards = "fatal", **changed: Any) -> TrainingGuard:
    """Return a guard that judges after 10 iterations."""
    return TrainingGuard(**{"guards": guards, "after": 10, "dtype": torch.float32, "scaled": False, **changed})


GOOD = {"gist/answer": 1.0, "position/sigma_scale": 1e-300}


def test_a_healthy_step_passes():
    training_guard().judge(11, GOOD, set(), 0.1)
    training_guard().judge(11, {}, set(), None)


@pytest.mark.parametrize(
    ("squares", "spread", "expected"),
    [
        ({**GOOD, "gist/norm": 0.0}, 0.1, "the gradient of gist/norm is exactly 0 in iteration 11"),
        ({**GOOD, "gist/norm": math.nan}, 0.1, "the gradient of gist/norm is not finite in iteration 11"),
        ({**GOOD, "gist/norm": math.inf}, 0.1, "the gradient of gist/norm is not finite in iteration 11"),
        ({"gist/a": 0.0, "gist/b": 0.0, **GOOD}, 0.1, "the gradient of gist/a, gist/b is exactly 0"),
        (GOOD, 0.0, "all gists point the same way"),
    ],
)
def test_broken_rules_are_named(squares: dict[str, float], spread: float, expected: str):
    with pytest.raises(RuntimeError, match=expected):
        training_guard().judge(11, squares, set(), spread)
    training_guard().judge(10, squares, set(), spread)
    training_guard("off").judge(11, squares, set(), spread)


def test_parts_that_are_not_meant_to_train_need_no_gradient():
    squares = {**GOOD, "gist/spans": 0.0}
    training_guard().judge(11, squares, {"gist/spans"}, 0.1)
    with pytest.raises(RuntimeError, match="gist/spans"):
        training_guard().judge(11, squares, {"gist/answer"}, 0.1)


def test_a_step_without_a_row_that_counts_is_not_judged_where_masks_leave_rows_out():
    nothing = dict.fromkeys(GOOD, 0.0)
    training_guard(sparse=True).judge(11, nothing, set(), 0.1)
    for guard, squares in ((training_guard(), nothing), (training_guard(sparse=True), {**GOOD, "gist/norm": 0.0})):
        with pytest.raises(RuntimeError, match="exactly 0"):
            guard.judge(11, squares, set(), 0.1)


def test_a_search_for_a_loss_scale_may_overflow():
    training_guard(scaled=True).judge(11, {"gist/norm": math.inf}, set(), 0.1)
    with pytest.raises(RuntimeError, match="exactly 0"):
        training_guard(scaled=True).judge(11, {"gist/norm": 0.0}, set(), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gists_are_the_same_up_to_rounding(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(64, generator=generator)
    lengths = torch.rand(20, 2, 1, generator=generator) + 0.1
    same = Gists((direction * lengths).to(dtype), lengths.squeeze(2))
    total, squares = spread(same)[0].tolist()
    assert total / squares <= least_spread(dtype)
    # a tenth of each vector is its own
    other = Gists((direction * lengths + 0.1 * torch.randn(20, 2, 64, generator=generator)).to(dtype), same.rms)
    total, squares = spread(other)[0].tolist()
    assert total / squares > least_spread(dtype)


@pytest.mark.parametrize(("delta", "expected"), [(None, False), (0.01, False), (0.0, True), (-0.01, True)])
def test_only_shuffled_gists_that_are_not_worse_draw_a_warning(
    delta: float | None, expected: bool, capsys: pytest.CaptureFixture[str]
):
    for guards in ("fatal", "warn"):
        assert training_guard(guards).warn_of_shuffled(11, delta) is expected
    assert capsys.readouterr().out.count("WARNING") == 2 * expected
    training_guard().warn_of_shuffled(10, delta)
    training_guard("off").warn_of_shuffled(11, delta)
    assert "WARNING" not in capsys.readouterr().out
