"""Trainings whose attention runs in the plugin's kernels, or elsewhere with folded biases, on one GPU and on two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import parity
from tests.gpu.matrix import TIMES_SPREAD, Matrix, explained, larger, needs_te, one_gpu
from tests.gpu.test_two_gpus import two
from tests.launch import TrainResult
from tests.parity import CP, PP, TP_SP, Flags, Layout, difference

KERNELS = one_gpu("kernels", family="local, kernels")
STRIPS = one_gpu("strips", family="local, strips")
NORMED = one_gpu("kernels, QK-norm", family="local, kernels, QK-norm")
FOLDED = one_gpu("folded, cuDNN", family="folded")
ON_TE = one_gpu("folded, Transformer Engine", family="te, folded")
DENSE: Flags = {"mc_window_backend": "megatron", "mc_global_backend": "megatron"}
TRITON: Flags = {"mc_global_backend": "triton"}
FLEX: Flags = {"mc_window_backend": "flex"}


def variant(one: Layout, flags: Flags) -> Layout:
    """Return a one-GPU run with more flags."""
    return one_gpu(f"{one.name}, {' '.join(f'{k} {v}' for k, v in flags.items())}", family=one.family, **flags)


def backends(result: TrainResult) -> list[str]:
    """Return what computed attention on each layer, of the layer table."""
    rows = [line.removeprefix("> ").split(" | ") for line in result.log.splitlines() if line.startswith("> ")]
    return [row[-1] for row in rows if len(row) == 6 and row[0].isdigit()]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("one", "other", "used"),
    [
        (KERNELS, FLEX, ["flex"] * 3 + ["triton"]),
        (STRIPS, FLEX, ["flex"] * 3 + ["triton"]),
        (FOLDED, TRITON, ["triton, rotary inside"] * 3 + ["triton"]),
        (NORMED, {"mc_reach_skip": True}, ["triton"] * 3 + ["triton, reach skip"]),
    ],
    ids=["flex", "strips, flex", "folded, triton", "reach skip"],
)
def test_backends_train_the_same(matrix: Matrix, tmp_path: Path, one: Layout, other: Flags, used: list[str]) -> None:
    assert backends(matrix.within(variant(one, other), one, tmp_path)) == used


@pytest.mark.gpu
@pytest.mark.parametrize("one", [KERNELS, STRIPS], ids=str)
def test_dense_attention_trains_the_same(matrix: Matrix, one: Layout) -> None:
    """It rounds scores to bf16, which no cut into micro-batches does: FlexAttention, which does not, says how much."""
    dense, flex = (variant(one, flags) for flags in (DENSE, FLEX))
    assert backends(matrix.made(dense)) == ["dense"] * 3 + ["dense, biased"]
    explained(matrix.apart(dense, one), larger(matrix.spread(one), matrix.apart(dense, flex)))


@pytest.mark.gpu
def test_windows_and_slopes_are_worth_comparing(matrix: Matrix, tmp_path: Path) -> None:
    """A kernel that looked elsewhere, or left the bias out, would not agree."""
    spread = matrix.spread(KERNELS)
    for name, flags in (("window", {"window_size": "55,0"}), ("slopes", {"bias_slope_scale": 8.0})):
        other = one_gpu(f"kernels, another {name}", family=KERNELS.family, **flags)
        found = difference(matrix.train(other, tmp_path / name), matrix.made(KERNELS))
        assert found.loss > TIMES_SPREAD * spread.loss, (name, found, spread)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [parity.FULL_RECOMPUTE, parity.SELECTIVE_RECOMPUTE], ids=["full", "selective"])
def test_recomputation_changes_no_bit(matrix: Matrix, tmp_path: Path, how: Flags) -> None:
    again = matrix.train(one_gpu("kernels, recompute", family=KERNELS.family, **how), tmp_path)
    assert again.losses == matrix.made(KERNELS).losses
    assert again.grad_norms == matrix.made(KERNELS).grad_norms


@pytest.mark.multigpu
@pytest.mark.parametrize(
    ("one", "layout"),
    [
        (KERNELS, two("TP2+SP, kernels", TP_SP, family=KERNELS.family)),
        (KERNELS, two("PP2, kernels", PP, family=KERNELS.family)),
        (KERNELS, two("CP2, kernels", CP, family=KERNELS.family)),
        (STRIPS, two("CP2, strips", CP, family=STRIPS.family)),
        (NORMED, two("CP2, reach skip", CP, {"mc_reach_skip": True}, family=NORMED.family)),
        pytest.param(ON_TE, two("CP2, ring, folded", CP, {"cp_comm_type": "p2p"}, family=ON_TE.family), marks=needs_te),
        pytest.param(ON_TE, two("CP2, a2a, folded", CP, {"cp_comm_type": "a2a"}, family=ON_TE.family), marks=needs_te),
        pytest.param(
            ON_TE,
            two("CP2, all-gather, folded", CP, {"cp_comm_type": "all_gather"}, family=ON_TE.family),
            marks=needs_te,
        ),
        pytest.param(ON_TE, two("TP2+SP, folded", TP_SP, family=ON_TE.family), marks=needs_te),
    ],
    ids=str,
)
def test_layouts_agree_with_one_gpu(matrix: Matrix, tmp_path: Path, one: Layout, layout: Layout) -> None:
    matrix.within(layout, one, tmp_path)
