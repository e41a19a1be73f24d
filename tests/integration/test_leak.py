"""No row knows of a token behind it, whatever stands for the tokens before: means, learned gists, moved spans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations
from tests.launch import CallResult, call
from tests.parity import FAMILIES, GISTNET, SPAN_HEAD, Flags
from tests.tiny import tiny_flags

SLOT: Flags = {"mc_gist_pooling": "slot"}
VOCABULARY = 256
EXAMPLES = 40
SOURCE_LENGTH = 1016
"""Leaves a remainder that is dropped, an incomplete level-2 block, and makes even the heuristic use level 2."""


def look_for_leaks(flags: list[str], examples: int, before: str | None = None) -> dict[str, Any]:
    """Change single tokens and compare all logits, bit for bit; return how often each kind of row covered one.

    Raises AssertionError where a row that ends at or before the changed token has other logits, or where the row that
    covers the token has the same ones.
    """
    import hypothesis
    from hypothesis import strategies as st

    if before:
        getattr(mutations, before)()
    model, settings = build(flags)
    context = settings.context
    block, newest = context.block_size, context.source_length - 1
    edges = [0, block, block**2, context.dropped_tokens, context.source_length - context.protected_tokens]
    anywhere = st.integers(0, newest)
    at_an_edge = st.builds(
        lambda edge, multiple, step: min(max(edge * multiple + step, 0), newest),
        st.sampled_from(edges),
        st.integers(1, newest // block),
        st.sampled_from([-1, 0, 1]),
    )
    covered: dict[str, int] = {}

    # The message names the token and the rows: there is nothing to shrink.
    once = [hypothesis.Phase.generate]

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=once)
    @hypothesis.given(place=anywhere | at_an_edge, sample=st.integers(0, 3), change=st.integers(1, VOCABULARY - 1))
    def check(place: int, sample: int, change: int) -> None:
        for kind in compare(model, settings, place, sample, change):
            covered[kind] = covered.get(kind, 0) + 1

    check()
    return covered


def build(flags: list[str]) -> tuple[Any, Any]:
    """Return the model of a command line, ready to infer, and its settings."""
    from megacontext_megatron.pretrain import prepare

    prepare(flags)
    # Only now does Megatron's initialisation do without a GPU.
    from megatron.training.training import get_model, initialize_megatron

    from megacontext_megatron.run import Run, parse

    args, settings = parse()
    initialize_megatron()
    [model] = get_model(Run(args, settings).model_provider, wrap_with_ddp=False)
    return model.eval(), settings


def compare(model: Any, settings: Any, place: int, sample: int, change: int) -> list[str]:
    """Change the token at `place` in contexts of all planners; return the planner and level of each row around it."""
    import torch

    text = torch.randint(VOCABULARY, (settings.context.source_length,), generator=torch.manual_seed(sample))
    changed = text.clone()
    changed[place] = (changed[place] + change) % VOCABULARY
    planners, spans = contexts(settings.context, sample)
    with torch.no_grad():
        logits, others = (model_logits(model, tokens, spans) for tokens in (text, changed))
    found = []
    for planner, same, start, end, level in zip(
        planners, (logits == others).all(dim=-1), spans.start, spans.end, spans.level, strict=True
    ):
        before = end <= place
        assert same[before].all(), f"{planner}: rows {(~same & before).nonzero().flatten().tolist()} know token {place}"
        for row in (~before & (start <= place)).nonzero().flatten().tolist():
            assert not same[row], f"{planner}: row {row} does not know token {place}, which it covers"
            found.append(f"{planner} {int(level[row])}")
    return found


def contexts(context: Any, sample: int) -> tuple[list[str], Any]:
    """Return the planners' names and the spans [planners, W] of one sample's contexts."""
    import dataclasses

    import numpy as np
    import torch

    from megacontext_megatron.config import PLANS
    from megacontext_megatron.spans.metadata import SpanMetadata
    from megacontext_megatron.spans.plan import plan_rows

    plans = [plan_rows(dataclasses.replace(context, variants=1, plan=plan), (0, 0, sample, 0)) for plan in PLANS]
    start, level = (torch.from_numpy(np.stack([getattr(plan, name) for plan in plans])) for name in ("start", "level"))
    return list(PLANS), SpanMetadata.of_nodes(start, level, context.block_size)


def model_logits(model: Any, text: Any, spans: Any) -> Any:
    """Return the logits [contexts, W, vocabulary] of contexts over one raw sample."""
    import torch

    rows = spans.start.shape[1]
    mask = torch.ones(rows, rows, dtype=torch.bool).triu(1)[None, None]
    return model(input_ids=text[None], spans=spans, attention_mask=mask)


def search(tmp_path: Path, before: Callable[[], Any] | None = None, **flags: Any) -> CallResult:
    """Run `look_for_leaks` in a rank."""
    context = {"mc_source_length": SOURCE_LENGTH, "mock_data": True, "train_iters": 1}
    given = tiny_flags(strong=True, **{**FAMILIES["dense"], **context, **flags})
    kwargs = {"flags": given, "examples": EXAMPLES, "before": before and before.__name__}
    return call(look_for_leaks, kwargs, workdir=tmp_path)


EVERY_KIND = {f"{planner} {level}" for planner in ("random", "heuristic", "mix") for level in range(3)} | {"recency 0"}


@pytest.mark.parametrize("recent", [32, 8], ids=["long tail", "short tail"])
def test_no_row_knows_a_later_token(tmp_path: Path, recent: int) -> None:
    """For every planner, with rows of levels 0, 1 and 2 around the changed tokens."""
    [covered] = search(tmp_path, mc_recent_tokens=recent, mc_horizon=recent).check().values
    assert covered.keys() == EVERY_KIND


@pytest.mark.parametrize("gists", [GISTNET, SPAN_HEAD, GISTNET | SLOT], ids=["gistnet", "span head", "slot"])
def test_no_row_learns_of_a_later_token_through_gistnet(tmp_path: Path, gists: Flags) -> None:
    """Whose gists are away from the mean, and their spans from where they lie."""
    [covered] = search(tmp_path, mutations.spread_parameters, **gists).check().values
    assert covered.keys() == EVERY_KIND


def test_leak_is_noticed(tmp_path: Path) -> None:
    """A gist that is scaled by all of the sample's tokens tells of later ones."""
    result = search(tmp_path, mutations.leaking_gists)
    assert result.returncode
    assert "know token" in result.log


def test_leak_through_gistnet_is_noticed(tmp_path: Path) -> None:
    """A learned gist that is another block's tells of that block's tokens."""
    result = search(tmp_path, mutations.later_blocks, **GISTNET)
    assert result.returncode
    assert "know token" in result.log
