"""Plans tile the visible history with exactly W aligned rows, the same on every rank and in every run."""

import dataclasses
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext_megatron.config import ConfigError, ContextConfig
from megacontext_megatron.spans.plan import RowPlan, plan_rows, variant_plan

Key = tuple[int, int, int, int]
MIXING = ("random", "heuristic", "mix")

KEYS = st.tuples(
    st.integers(0, 2**31 - 1), st.integers(0, 2), st.integers(0, 2**31 - 1), st.integers(0, 7)
)  # seed, split, sample, variant


def first_protected(context: ContextConfig) -> int:
    """Return the oldest token that may never collapse."""
    edge = context.source_length - context.recent_tokens
    while edge % context.block_size:
        edge -= 1
    return edge


def free_nodes(context: ContextConfig, level: int, dropped: int, ends: Sequence[int] = ()) -> list[int]:
    """Return the nodes of a level that may collapse, found by looking at every token of each of them."""
    width = context.block_size**level
    nodes = []
    for node in range(context.source_length // width if level <= context.max_level else 0):
        tokens = range(node * width, (node + 1) * width)
        crosses = any(end in tokens[:-1] for end in ends)
        if tokens[0] >= dropped and tokens[-1] < first_protected(context) and not crosses:
            nodes.append(node)
    return nodes


def reachable(context: ContextConfig, dropped: int, ends: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Return every (n1, n2) of collapses at level 1 and 2 that leaves exactly W rows."""
    k = context.block_size
    blocks, supers = (len(free_nodes(context, level, dropped, ends)) for level in (1, 2))
    return [
        (n1, n2)
        for n2 in range(supers + 1)
        for n1 in range(blocks - k * n2 + 1)
        if context.source_length - dropped - (k - 1) * n1 - (k * k - 1) * n2 == context.window
    ]


def remainder(context: ContextConfig) -> int:
    """Return the fewest oldest tokens without which whole collapses can leave W rows, by counting."""
    dropped = 0
    while (context.source_length - dropped - context.window) % (context.block_size - 1):
        dropped += 1
    return dropped


@st.composite
def contexts(draw: st.DrawFn, **fixed: Any) -> ContextConfig:
    """Draw a context of few tokens that some plan can satisfy, near and far from its limits alike."""
    k = draw(st.integers(2, 6))
    max_level = draw(st.sampled_from([1, 2, 2, 2]))
    recent = draw(st.integers(1, 2 * k))
    source = k * draw(st.integers(-(-recent // k) + 2, 3 * k + 8))
    dropped = draw(st.integers(0, k - 2))
    eligible = range(-(-dropped // k), (source - recent) // k)
    supers = [n for n in range(source // k**2) if n * k in eligible and n * k + k - 1 in eligible]
    merges = draw(st.integers(1, len(eligible) + (len(supers) if max_level == 2 else 0)))
    settings: dict[str, Any] = {
        "variants": draw(st.integers(1, 3)),
        "plan": draw(st.sampled_from(MIXING)),
        "level2_prob": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "eod_policy": draw(st.sampled_from(["ignore", "no-cross"])),
        "horizon": draw(st.integers(1, recent)),
    } | fixed
    if settings["variants"] > 2 and settings["plan"] == "heuristic":
        settings["plan"] = "mix"
    return ContextConfig(
        window=source - dropped - (k - 1) * merges,
        source_length=source,
        block_size=k,
        max_level=max_level,
        recent_tokens=recent,
        **settings,
    )


def document_ends(context: ContextConfig) -> st.SearchStrategy[np.ndarray]:
    """Draw places of end-of-document tokens, some at the end of blocks, sorted and without repeats."""
    k, c = context.block_size, context.source_length
    anywhere = st.integers(0, c - 1)
    at_edges = st.integers(1, c // k).map(lambda n: n * k - 1)
    return st.sets(anywhere | at_edges, max_size=6).map(lambda places: np.array(sorted(places), dtype=np.int64))


def check_rows(context: ContextConfig, plan: RowPlan, dropped: int) -> None:
    """Assert everything that the rows of any plan must keep, given the tokens it leaves out."""
    k = context.block_size
    assert plan.start.dtype == plan.level.dtype == np.int64
    assert plan.start.shape == plan.level.shape == (context.window,)
    start, level = plan.start.tolist(), plan.level.tolist()
    assert start[0] == dropped
    for row, following in zip(zip(start, level, strict=True), [*start[1:], context.source_length], strict=True):
        assert row[0] + k ** row[1] == following, "a hole, an overlap or an unordered row"
        assert 0 <= row[1] <= context.max_level
        assert row[0] % k ** row[1] == 0
        assert row[1] == 0 or following <= first_protected(context)
    tail = range(context.source_length - context.horizon, context.source_length)
    assert start[-context.horizon :] == list(tail)
    assert not any(level[-context.horizon :])


def gists(plan: RowPlan, level: int) -> list[int]:
    """Return the starts of a level's rows."""
    return plan.start[plan.level == level].tolist()


def rows_of(plan: RowPlan) -> tuple[list[int], list[int]]:
    """Return a plan in a form that can be compared."""
    return plan.start.tolist(), plan.level.tolist()


@given(context=contexts(eod_policy="ignore"), key=KEYS)
def test_rows_tile_the_visible_history(context: ContextConfig, key: Key):
    plan = plan_rows(context, key)
    assert plan.shortened == 0
    if variant_plan(context, key[3]) == "recency":
        check_rows(context, plan, dropped=context.source_length - context.window)
        assert not plan.level.any()
    else:
        check_rows(context, plan, dropped=remainder(context))
        assert plan.level.any()


@given(context=contexts(), key=KEYS, data=st.data())
def test_rows_tile_the_visible_history_whatever_the_documents(context: ContextConfig, key: Key, data: st.DataObject):
    plan = plan_rows(context, key, data.draw(document_ends(context)))
    if variant_plan(context, key[3]) == "recency":
        assert plan.shortened == 0
        check_rows(context, plan, dropped=context.source_length - context.window)
    else:
        check_rows(context, plan, dropped=remainder(context) + plan.shortened)


@given(context=contexts(variants=3), key=KEYS, data=st.data())
def test_last_rows_are_the_same_in_every_variant(context: ContextConfig, key: Key, data: st.DataObject):
    ends = data.draw(document_ends(context))
    plans = [plan_rows(context, (*key[:3], variant), ends) for variant in range(3)]
    tails = [(p.start[-context.horizon :].tolist(), p.level[-context.horizon :].tolist()) for p in plans]
    assert tails[0] == tails[1] == tails[2]


@given(context=contexts(), key=KEYS)
def test_incomplete_first_block_stays_tokens(context: ContextConfig, key: Key):
    plan = plan_rows(context, key, np.array([], dtype=np.int64))
    first, k = int(plan.start[0]), context.block_size
    in_first_block = plan.start < -(-first // k) * k
    assert not plan.level[in_first_block].any()
    in_first_super = plan.start < -(-first // k**2) * k**2
    assert (plan.level[in_first_super] < 2).all()


def every_shape() -> Iterator[dict[str, Any]]:
    for k, most_blocks in ((2, 9), (3, 10), (4, 9), (5, 6)):
        for source in range(0, k * most_blocks + 1, k):
            for window in range(1, source + 2):
                for recent in {1, k, k + 1, 2 * k}:
                    for max_level in (1, 2):
                        yield {
                            "window": window,
                            "source_length": source,
                            "block_size": k,
                            "recent_tokens": recent,
                            "max_level": max_level,
                        }


def test_context_is_accepted_exactly_when_some_collapses_reach_the_window():
    accepted = refused = 0
    for shape in every_shape():
        # The oracle reads settings from an object that has skipped its own checks.
        blank = object.__new__(ContextConfig)
        for name, value in shape.items():
            object.__setattr__(blank, name, value)
        possible = False
        if first_protected(blank) >= 0 and shape["window"] <= shape["source_length"]:
            pairs = reachable(blank, remainder(blank))
            possible = any(pair != (0, 0) for pair in pairs)
        try:
            context = ContextConfig(**shape, horizon=1)
        except ConfigError:
            assert not possible, shape
            refused += 1
        else:
            assert possible, shape
            accepted += 1
            counts = [plan_rows(dataclasses.replace(context, level2_prob=p), (0, 0, 0, 0)).level for p in (0.0, 1.0)]
            fewest, most = min(n2 for _, n2 in pairs), max(n2 for _, n2 in pairs)
            assert [(level == 2).sum() for level in counts] == [fewest, most], shape
    assert min(accepted, refused) > 1000


@given(context=contexts(plan="random", variants=1, eod_policy="ignore"), key=KEYS)
def test_level2_probability_0_and_1_collapse_the_fewest_and_the_most(context: ContextConfig, key: Key):
    possible = [n2 for _, n2 in reachable(context, remainder(context))]
    for probability, expected in ((0.0, min(possible)), (1.0, max(possible))):
        plan = plan_rows(dataclasses.replace(context, level2_prob=probability), key)
        assert len(gists(plan, 2)) == expected


def test_level2_probability_is_the_share_of_collapsed_superblocks():
    context = ContextConfig(window=192, source_length=384, block_size=4, recent_tokens=16, horizon=8, level2_prob=0.25)
    supers, trials = len(free_nodes(context, 2, remainder(context))), 1000
    assert 5 * supers > context.merges > 5 * supers // 2, "the cap may bind, but only far above the mean"
    counts = np.array([len(gists(plan_rows(context, (1, 0, n, 0)), 2)) for n in range(trials)])
    assert abs(counts.mean() - 0.25 * supers) < 5 * np.sqrt(0.25 * 0.75 * supers / trials)


def test_random_plan_prefers_no_block():
    context = ContextConfig(window=64, source_length=128, block_size=4, recent_tokens=16, horizon=8, level2_prob=0.0)
    blocks, trials = free_nodes(context, 1, remainder(context)), 2000
    seen = np.zeros(128)
    for sample in range(trials):
        seen[gists(plan_rows(context, (1, 0, sample, 0)), 1)] += 1
    share = reachable(context, remainder(context))[0][0] / len(blocks)
    frequency = seen[[4 * block for block in blocks]] / trials
    assert seen.sum() == frequency.sum() * trials, "a gist outside the eligible blocks"
    assert np.abs(frequency - share).max() < 5 * np.sqrt(share * (1 - share) / trials)


@given(context=contexts(plan="heuristic", variants=1), key=KEYS, data=st.data())
def test_heuristic_collapses_the_oldest_first(context: ContextConfig, key: Key, data: st.DataObject):
    ends = data.draw(document_ends(context))
    plan = plan_rows(context, key, ends)
    k = context.block_size
    seen = ends.tolist() if context.eod_policy == "no-cross" else []
    supers = [n * k * k for n in free_nodes(context, 2, int(plan.start[0]), seen)]
    assert gists(plan, 2) == supers[: len(gists(plan, 2))]
    covered = {start + n * k for start in gists(plan, 2) for n in range(k)}
    blocks = [n * k for n in free_nodes(context, 1, int(plan.start[0]), seen)]
    blocks = [start for start in blocks if start not in covered]
    assert gists(plan, 1) == blocks[: len(gists(plan, 1))]
    assert rows_of(plan) == rows_of(plan_rows(context, (0, 0, 0, 0), ends)), "age alone decides"


@given(context=contexts(plan="heuristic", variants=1, eod_policy="ignore"))
def test_heuristic_uses_level_2_only_as_far_as_level_1_outweighs_the_tokens(context: ContextConfig):
    def middle_is_light(n1: int, n2: int) -> bool:
        k = context.block_size
        tokens = context.source_length - remainder(context) - k * n1 - k * k * n2
        return k * n1 <= 8 * tokens

    pairs = sorted(reachable(context, remainder(context)), key=lambda pair: pair[1])
    expected = next((pair for pair in pairs if middle_is_light(*pair)), pairs[-1])
    plan = plan_rows(context, (1, 2, 3, 0))
    assert (len(gists(plan, 1)), len(gists(plan, 2))) == expected


def test_heuristic_at_real_sizes_is_coarse_to_fine():
    context = ContextConfig(window=512, source_length=16384, plan="heuristic")
    plan = plan_rows(context, (1, 0, 0, 0))
    after_first_block = plan.level[plan.start >= context.block_size]
    assert (np.diff(after_first_block) <= 0).all()
    assert {0, 1, 2} == set(after_first_block.tolist())
    assert len(gists(plan, 1)) * 32 <= 8 * len(gists(plan, 0))


def test_mix_uses_both_planners():
    context = ContextConfig(
        window=64, source_length=160, block_size=4, recent_tokens=16, horizon=8, plan="mix", level2_prob=0.2
    )
    both = [dataclasses.replace(context, plan=plan) for plan in ("heuristic", "random")]
    chosen = []
    for sample in range(200):
        rows = rows_of(plan_rows(context, (7, 0, sample, 0)))
        candidates = [rows_of(plan_rows(one, (7, 0, sample, 0))) for one in both]
        assert candidates[0] != candidates[1]
        chosen.append(candidates.index(rows))
    assert 70 < sum(chosen) < 130


@given(context=contexts(eod_policy="no-cross"), key=KEYS, data=st.data())
def test_no_gist_crosses_an_end_of_document(context: ContextConfig, key: Key, data: st.DataObject):
    ends = data.draw(document_ends(context))
    plan = plan_rows(context, key, ends)
    for level in (1, 2):
        width = context.block_size**level
        for start in gists(plan, level):
            assert not [end for end in ends.tolist() if start <= end < start + width - 1]


@given(context=contexts(eod_policy="no-cross", variants=1), key=KEYS, data=st.data())
def test_no_cross_leaves_out_as_few_tokens_as_possible(context: ContextConfig, key: Key, data: st.DataObject):
    ends = data.draw(document_ends(context))
    history = context.source_length - context.window
    fewest = next(n for n in range(history + 1) if reachable(context, n, ends.tolist()))
    plan = plan_rows(context, key, ends)
    assert plan.start[0] == fewest
    assert plan.shortened == fewest - remainder(context)


def test_no_cross_collapses_a_block_that_ends_a_document():
    shape: dict[str, Any] = {"window": 9, "source_length": 12, "block_size": 4, "recent_tokens": 8, "horizon": 1}
    context = ContextConfig(**shape, eod_policy="no-cross")
    assert rows_of(plan_rows(context, (1, 0, 0, 0), np.array([3]))) == ([0, *range(4, 12)], [1, *[0] * 8])
    inside = plan_rows(context, (1, 0, 0, 0), np.array([2]))
    assert rows_of(inside) == (list(range(3, 12)), [0] * 9)
    assert inside.shortened == 3


def test_no_cross_with_nothing_to_collapse_is_the_newest_tokens():
    context = ContextConfig(
        window=64, source_length=160, block_size=4, recent_tokens=16, horizon=8, eod_policy="no-cross"
    )
    plan = plan_rows(context, (1, 0, 0, 0), np.arange(160))
    assert rows_of(plan) == (list(range(96, 160)), [0] * 64)
    assert plan.shortened == 96 - context.dropped_tokens


@given(context=contexts(), key=KEYS, data=st.data())
def test_documents_matter_only_under_no_cross(context: ContextConfig, key: Key, data: st.DataObject):
    ignoring, watching = (dataclasses.replace(context, eod_policy=p) for p in ("ignore", "no-cross"))
    free = rows_of(plan_rows(ignoring, key))
    assert rows_of(plan_rows(ignoring, key, data.draw(document_ends(context)))) == free
    assert rows_of(plan_rows(watching, key, np.array([], dtype=np.int64))) == free


WIDE = ContextConfig(window=100, source_length=256, block_size=4, recent_tokens=16, horizon=8, variants=4, plan="mix")
WIDE_KEYS = [
    (seed, split, sample, variant)
    for seed in (1, 2)
    for split in (0, 1, 2)
    for sample in (0, 1, 2**31)
    for variant in (1, 2, 3)
]


def test_ranks_agree_whatever_they_did_before():
    """A rank is a copy of the settings, its own order of calls and its own global random state."""
    expected = {key: rows_of(plan_rows(WIDE, key)) for key in WIDE_KEYS}
    for rank in range(4):
        order = np.random.default_rng(rank).permutation(len(WIDE_KEYS))
        context = pickle.loads(pickle.dumps(WIDE))
        np.random.seed(rank)
        np.random.random(rank)
        assert {WIDE_KEYS[n]: rows_of(plan_rows(context, WIDE_KEYS[n])) for n in order} == expected


def test_planning_leaves_the_global_random_state_alone():
    np.random.seed(5)
    expected = np.random.random(4).tolist()
    np.random.seed(5)
    plan_rows(WIDE, (1, 0, 0, 1))
    assert np.random.random(4).tolist() == expected


def test_numbers_from_a_loader_name_the_same_plan():
    key = np.array([1234, 1, 77, 2])
    assert rows_of(plan_rows(WIDE, tuple(key))) == rows_of(plan_rows(WIDE, tuple(key.tolist())))


def test_every_part_of_the_key_changes_the_plan():
    context = dataclasses.replace(WIDE, plan="random")
    plans = {str(rows_of(plan_rows(context, key))) for key in WIDE_KEYS}
    assert len(plans) == len(WIDE_KEYS)


def test_variant_0_of_several_is_the_recency_baseline():
    for plan in MIXING:
        several = dataclasses.replace(WIDE, plan=plan, variants=2)
        assert [variant_plan(several, v) for v in range(2)] == ["recency", plan]
        assert variant_plan(dataclasses.replace(several, variants=1), 0) == plan
        assert rows_of(plan_rows(several, (1, 0, 0, 0))) == (list(range(156, 256)), [0] * 100)


def test_recency_context_may_be_as_long_as_its_source():
    assert rows_of(plan_rows(ContextConfig.tokens_only(50), (1, 0, 0, 0))) == (list(range(50)), [0] * 50)
    longer = ContextConfig(window=50, source_length=64, block_size=4, recent_tokens=8, horizon=4, plan="recency")
    assert rows_of(plan_rows(longer, (1, 0, 0, 0))) == (list(range(14, 64)), [0] * 50)


RESUMED = ContextConfig(
    window=72,
    source_length=128,
    block_size=4,
    recent_tokens=10,
    horizon=8,
    level2_prob=0.3,
    variants=2,
    plan="mix",
    eod_policy="no-cross",
)
ENDS = np.array([17, 50, 63, 101])
OLDEST = [*range(4, 16, 4), *range(20, 48, 4), *range(52, 84, 4)]
STREAM = [
    ((1, 0, 0, 1), [], [12, 32, 36, 40, 76, 80, 84, 96], [16, 48]),
    ((1, 0, 0, 1), ENDS, [28, 52, 56, 60, 68, 96, 104, 108], [32, 80]),
    ((1234, 0, 7, 1), [], [40, 48, 56], [16, 64, 80]),
    ((1234, 0, 7, 1), ENDS, [4, 8, 12, 20, 24, 28, 56, 60, 64, 68, 76, 80, 84], [32]),
    ((1234, 1, 7, 1), [], [4, 20, 44, 48, 56, 60, 64, 112], [80, 96]),
    ((2**31 - 1, 2, 10**9, 1), [], list(range(4, 76, 4)), []),
    ((2**31 - 1, 2, 10**9, 1), ENDS, OLDEST, []),
]


@pytest.mark.parametrize(("key", "ends", "level1", "level2"), STREAM)
def test_stream_of_plans_never_changes(key: Key, ends: Sequence[int], level1: list[int], level2: list[int]):
    """A resumed run continues with the plans that the interrupted one would have made, in every version."""
    plan = plan_rows(RESUMED, key, np.array(ends, dtype=np.int64))
    assert (int(plan.start[0]), plan.shortened) == (2, 0)
    assert (gists(plan, 1), gists(plan, 2)) == (level1, level2)
