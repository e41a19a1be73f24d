"""The whole layout matrix against one process, and every fault that it must notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, parity, recording
from tests.parity import (
    CLEARLY,
    COMPARED_STEPS,
    CP,
    DIST_OPT,
    FULL_RECOMPUTE,
    MOE_STEPS,
    ONE,
    PP,
    SELECTIVE_RECOMPUTE,
    STEPS,
    TP,
    TP_SP,
    VPP,
    Layout,
    References,
)

pytestmark = pytest.mark.full

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
EP = {"expert_model_parallel_size": 2}

DENSE = (
    Layout(name="TP2", ranks=2, flags=TP),
    Layout(name="TP2+SP", ranks=2, flags=TP_SP),
    Layout(name="PP2", ranks=2, flags=PP),
    Layout(name="PP2, virtual stages", ranks=2, flags=VPP),
    Layout(name="PP4", ranks=4, flags={"pipeline_model_parallel_size": 4}),
    Layout(name="CP2", ranks=2, flags=CP),
    Layout(name="DP2, distributed optimizer", ranks=2, flags=DIST_OPT),
    Layout(name="DP2, distributed optimizer, overlap", ranks=2, flags=DIST_OPT | OVERLAP),
    Layout(name="TP2xPP2+SP", ranks=4, flags=TP_SP | PP),
    Layout(name="CP2xPP2", ranks=4, flags=CP | PP),
)
RECOMPUTED = tuple(
    dataclasses.replace(layout, name=f"{layout.name}, {how} recompute", flags={**layout.flags, **flags})
    for how, flags, layouts in (
        ("full", FULL_RECOMPUTE, (ONE, *DENSE)),
        ("selective", SELECTIVE_RECOMPUTE, (DENSE[1], DENSE[3], DENSE[5])),
    )
    for layout in layouts
)
OTHER_FAMILIES = (
    Layout(name="windows, CP2", ranks=2, flags=CP, family="windowed"),
    Layout(name="windows, PP2", ranks=2, flags=PP, family="windowed"),
    Layout(name="windows, TP2+SP, full recompute", ranks=2, flags=TP_SP | FULL_RECOMPUTE, family="windowed"),
    Layout(name="sigma by head, TP2", ranks=2, flags=TP, family="head-sigma"),
    Layout(name="sigma by head, TP2+SP, full recompute", ranks=2, flags=TP_SP | FULL_RECOMPUTE, family="head-sigma"),
    Layout(name="log-width bias, TP2", ranks=2, flags=TP, family="log-width"),
    Layout(name="log-width bias, TP2+SP, full recompute", ranks=2, flags=TP_SP | FULL_RECOMPUTE, family="log-width"),
    Layout(name="log-width bias, CP2", ranks=2, flags=CP, family="log-width"),
    Layout(name="documents, PP4", ranks=4, flags={"pipeline_model_parallel_size": 4}, family="documents"),
    Layout(name="documents, CP2", ranks=2, flags=CP, family="documents"),
    Layout(name="documents, DP2", ranks=2, family="documents"),
    Layout(name="loss per token, CP2", ranks=2, flags=CP, family="per-token"),
    Layout(name="loss per token, DP2, distributed optimizer", ranks=2, flags=DIST_OPT, family="per-token"),
)
MOE = (
    Layout(name="EP2", ranks=2, flags=EP, family="moe"),
    Layout(name="EP2, distributed optimizer", ranks=2, flags=EP | DIST_OPT, family="moe"),
    Layout(name="TP2xEP2+SP", ranks=2, flags=TP_SP | EP | {"expert_tensor_parallel_size": 1}, family="moe"),
)

FAULTS = (
    (mutations.next_plan, ONE),
    (mutations.next_plan, DENSE[2]),
    (mutations.neighbouring_gists, ONE),
    (mutations.unshifted_labels, ONE),
    (mutations.repeated_sequence_slice, DENSE[1]),
    (mutations.unmarked_norms, DENSE[1]),
    (mutations.unsummed_positional_gradients, DENSE[0]),
    (mutations.unsummed_positional_gradients, OTHER_FAMILIES[3]),
    (mutations.locally_averaged_loss, Layout(name="documents, CP2", ranks=2, flags=CP, family="documents")),
)

SETTINGS = (
    ("windowed", {"window_size": None, "window_attn_skip_freq": None}),
    ("documents", {"eod_mask_loss": None}),
    ("documents", {"mc_eod_policy": "ignore"}),
    ("per-token", {"calculate_per_token_loss": None}),
    ("moe", {"moe_router_bias_update_rate": 0.0}),
)
"""What a family has over others, taken away."""

POSITIONAL = tuple(
    Layout(name=f"{family}, {name}", ranks=2, flags=flags, family=family)
    for family in ("dense", "head-sigma", "log-width")
    for name, flags in (("TP2+SP, full recompute", TP_SP | FULL_RECOMPUTE), ("CP2", CP))
)
POSITIONAL_TOLERANCE = 1e-4
"""Of a parameter's largest gradient: these are sums over all heads and rows that largely cancel."""

Routing = dict[str, list[str]]


@pytest.mark.parametrize("layout", [*DENSE, *RECOMPUTED, *OTHER_FAMILIES], ids=str)
def test_agrees_with_one_process(references: References, tmp_path: Path, layout: Layout) -> None:
    references.agrees(layout, tmp_path, steps=STEPS if layout in DENSE else COMPARED_STEPS)


@pytest.mark.parametrize("layout", MOE, ids=str)
def test_experts_agree_with_one_process(references: References, tmp_path: Path, layout: Layout) -> None:
    """Losses and norms agree, and every row goes to the same experts in every layer, micro-batch and step."""
    result = references.agrees(layout, tmp_path, steps=MOE_STEPS, before=recording.routing)
    [expected] = references.one_process("moe").values
    whole = beside if layout.flags.get("sequence_parallel") else in_turn
    assert whole(*result.values) == expected


def in_turn(*ranks: Routing) -> Routing:
    """Put the micro-batches of data-parallel ranks in the order of one process."""
    return {layer: [rows for turn in zip(*(rank[layer] for rank in ranks), strict=True) for rows in turn]
            for layer in ranks[0]}  # fmt: skip


def beside(*ranks: Routing) -> Routing:
    """Put the rows of sequence-parallel ranks together."""
    return {layer: ["".join(parts) for parts in zip(*(rank[layer] for rank in ranks), strict=True)]
            for layer in ranks[0]}  # fmt: skip


def test_routing_is_worth_comparing(references: References, tmp_path: Path) -> None:
    """Three layers choose two of four experts, each pair somewhere, and otherwise without centres."""
    [chosen] = references.one_process("moe").values
    assert chosen.keys() == {"2", "3", "4"}
    assert {row for layer in chosen.values() for rows in layer for row in rows} == set("3569ac")
    layout = dataclasses.replace(ONE, family="moe")
    flat = references.train(layout, tmp_path / "mu", steps=1, before=_recorded_without_centres).check()
    assert flat.values[0]["2"][0] != chosen["2"][0]


def _recorded_without_centres() -> Callable[[], Any]:
    mutations.zero_centres()
    return recording.routing()


@pytest.mark.parametrize(
    ("family", "without"), SETTINGS, ids=[f"{family}, {' '.join(without)}" for family, without in SETTINGS]
)
def test_setting_is_worth_comparing(references: References, tmp_path: Path, family: str, without: parity.Flags) -> None:
    """A layout that ignored one of a family's settings would not agree."""
    layout = Layout(name=f"{family} without {', '.join(without)}", family=family, flags=without)
    assert references.compared(layout, tmp_path, steps=COMPARED_STEPS).excess() > CLEARLY


@pytest.mark.parametrize(("fault", "layout"), FAULTS, ids=[f"{fault.__name__}, {layout}" for fault, layout in FAULTS])
def test_fault_is_noticed(references: References, tmp_path: Path, fault: Callable[[], Any], layout: Layout) -> None:
    found = references.compared(layout, tmp_path, steps=COMPARED_STEPS, before=fault)
    assert found.excess() > CLEARLY


def test_recompute_is_what_reads_plans_late(references: References, tmp_path: Path) -> None:
    """The fault that the quick tests show under recompute does no harm without it, so there layers did run twice."""
    found = references.compared(DENSE[2], tmp_path, steps=COMPARED_STEPS, before=mutations.latest_plan)
    assert found.excess() <= 1


@pytest.mark.parametrize("layout", POSITIONAL, ids=str)
def test_positional_gradients_agree(references: References, tmp_path: Path, layout: Layout) -> None:
    """Each rank holds the whole gradient of what is replicated, too small a part of the norm to show there."""
    alone = dataclasses.replace(ONE, family=layout.family)
    one, many = (
        references.train(which, tmp_path / which.name, steps=2, before=recording.positional_gradients).check()
        for which in (alone, layout)
    )
    [expected] = one.values
    assert len(expected) == 2
    worst = max(
        _relative(found[name], right)
        for rank in many.values
        for step, wanted in enumerate(expected)
        for found in [rank[step]]
        for name, right in wanted.items()
    )
    print(f"{layout}: gradients of {len(expected[0])} positional parameters {worst:.1e}")
    assert all(rank[0].keys() == expected[0].keys() for rank in many.values)
    assert worst < POSITIONAL_TOLERANCE


def _relative(found: list[float], right: list[float]) -> float:
    assert max(map(abs, right)) > 0
    return max(abs(x - y) for x, y in zip(found, right, strict=True)) / max(map(abs, right))


def test_rows_scattered_twice_are_refused(references: References, tmp_path: Path) -> None:
    """Half as many rows as the metadata describes cannot go unnoticed."""
    result = references.train(DENSE[1], tmp_path, steps=1, before=mutations.twice_scattered)
    assert result.returncode
    assert "rows of queries, but span metadata for" in result.error
