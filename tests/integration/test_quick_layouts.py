"""Some layouts against one process, what the comparison is worth, and faults it must notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, parity
from tests.parity import CLEARLY, FULL_RECOMPUTE, MIXED, ONE, STEPS, Layout, References

QUICK_STEPS = 6
LAYOUTS = (
    Layout(name="TP2+SP", ranks=2, flags=parity.TP_SP),
    Layout(name="PP2, virtual stages, full recompute", ranks=2, flags=parity.VPP | FULL_RECOMPUTE),
    Layout(name="CP2", ranks=2, flags=parity.CP),
    Layout(name="DP2, distributed optimizer", ranks=2, flags=parity.DIST_OPT),
    Layout(name="TP2xPP2+SP", ranks=4, flags=parity.TP_SP | parity.PP),
)
PP_RECOMPUTED = Layout(name="PP2, full recompute", ranks=2, flags=parity.PP | FULL_RECOMPUTE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_one_process(references: References, tmp_path: Path, layout: Layout) -> None:
    references.agrees(layout, tmp_path, steps=QUICK_STEPS)


def test_each_micro_batch_has_a_plan_of_its_own(references: References) -> None:
    """What every comparison here rests on; that each step has rows of all levels is asserted where it is run."""
    micro_batches = MIXED["global_batch_size"] // MIXED["micro_batch_size"]
    [plans] = references.one_process("dense").values
    assert len(set(plans)) == len(plans) == STEPS * micro_batches


def test_positional_parameters_come_from_the_checkpoint(references: References) -> None:
    """Every layer has factors of its own on sigma, and none is the initial one."""
    reference = references.one_process("dense")
    scales = {tag: reference.scalars(tag)[0] for tag in reference.tags("mc/pos/sigma_scale/")}
    assert len(scales) == 4 * 2
    assert min(abs(scale - 1.0) for scale in scales.values()) > 0.1
    assert len({round(scale, 2) for tag, scale in scales.items() if tag.endswith("/1")}) == 4


@pytest.mark.parametrize(
    ("change", "least"), [(mutations.zero_centres, 1e-3), (mutations.zero_sigma, 1e-4)], ids=["mu", "sigma"]
)
def test_loss_depends_on_positions(
    references: References, tmp_path: Path, change: Callable[[], Any], least: float
) -> None:
    """Without centres, and without spreads, the loss is another."""
    found = references.compared(ONE, tmp_path, steps=QUICK_STEPS, before=change)
    assert found.loss > least


@pytest.mark.parametrize(
    ("layout", "fault"),
    [(PP_RECOMPUTED, mutations.latest_plan), (LAYOUTS[2], mutations.swapped_context_slices)],
    ids=["newest plan", "CP slices"],
)
def test_fault_is_noticed(references: References, tmp_path: Path, layout: Layout, fault: Callable[[], Any]) -> None:
    found = references.compared(layout, tmp_path, steps=QUICK_STEPS, before=fault)
    assert found.excess() > CLEARLY
