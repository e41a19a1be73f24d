"""Layouts on two GPUs against one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import parity
from tests.gpu.matrix import ONE, RESUMED, TIMES_SPREAD, WINDOWS, Matrix, attention_of, needs_te, one_gpu, steps_of
from tests.launch import TrainResult
from tests.parity import CP, DIST_OPT, GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, PP, TP_SP, VPP, Flags, Layout, difference

pytestmark = pytest.mark.multigpu

OVERLAP: Flags = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def two(name: str, *flags: Flags, family: str = "te") -> Layout:
    """Return a layout of a family over two GPUs."""
    return Layout(
        name=name, ranks=2, family=family, flags={key: value for each in flags for key, value in each.items()}
    )


LAYOUTS = (
    two("TP2+SP", TP_SP),
    two("PP2", PP),
    two("PP2, virtual stages", VPP),
    two("CP2, ring", CP, {"cp_comm_type": "p2p"}),
    two("CP2, all-to-all", CP, {"cp_comm_type": "a2a"}),
    two("CP2, all-gather", CP, {"cp_comm_type": "all_gather"}),
    two("DP2, distributed optimizer, overlap", DIST_OPT, OVERLAP),
    two(
        "TP2+SP, full recompute, Transformer Engine's random states",
        TP_SP,
        parity.FULL_RECOMPUTE,
        {"te_rng_tracker": True},
    ),
)
OF_TE: Flags = WINDOWS | {"mc_window_backend": "megatron"}
WINDOWED = one_gpu("windows", **OF_TE)
EXCHANGES = {
    "CP2, all-to-all, windows": ["a2a"],
    "CP2, windows by all-gather, others by ring": ["all_gather"] * 3 + ["p2p"],
}
BY_HEAD = one_gpu("sigma by head", family="te, sigma by head")
FP32 = {
    "tokens' means": one_gpu("fp32", family="local fp32"),
    "gistnet": one_gpu("fp32, gistnet", family="local fp32, gistnet"),
    "span head": one_gpu("fp32, span head", family="local fp32, span head"),
}
GISTS = one_gpu("gistnet", family="te, gistnet")
MOVED = one_gpu("span head", family="te, span head")
PREDICTED = one_gpu("prediction", family="te, prediction")
GIST_LAYOUTS = tuple(
    two(f"{name}, {one.name}", *flags, family=one.family)
    for name, *flags in (
        ("TP2+SP", TP_SP),
        ("PP2", PP),
        ("CP2, ring", CP, {"cp_comm_type": "p2p"}),
        ("DP2, distributed optimizer, overlap", DIST_OPT, OVERLAP),
        ("TP2+SP, full recompute", TP_SP, parity.FULL_RECOMPUTE),
    )
    for one in (GISTS, MOVED, PREDICTED)
    if one is GISTS or "pipeline_model_parallel_size" not in flags[0]
)
FP8: Flags = {"fp8_format": "hybrid", "fp8_recipe": "delayed"}
EXPERTS = one_gpu("experts", family="te, experts")

UNSUMMED = 0.25
"""Gradients that lack the other rank's part are off by more than this, those that are whole by less."""


@needs_te
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_one_gpu(matrix: Matrix, tmp_path: Path, layout: Layout) -> None:
    result = matrix.within(layout, ONE, tmp_path)
    assert attention_of(result) <= {"cuDNN", "FlashAttention"}


@needs_te
def test_a_resumed_distributed_optimizer_repeats_every_bit(matrix: Matrix, tmp_path: Path) -> None:
    through, resumed = matrix.resumed("DP2, distributed optimizer", 2, tmp_path, **DIST_OPT, **OVERLAP)
    assert steps_of(resumed) == steps_of(through)[RESUMED:]


@needs_te
@pytest.mark.parametrize("name", EXCHANGES)
def test_windows_agree_over_context_parallel_ranks(matrix: Matrix, tmp_path: Path, name: str) -> None:
    matrix.within(two(name, CP, OF_TE, {"cp_comm_type": EXCHANGES[name]}), WINDOWED, tmp_path)


@needs_te
def test_windows_are_worth_comparing(matrix: Matrix) -> None:
    """A layout that ignored them would not agree."""
    found, spread = difference(matrix.made(WINDOWED), matrix.made(ONE)), matrix.spread(WINDOWED)
    assert found.loss > TIMES_SPREAD * spread.loss
    assert found.grad_norm > TIMES_SPREAD * spread.grad_norm


@needs_te
def test_sigma_by_head_agrees_over_tensor_parallel_ranks(matrix: Matrix, tmp_path: Path) -> None:
    layout = two("TP2+SP, sigma by head", TP_SP, family=BY_HEAD.family)
    result = matrix.within(layout, BY_HEAD, tmp_path / "whole")
    whole = off_by(result, matrix.made(BY_HEAD))
    cut = matrix.train(layout, tmp_path / "cut", steps=2, change="unsummed_positional_gradients")
    parts = off_by(cut, matrix.made(BY_HEAD))
    matrix.note(f"{layout}: gradients of sigma off by {whole:.1e}, {parts:.1e} where ranks are not summed")
    assert whole < UNSUMMED < parts


@needs_te
def test_norms_in_the_kernel_agree_over_tensor_parallel_ranks(matrix: Matrix, tmp_path: Path) -> None:
    one = one_gpu("QK-norm", family="te, QK-norm")
    matrix.within(two("TP2+SP, QK-norm", TP_SP, family=one.family), one, tmp_path)


@needs_te
def test_sigma_by_level_gets_whole_gradients(matrix: Matrix, tmp_path: Path) -> None:
    whole = off_by(matrix.train(two("TP2+SP, two steps", TP_SP), tmp_path, steps=2), matrix.made(ONE))
    matrix.note(f"TP2+SP: gradients of sigma by level off by {whole:.1e}")
    assert whole < UNSUMMED


@needs_te
@pytest.mark.parametrize("layout", GIST_LAYOUTS, ids=str)
def test_learned_gists_agree_with_one_gpu(matrix: Matrix, tmp_path: Path, layout: Layout) -> None:
    """GistNet starts away from the mean, and its losses tell variants and levels apart."""
    [one] = (each for each in (GISTS, MOVED, PREDICTED) if each.family == layout.family)
    matrix.within(layout, one, tmp_path)


@needs_te
@pytest.mark.parametrize("flags", [TP_SP, CP], ids=["TP2+SP", "CP2"])
def test_gistnet_gets_whole_gradients(matrix: Matrix, tmp_path: Path, flags: Flags) -> None:
    """On every rank, of all weights, which ranks that share out the blocks find parts of."""
    layout = two(f"{' '.join(flags)}, gistnet, two steps", flags, family=GISTS.family)
    one = matrix.made(GISTS)
    whole = off_by(matrix.train(layout, tmp_path / "whole", steps=2), one, "gists")
    change = "unsummed_gist_gradients" if flags is TP_SP else "unsummed_gists"
    parts = off_by(matrix.train(layout, tmp_path / "cut", steps=2, change=change), one, "gists")
    matrix.note(f"{layout}: gradients of GistNet off by {whole:.1e}, {parts:.1e} where ranks are not summed")
    assert whole < UNSUMMED < parts


def off_by(result: TrainResult, one: TrainResult, kind: str = "gradients") -> float:
    """Return the largest error of the first step's gradients on any rank, of a parameter's largest one.

    `kind` names which of what tests.gpu.watching records: `gradients` of positions, or of `gists`.
    """
    expected: dict[str, list[float]] = one.values[0][kind][0]
    assert expected
    return max(_relative(rank[kind][0][name], right) for rank in result.values for name, right in expected.items())


def _relative(found: Sequence[float], right: Sequence[float]) -> float:
    assert max(map(abs, right)) > 0
    return max(abs(x - y) for x, y in zip(found, right, strict=True)) / max(map(abs, right))


@needs_te
@pytest.mark.parametrize(
    "layout",
    [
        two("FP8, TP2+SP, full recompute", FP8, TP_SP, parity.FULL_RECOMPUTE),
        two(
            "FP8, DP2, distributed optimizer, parameters gathered in FP8",
            FP8,
            DIST_OPT,
            OVERLAP,
            {"fp8_param_gather": True},
        ),
    ],
    ids=str,
)
def test_fp8_trains_over_ranks(matrix: Matrix, tmp_path: Path, layout: Layout) -> None:
    result = matrix.train(layout, tmp_path)
    assert result.losses[-1] < result.losses[0] - 1


@needs_te
def test_experts_train_over_ranks(matrix: Matrix, tmp_path: Path) -> None:
    """Rounding sends rows to other experts, so runs are compared by what they learn."""
    one = matrix.made(EXPERTS)
    result = matrix.train(two("EP2", {"expert_model_parallel_size": 2}, family=EXPERTS.family), tmp_path)
    assert result.losses[0] == pytest.approx(one.losses[0], rel=1e-2)
    assert result.losses[-1] == pytest.approx(one.losses[-1], rel=0.1)
    assert result.losses[-1] < result.losses[0] - 1


@pytest.mark.parametrize(
    ("one", "layout"),
    [
        (one, two(f"{name}, {one.name}", flags, family=one.family))
        for kind, one in FP32.items()
        for name, flags in (("TP2+SP", TP_SP), ("PP2", PP), ("CP2", CP))
        if kind != "span head" or flags is not PP
    ],
    ids=str,
)
def test_dense_attention_in_fp32_agrees_as_on_the_cpu(
    matrix: Matrix, tmp_path: Path, one: Layout, layout: Layout
) -> None:
    found = difference(matrix.train(layout, tmp_path), matrix.made(one))
    matrix.note(f"fp32, dense, {layout}: {found} (allowed {LOSS_TOLERANCE:.0e}, {GRAD_NORM_TOLERANCE:.0e})")
    assert found.loss <= LOSS_TOLERANCE
    assert found.grad_norm <= GRAD_NORM_TOLERANCE
