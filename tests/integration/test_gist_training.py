"""Learned gists in real trainings: some layouts, where they start, and that they are trained like all else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, parity, recording
from tests.integration.test_kernel_training import FEW_ROWS, through_kernel
from tests.launch import TrainResult, train
from tests.parity import CLEARLY, FULL_RECOMPUTE, ONE, SPAN_HEAD, Layout, References
from tests.small import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, largest, small_flags

QUICK_STEPS = 6
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = (
    Layout(
        name="TP2+SP, distributed optimizer, overlap",
        ranks=2,
        flags=parity.TP_SP | parity.DIST_OPT | OVERLAP,
        family="gistnet",
    ),
    Layout(name="CP2", ranks=2, flags=parity.CP, family="gistnet"),
    Layout(name="span head, TP2+SP, full recompute", ranks=2, flags=parity.TP_SP | FULL_RECOMPUTE, family="span head"),
)


@pytest.mark.parametrize("layout", [*LAYOUTS[:2], pytest.param(LAYOUTS[2], marks=pytest.mark.full)], ids=str)
def test_agrees_with_one_process(references: References, tmp_path: Path, layout: Layout) -> None:
    result = references.agrees(layout, tmp_path, steps=QUICK_STEPS, before=recording.replicas)
    if "tensor_model_parallel_size" in layout.flags:
        one, other = result.values
        assert any("gist_net." in name for name in one)
        assert one == other


@pytest.mark.parametrize(
    ("fault", "layout"),
    [(mutations.unsummed_gist_gradients, LAYOUTS[0]), (mutations.unsummed_moves, LAYOUTS[2])],
    ids=["gradients of blocks", "gradients of spans"],
)
def test_fault_is_noticed(references: References, tmp_path: Path, fault: Callable[[], Any], layout: Layout) -> None:
    found = references.compared(layout, tmp_path, steps=QUICK_STEPS, before=fault)
    assert found.excess() > CLEARLY


def short(corpus: Path, workdir: Path, ranks: int = 1, before: Callable[..., Any] | None = None, **flags: Any) -> Any:
    """Train a few steps of the small run with GistNet, from weights of its own."""
    values = {"mc_gist_kind": "gistnet", "eval_iters": 0, "save_interval": None, "train_iters": 2, **flags}
    return train(small_flags(corpus, **values), ranks, workdir=workdir, before=before).check()


def test_training_starts_where_mean_gists_do(corpus: Path, tmp_path: Path) -> None:
    """The first loss has the same bits, with and without a span head; the second step is another."""
    means = short(corpus, tmp_path / "mean", mc_gist_kind=None)
    for name, flags in {
        "gistnet": {},
        "head": {"mc_gist_span_head": True},
        "slot": {"mc_gist_pooling": "slot"},
    }.items():
        learned = short(corpus, tmp_path / name, **flags)
        assert learned.losses[0] == means.losses[0]
        assert learned.losses[1] != means.losses[1]


def moved_weights(away: bool, silent: bool = False) -> Callable[[], dict[str, Any]]:
    """Record GistNet's weights and gradients in every step; a silent one's gradients are set to 0."""
    import torch

    if away:
        mutations.spread_parameters()
    seen: dict[str, Any] = {"squares": [], "before": [], "after": {}}
    models: list[Any] = []

    def see(model: list[Any]) -> None:
        models[:] = model
        weights = {name: p for part in model for name, p in part.named_parameters() if "gist_net." in name}
        seen["before"].append({name: recording.digest(p) for name, p in weights.items()})
        seen["squares"].append(sum(float(p.main_grad.double().square().sum()) for p in weights.values()))
        seen["zero"] = [name for name, p in weights.items() if not p.main_grad.any()]
        if silent:
            with torch.no_grad():
                for p in weights.values():
                    p.main_grad.zero_()

    recording.after_gradients(see)

    def finish() -> dict[str, Any]:
        weights = {name: p for part in models for name, p in part.named_parameters() if "gist_net." in name}
        return {**seen, "after": {name: recording.digest(p) for name, p in weights.items()}}

    return finish


def heard() -> Callable[[], dict[str, Any]]:
    """Watch a GistNet that starts away from the mean."""
    return moved_weights(away=True)


def silenced() -> Callable[[], dict[str, Any]]:
    """Watch one whose gradients are lost."""
    return moved_weights(away=True, silent=True)


@pytest.mark.parametrize("optimizer", [{}, {"use_distributed_optimizer": True}], ids=["plain", "distributed"])
def test_it_is_in_the_optimizer_and_in_the_gradient_norm(corpus: Path, tmp_path: Path, optimizer: Any) -> None:
    """Every weight has a gradient and moves; the norm's square has its gradients' squares as a part."""
    flags = {"mc_gist_span_head": True, "weight_decay": 0.0, **optimizer}
    runs = [short(corpus, tmp_path / watch.__name__, before=watch, **flags) for watch in (heard, silenced)]
    (whole,), (silent,) = (run.values for run in runs)
    assert whole["zero"] == silent["zero"] == []
    for one, moves in ((whole, True), (silent, False)):
        first, last = one["before"][0], one["after"]
        assert {name for name in first if first[name] != last[name]} == (set(first) if moves else set())
    assert len(whole["after"]) > 10
    with_it, without = (run.grad_norms[0] for run in runs)
    assert whole["squares"][0] == silent["squares"][0] > 1e-4 * with_it**2
    assert math.hypot(without, math.sqrt(whole["squares"][0])) == pytest.approx(with_it, rel=GRAD_NORM_TOLERANCE)


def test_half_precision_trains_it(corpus: Path, tmp_path: Path) -> None:
    """In bf16, from the mean on: all weights move in two steps, the optimizer's copies of them at least."""
    flags = {"bf16": True, "lr": 1e-2, "train_iters": 3, "mc_gist_span_head": True}
    [seen] = short(corpus, tmp_path, before=heard, **flags).values
    assert seen["zero"] == []
    assert all(math.isfinite(square) and square > 0 for square in seen["squares"])
    assert {name for name, value in seen["after"].items() if value == seen["before"][0][name]} == set()


def test_weights_gathered_late_are_those_of_this_step(corpus: Path, tmp_path: Path) -> None:
    """With a bucket for every parameter, so that none comes along with a neighbour.

    Gradients are not clipped: the order in which their norm is added up follows the buckets.
    """
    flags = {"bf16": True, "use_distributed_optimizer": True, "lr": 1e-2, "clip_grad": 0.0, "train_iters": 3}
    flags["mc_gist_pooling"] = "slot"
    runs = [
        short(corpus, tmp_path / name, 2, before=mutations.spread_parameters, **flags, **more)
        for name, more in (("plain", {}), ("over", OVERLAP | {"ddp_bucket_size": 1}))
    ]
    assert runs[1].losses == runs[0].losses
    assert len(set(runs[0].losses)) == 3


def in_kernel(kernel: bool) -> Callable[[], Any]:
    """Let spans move from the first step on."""
    return through_kernel(kernel=kernel)


def test_moved_spans_go_through_the_kernel(corpus: Path, tmp_path: Path) -> None:
    """The kernel rotates by moved centres and spreads, and hands GistNet the same gradients."""
    runs: list[TrainResult] = []
    for kernel in (False, True):
        values = {**FEW_ROWS, **SPAN_HEAD, "mc_gist_hidden_size": 16, "gaussian_rope_learnable_sigma": None}
        hook = {"before": in_kernel, "before_kwargs": {"kernel": kernel}}
        runs.append(train(small_flags(corpus, **values), workdir=tmp_path / str(kernel), **hook).check())
    plain, fused = runs
    assert (bool(plain.values[0]["launches"]), set(fused.values[0]["launches"])) == (False, {"split"})
    assert largest(fused.losses, plain.losses) <= LOSS_TOLERANCE
    assert largest(fused.grad_norms, plain.grad_norms) <= GRAD_NORM_TOLERANCE


def test_moved_spans_matter(references: References, tmp_path: Path) -> None:
    """The same weights give another loss where no span moves."""
    layout = dataclasses.replace(ONE, name="fixed spans", family="span head")
    still = references.train(layout, tmp_path, steps=1, before=mutations.fixed_spans).check()
    assert largest(still.losses, references.one_process("span head").losses[:1]) > CLEARLY * LOSS_TOLERANCE


def rows_by_stage() -> Callable[[], list[list[int]]]:
    """Record how many tokens the mixed contexts of every micro-batch cover."""
    from megacontext_megatron.model.step import ForwardStep

    seen: list[list[int]] = []
    real = ForwardStep._local_spans

    def record(self: Any, batch: Any) -> Any:
        spans = real(self, batch)
        seen.append((self.settings.context.source_length - spans.start[1::2, 0]).tolist())
        return spans

    ForwardStep._local_spans = record
    return lambda: seen


def test_a_curriculum_grows_the_history_of_training_alone(corpus: Path, tmp_path: Path) -> None:
    """Stages change with the step whose contexts reach them, and validation covers all from the start."""
    stages = ["0:128", "8:256:1.0", "16:512"]
    flags = {"mc_curriculum": stages, "train_iters": 3, "eval_iters": 1, "eval_interval": 1}
    [seen] = short(corpus, tmp_path, before=rows_by_stage, **flags).values
    covered = [[-(-tokens // 8) * 8 for tokens in batch] for batch in seen]
    expected = [[history] for step in (128, 256, 512) for history in [step] * 4 + [512] * 4]
    assert [sorted(set(batch)) for batch in covered[: len(expected)]] == expected
