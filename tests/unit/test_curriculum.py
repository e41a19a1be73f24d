"""The curriculum: which stage plans an item, what its contexts cover, and that evaluation is always the last word."""

from __future__ import annotations

import dataclasses
import pickle
from argparse import Namespace
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from megacontext_megatron.config import ConfigError, ContextConfig, CurriculumStage
from megacontext_megatron.data.samples import SampleIdentity, WorkingContextDataset
from megacontext_megatron.model.datasets import ContextPlanner
from megacontext_megatron.model.guard import GistGuard
from megacontext_megatron.objective_arguments import curriculum_stages
from megacontext_megatron.spans.plan import plan_rows, variant_plan
from tests.unit.test_plans import KEYS, Key, check_rows, contexts, document_ends

SEED = 5


def staged(*words: str, **changes: Any) -> tuple[ContextConfig, tuple[CurriculumStage, ...]]:
    """Return a context of 60 rows over 512 tokens, K = 4, and the stages of its curriculum."""
    settings: dict[str, Any] = {
        "window": 60,
        "source_length": 512,
        "variants": 2,
        "block_size": 4,
        "recent_tokens": 8,
        "horizon": 4,
        "level2_prob": 0.5,
    }
    context = ContextConfig(**(settings | changes))
    return context, curriculum_stages(Namespace(mc_curriculum=list(words)), context)


THREE = ("0:64:0", "10:128", "24:512:1.0")
COVERED = {0: 64, 9: 64, 10: 128, 23: 128, 24: 512, 1_000_000: 512}
"""Tokens that the context of an item covers, but for a remainder below K."""


@st.composite
def shortened(draw: st.DrawFn) -> ContextConfig:
    """Draw the context of a stage: one that some plan can satisfy, over a source that is blocks longer."""
    stage = draw(contexts())
    more = stage.block_size * draw(st.integers(0, 3 * stage.block_size))
    try:
        return dataclasses.replace(stage, source_length=stage.source_length + more, history=stage.source_length)
    except ConfigError:
        # Level 2 is aligned to the source, so that fewer of its blocks may fit into the same tokens.
        reject()


def left_out(context: ContextConfig) -> int:
    """Return the oldest tokens that are in no row, by counting."""
    assert context.history is not None
    rest = next(
        n for n in range(context.block_size) if not (context.history - n - context.window) % (context.block_size - 1)
    )
    return context.source_length - context.history + rest


@given(context=shortened(), key=KEYS)
def test_rows_of_a_stage_tile_the_newest_tokens(context: ContextConfig, key: Key):
    """With all that rows of any plan must keep; level 2 is aligned to the source, whatever the stage covers."""
    context = dataclasses.replace(context, eod_policy="ignore")
    plan = plan_rows(context, key)
    assert plan.shortened == 0
    if variant_plan(context, key[3]) == "recency":
        check_rows(context, plan, dropped=context.source_length - context.window)
    else:
        check_rows(context, plan, dropped=left_out(context))
        assert plan.level.any()


@given(context=shortened(), key=KEYS, data=st.data())
def test_rows_of_a_stage_tile_the_newest_tokens_whatever_the_documents(
    context: ContextConfig, key: Key, data: st.DataObject
):
    plan = plan_rows(context, key, data.draw(document_ends(context)))
    if variant_plan(context, key[3]) != "recency":
        check_rows(context, plan, dropped=left_out(context) + plan.shortened)


@given(context=contexts(), key=KEYS)
def test_a_stage_that_covers_all_is_none(context: ContextConfig, key: Key):
    whole = dataclasses.replace(context, history=context.source_length)
    for found, expected in zip(
        dataclasses.astuple(plan_rows(whole, key)), dataclasses.astuple(plan_rows(context, key)), strict=True
    ):
        assert np.array_equal(found, expected)


def covered(planner: ContextPlanner, context: ContextConfig, item: int) -> int:
    """Return the tokens that an item's rows cover."""
    rows = planner((SEED, 0, *divmod(item, context.variants)), None)
    return context.source_length - int(rows["start"][0])


@pytest.mark.parametrize("variants", [1, 2])
def test_the_stage_of_an_item_follows_from_its_number(variants: int):
    """Items are counted as Megatron counts consumed samples; with variants the first is the recency baseline."""
    context, stages = staged(*THREE, variants=variants)
    planner = ContextPlanner(context, stages)
    for item, history in COVERED.items():
        mixed = item if variants == 1 else item | 1
        assert history - (context.block_size - 1) < covered(planner, context, mixed) <= history
        if variants > 1:
            assert covered(planner, context, item & ~1) == context.window


def test_a_stage_begins_with_its_first_item_and_not_before():
    context, stages = staged(*THREE, variants=1)
    planner = ContextPlanner(context, stages)
    assert [covered(planner, context, item) > 64 for item in (8, 9, 10, 11)] == [False, False, True, True]
    assert [covered(planner, context, item) > 128 for item in (22, 23, 24, 25)] == [False, False, True, True]


def test_the_probability_of_level_2_is_the_stages():
    """None at 0, the context's own where the stage gives none, and all that fit at 1."""
    context, stages = staged("0:512:0", "100:512", "200:512:1", variants=1, window=300, level2_prob=0.2)
    planner = ContextPlanner(context, stages)
    counts = [
        [int((planner((SEED, 0, item, 0), None)["level"] == 2).sum()) for item in range(first, first + 100)]
        for first in (0, 100, 200)
    ]
    least, most = context.superblock_bounds(context.merges, *context.eligible())
    assert set(counts[0]) == {least}
    assert set(counts[2]) == {most}
    assert least < sum(counts[1]) / 100 < most
    assert [stage.level2_prob for stage in stages] == [0.0, 0.2, 1.0]


def test_an_earlier_stage_plans_as_a_context_of_its_length_but_for_where_it_lies():
    """So that what is learned there is what a shorter run would learn: rows are those of 64 tokens, moved."""
    context, stages = staged("0:64", variants=1, level2_prob=0.0)
    alone = dataclasses.replace(context, source_length=64)
    key = (SEED, 0, 3, 0)
    found, expected = plan_rows(stages[0].of(context), key), plan_rows(alone, key)
    assert np.array_equal(found.level, expected.level) == (found.start - 448 == expected.start).all()
    assert sorted(found.level.tolist()) == sorted(expected.level.tolist())


def items(context: ContextConfig, stages: Sequence[CurriculumStage], split: int, numbers: Sequence[int]) -> list[Any]:
    """Return rows of a data set's items, as a loader that starts anywhere reads them."""
    identity = SampleIdentity(seed=SEED, split=split, eod=None)
    dataset = WorkingContextDataset(None, context, identity, ContextPlanner(context, stages))
    return [{name: dataset[number][name].tolist() for name in ("start", "level")} for number in numbers]


def test_a_resumed_run_reads_what_the_first_would_have_read():
    context, stages = staged(*THREE)
    whole = items(context, stages, 0, range(30))
    assert items(context, stages, 0, range(11, 30)) == whole[11:]
    assert items(context, stages, 0, [29, 3, 17]) == [whole[29], whole[3], whole[17]]


def test_workers_get_the_stages():
    context, stages = staged(*THREE)
    planner = ContextPlanner(context, stages)
    again = pickle.loads(pickle.dumps(planner))
    for item in COVERED:
        assert covered(again, context, item) == covered(planner, context, item)


def test_a_stage_without_gists_does_not_pass_the_guard():
    """Where documents end inside every block of its history; with documents as long as that it does."""
    context, stages = staged("0:64", "8:512", variants=1, eod_policy="no-cross")
    planner = ContextPlanner(context, stages)
    ends = np.arange(512 - 64, 512, dtype=np.int64)
    cut, whole = (torch.from_numpy(planner((SEED, 0, 0, 0), places)["level"]) for places in (ends, ends[:0]))
    with pytest.raises(RuntimeError, match="no gist row in 1 micro-batches"):
        GistGuard(context, period=1).count(cut.unsqueeze(0))
    GistGuard(context, period=1).count(whole.unsqueeze(0))


def test_rows_are_as_many_in_every_stage():
    context, stages = staged(*THREE)
    assert {len(item["start"]) for item in items(context, stages, 0, range(40))} == {context.window}


class Provided:
    """What a data set provider needs of arguments and settings."""

    def __init__(self, context: ContextConfig, stages: Sequence[CurriculumStage]) -> None:
        self.context, self.curriculum, self.seed = context, tuple(stages), SEED
        self.objective = SimpleNamespace(teacher="none", teacher_path=None)


def test_evaluation_covers_everything_from_the_start():
    from megatron.core.datasets.utils import Split

    from megacontext_megatron.model.datasets import DatasetProvider

    context, stages = staged(*THREE)
    settings: Any = Provided(context, stages)
    provider = DatasetProvider(SimpleNamespace(), settings)
    for split in Split:
        first = provider.contexts(None, context, split)[1]["start"][0]
        history = context.source_length - int(first)
        assert (history <= 64) == (split is Split.train)


def test_an_empty_curriculum_is_the_whole_source():
    context, stages = staged()
    assert stages == ()
    planner = ContextPlanner(context, stages)
    plan = plan_rows(context, (SEED, 0, 4, 1))
    assert torch.equal(torch.from_numpy(plan.start), torch.from_numpy(planner((SEED, 0, 4, 1), None)["start"]))


REFUSED = {
    "no numbers": (["soon:64"], "soon:64", "SAMPLES:TOKENS"),
    "one number": (["0"], "--mc-curriculum 0 ", "SAMPLES:TOKENS"),
    "four numbers": (["0:64:0.1:2"], "0:64:0.1:2", "SAMPLES:TOKENS"),
    "an empty probability": (["0:64:"], "0:64:", "SAMPLES:TOKENS"),
    "a late start": (["10:64"], "begin with a stage at 0 samples, not at 10"),
    "disorder": (["0:64", "20:128", "10:256"], "in order"),
    "the same number twice": (["0:64", "10:128", "10:256"], "each number once"),
    "a sample's variants in two stages": (["0:64", "11:128"], "--mc-variants 2", "at 11"),
    "a negative stage": (["-2:64", "0:128"], "begin with a stage at 0"),
    "part of a block": (["0:66"], "stage of 66 tokens", "--mc-block-size 4"),
    "no more than the window": (["0:60"], "stage of 60 tokens", "--seq-length 60"),
    "more than the source": (["0:516"], "stage of 516 tokens", "--mc-source-length 512"),
    "a probability above 1": (["0:64:1.5"], "stage of 64 tokens", "--mc-level2-prob 1.5"),
    "a probability that is none": (["0:64:nan"], "stage of 64 tokens", "--mc-level2-prob nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_stages_that_cannot_be_are_refused_by_name(case: str):
    words, *parts = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        staged(*words)
    message = str(caught.value)
    assert message.startswith("--mc-curriculum")
    assert message.endswith(".")
    for part in parts:
        assert part in message


def test_a_stage_that_no_plan_can_satisfy_is_refused():
    """Though contexts over the whole source can be planned."""
    with pytest.raises(ConfigError, match=r"--mc-curriculum stage of 72 tokens: .* leaves nothing to collapse"):
        staged("0:72", "10:128", window=70, source_length=128, recent_tokens=60)


def test_a_curriculum_of_tokens_alone_is_refused():
    with pytest.raises(ConfigError, match="--mc-curriculum has no effect with --mc-plan recency"):
        staged("0:64", plan="recency", variants=1)


def test_a_probability_that_no_plan_reads_is_refused():
    with pytest.raises(ConfigError, match=r"--mc-curriculum 0:64:0.5 .*--mc-plan heuristic"):
        staged("0:64:0.5", plan="heuristic")
    assert staged("0:64", plan="heuristic")[1][0].history == 64
