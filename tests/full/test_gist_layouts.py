"""Learned gists in every layout against one process: losses, gradients, replicas, and the faults to be noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, recording
from tests.parity import (
    CLEARLY,
    COMPARED_STEPS,
    CP,
    DIST_OPT,
    FULL_RECOMPUTE,
    LOSS_TOLERANCE,
    ONE,
    PP,
    SELECTIVE_RECOMPUTE,
    STEPS,
    TP,
    TP_SP,
    VPP,
    Flags,
    Layout,
    References,
)
from tests.small import largest

pytestmark = pytest.mark.full

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def spread_over(name: str, ranks: int, *flags: Flags, family: str = "gistnet") -> Layout:
    """Return a layout of a family."""
    merged = {key: value for each in flags for key, value in each.items()}
    return Layout(name=f"{family}, {name}", ranks=ranks, flags=merged, family=family)


GISTNET = (
    spread_over("TP2", 2, TP),
    spread_over("TP2+SP", 2, TP_SP),
    spread_over("PP2", 2, PP),
    spread_over("PP2, virtual stages", 2, VPP),
    spread_over("CP2", 2, CP),
    spread_over("TP2xCP2+SP", 4, TP_SP, CP),
    spread_over("DP2, distributed optimizer, overlap", 2, DIST_OPT, OVERLAP),
    spread_over("TP2xDP2+SP, distributed optimizer, overlap", 4, TP_SP, DIST_OPT, OVERLAP),
    spread_over("TP2xPP2+SP", 4, TP_SP, PP),
    spread_over("CP2xPP2", 4, CP, PP),
    spread_over("full recompute", 1, FULL_RECOMPUTE),
    spread_over("TP2+SP, full recompute", 2, TP_SP, FULL_RECOMPUTE),
    spread_over("PP2, virtual stages, full recompute", 2, VPP, FULL_RECOMPUTE),
    spread_over("CP2, full recompute", 2, CP, FULL_RECOMPUTE),
    spread_over("TP2+SP, selective recompute", 2, TP_SP, SELECTIVE_RECOMPUTE),
    spread_over("CP2, selective recompute", 2, CP, SELECTIVE_RECOMPUTE),
)
SPAN_HEAD = tuple(
    dataclasses.replace(layout, name=layout.name.replace("gistnet", "span head"), family="span head")
    for layout in GISTNET
    if "pipeline_model_parallel_size" not in layout.flags
)
OTHERS = (
    spread_over("TP2+SP", 2, TP_SP, family="slot"),
    spread_over("PP2", 2, PP, family="slot"),
    spread_over("CP2", 2, CP, family="slot"),
    spread_over("DP2, distributed optimizer, overlap", 2, DIST_OPT, OVERLAP, family="slot"),
    spread_over("TP2+SP", 2, TP_SP, family="gistnet, per token"),
    spread_over("CP2", 2, CP, family="gistnet, per token"),
    spread_over("DP2, distributed optimizer", 2, DIST_OPT, family="gistnet, per token"),
)
FAULTS = (
    (mutations.unsummed_gist_gradients, GISTNET[0]),
    (mutations.unsummed_gist_gradients, GISTNET[1]),
    (mutations.unsummed_gists, GISTNET[4]),
    (mutations.neighbouring_blocks, GISTNET[2]),
    (mutations.swapped_shares, GISTNET[1]),
    (mutations.unsummed_moves, SPAN_HEAD[0]),
    (mutations.unsummed_moves, SPAN_HEAD[1]),
)
WITHOUT: dict[str, tuple[str, Flags, Callable[[], None] | None]] = {
    "no advantage": ("gistnet", {"mc_loss_advantage": 0.0}, None),
    "gist rows like tokens": ("gistnet", {"mc_loss_gist_rows": 1.0}, None),
    "fixed spans": ("span head", {}, mutations.fixed_spans),
}
"""Families, and what takes away from them what others lack: flags, or a change."""

COMPARED = tuple(
    layout for layout in (*GISTNET, *SPAN_HEAD, OTHERS[0], OTHERS[2]) if not {*layout.flags} & {*VPP, *DIST_OPT} - {*PP}
)
"""Layouts whose ranks hold whole gradients of one stage."""

GRADIENT_TOLERANCE = 2e-5
"""Of a weight's largest gradient: these are sums over all rows that largely cancel."""


@pytest.mark.parametrize("layout", [*GISTNET, *SPAN_HEAD, *OTHERS], ids=str)
def test_agrees_with_one_process(references: References, tmp_path: Path, layout: Layout) -> None:
    """In every step, after which tensor-parallel ranks still hold the same bits of all that they share."""
    result = references.agrees(layout, tmp_path, steps=COMPARED_STEPS, before=recording.replicas)
    tensor = layout.flags.get("tensor_model_parallel_size", 1)
    first_stage = layout.ranks // layout.flags.get("pipeline_model_parallel_size", 1)
    for rank in range(0, layout.ranks, tensor):
        replicas = result.values[rank : rank + tensor]
        assert all(replica == replicas[0] for replica in replicas)
        assert any("gist_net." in name for name in replicas[0]) == (rank < first_stage)
        assert any("log_scale" in name for name in replicas[0])


@pytest.mark.parametrize("layout", COMPARED, ids=str)
def test_gradients_agree(references: References, tmp_path: Path, layout: Layout) -> None:
    """Each rank holds the whole gradient of every weight of GistNet, one process's."""
    alone = dataclasses.replace(ONE, family=layout.family)
    one, many = (
        references.train(which, tmp_path / which.name, steps=2, before=recording.gist_gradients).check()
        for which in (alone, layout)
    )
    [expected] = one.values
    assert len(expected) == 2
    ranks = [rank for rank in many.values if rank[0]]
    assert len(ranks) == layout.ranks // layout.flags.get("pipeline_model_parallel_size", 1)
    assert all(rank[0].keys() == expected[0].keys() for rank in ranks)
    gaps = {
        name: max(_relative(rank[step][name], wanted[name]) for rank in ranks for step, wanted in enumerate(expected))
        for name in expected[0]
    }
    worst = max(gaps, key=gaps.__getitem__)
    print(f"{layout}: gradients of {len(gaps)} weights {gaps[worst]:.1e} ({worst})")
    assert gaps[worst] < GRADIENT_TOLERANCE


def _relative(found: list[float], right: list[float]) -> float:
    largest = max(map(abs, right))
    assert largest > 0
    return max(abs(x - y) for x, y in zip(found, right, strict=True)) / largest


@pytest.mark.parametrize(("fault", "layout"), FAULTS, ids=[f"{fault.__name__}, {layout}" for fault, layout in FAULTS])
def test_fault_is_noticed(references: References, tmp_path: Path, fault: Callable[[], Any], layout: Layout) -> None:
    found = references.compared(layout, tmp_path, steps=COMPARED_STEPS, before=fault)
    assert found.excess() > CLEARLY


@pytest.mark.parametrize("name", WITHOUT)
def test_family_is_worth_comparing(references: References, tmp_path: Path, name: str) -> None:
    """A layout that ignored what the family has over others would not agree."""
    family, flags, before = WITHOUT[name]
    layout = dataclasses.replace(ONE, name=name, family=family, flags=flags)
    result = references.train(layout, tmp_path, steps=COMPARED_STEPS, before=before).check()
    expected = references.one_process(family).losses[:COMPARED_STEPS]
    assert largest(result.losses, expected) > CLEARLY * LOSS_TOLERANCE


def test_replicas_would_tell(references: References, tmp_path: Path) -> None:
    """Ranks that do not add up their gradients end with other weights of GistNet, and with nothing else."""
    result = references.train(GISTNET[0], tmp_path, steps=2, before=_unsummed_replicas).check()
    one, other = result.values
    apart = {name for name in one if one[name] != other[name]}
    assert apart == {name for name in one if "gist_net." in name}


def _unsummed_replicas() -> Callable[[], dict[str, str]]:
    mutations.unsummed_gist_gradients()
    return recording.replicas()


def test_gists_start_away_from_the_mean(references: References, tmp_path: Path) -> None:
    """What the comparison rests on: the same weights with mean gists give another loss from the first step on."""
    layout = dataclasses.replace(ONE, name="mean gists", family="gistnet")
    result = references.train(layout, tmp_path, steps=1, before=mean_answers).check()
    [loss] = result.losses
    assert abs(loss / references.one_process("gistnet").losses[0] - 1) > 1e-3
    assert len(references.one_process("gistnet").losses) == STEPS


def mean_answers() -> None:
    """Let GistNet answer 0, so that every gist is the mean."""
    from megacontext_megatron.context.gistnet import BlockEncoder

    real = BlockEncoder.forward
    BlockEncoder.forward = lambda self, blocks: 0.0 * real(self, blocks)
