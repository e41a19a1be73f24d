"""Transformer Engine's layers on one GPU: recomputation, determinism, precision, and what the comparisons are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import parity
from tests.gpu.matrix import (
    CLEARLY,
    FAMILIES,
    ONE,
    RESUMED,
    TIMES_SPREAD,
    Matrix,
    attention_of,
    needs_te,
    one_gpu,
    rotary_of,
    steps_of,
)
from tests.launch import TrainResult, train
from tests.parity import Flags
from tests.small import command
from tests.tiny import tiny_flags

pytestmark = [pytest.mark.gpu, needs_te]

AGAIN = one_gpu("one GPU, again")
MOVED = one_gpu("span head", family="te, span head")
RECOMPUTED = {"full": parity.FULL_RECOMPUTE, "selective": parity.SELECTIVE_RECOMPUTE}
FIXED_ORDER = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
"""With it Transformer Engine's attention sums its gradients in one order."""

FP8_RECIPES = ("delayed", "tensorwise")
FP8_NEAR = 0.1
"""Relative difference from the losses of bf16 that products in 8 bits may make."""

LOCAL_LAYERS = ("--transformer-impl", "local")

SAME_WEIGHTS = 0.02
"""Relative difference in a loss that other kernels make with the same weights."""

LEARNED = 0.8
"""Training brings the loss below this part of the first, which fresh weights would show."""


def test_attention_is_a_fused_kernel(matrix: Matrix) -> None:
    """What heads of 64 channels in bf16 are for; the unfused fallback would compare another computation."""
    assert attention_of(matrix.made(ONE)) <= {"cuDNN", "FlashAttention"}


@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputation_changes_no_bit(matrix: Matrix, tmp_path: Path, how: str) -> None:
    """Or the attention backward is what does, shown by runs in which it sums in one order."""
    recomputed = one_gpu(f"{how} recompute", **RECOMPUTED[how])
    found = matrix.train(recomputed, tmp_path / "recomputed")
    if steps_of(found) == steps_of(matrix.made(ONE)):
        matrix.note(f"{how} recompute: bit-equal to none.")
        return
    assert steps_of(matrix.made(AGAIN)) != steps_of(matrix.made(ONE)), (
        f"{how} recompute differs where a repeat does not"
    )
    options: dict[str, Any] = {"environment": FIXED_ORDER}
    plain = matrix.train(one_gpu("one GPU, attention in one order"), tmp_path / "ordered", **options)
    same = matrix.train(
        one_gpu(f"{how} recompute, attention in one order", **RECOMPUTED[how]), tmp_path / "both", **options
    )
    assert steps_of(same) == steps_of(plain)
    matrix.note(
        f"{how} recompute: the backward of {attention_of(found)} attention is not deterministic, since a repeated run "
        "differs as well; with NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 recompute is bit-equal to none."
    )


def test_deterministic_mode_repeats_every_bit(matrix: Matrix, tmp_path: Path) -> None:
    """Also through recomputation."""
    plain, recomputed = (
        matrix.train(one_gpu(name, deterministic_mode=True, **flags), tmp_path / name)
        for name, flags in (("deterministic", {}), ("deterministic-recompute", parity.FULL_RECOMPUTE))
    )
    assert steps_of(plain) == steps_of(recomputed)


def test_a_resumed_run_repeats_every_bit(matrix: Matrix, tmp_path: Path) -> None:
    """The optimizer is Transformer Engine's, with parameters of sigma that stayed in fp32."""
    through, resumed = matrix.resumed("one GPU", 1, tmp_path)
    assert steps_of(resumed) == steps_of(through)[RESUMED:]


def test_centres_are_worth_comparing(matrix: Matrix, tmp_path: Path) -> None:
    """Without centres the loss is another, ten times further than a layout may be."""
    found, spread, _ = matrix.compared(one_gpu("mu = 0"), ONE, tmp_path, change="zero_centres")
    assert found.loss > CLEARLY * TIMES_SPREAD * spread.loss
    assert found.grad_norm > CLEARLY * TIMES_SPREAD * spread.grad_norm


def test_the_kernel_agrees_with_its_reference(matrix: Matrix, tmp_path: Path) -> None:
    """The layer table names which of both ran."""
    reference = matrix.within(one_gpu("--mc-backend torch", mc_backend="torch"), ONE, tmp_path)
    assert "triton" in rotary_of(matrix.made(ONE))
    assert "torch" in rotary_of(reference)


def test_norms_in_the_kernel_agree_with_their_reference(matrix: Matrix, tmp_path: Path) -> None:
    one = one_gpu("QK-norm", family="te, QK-norm")
    matrix.within(one_gpu("QK-norm, --mc-backend torch", family="te, QK-norm", mc_backend="torch"), one, tmp_path)


def test_moved_spans_in_the_kernel_agree_with_its_reference(matrix: Matrix, tmp_path: Path) -> None:
    """Where GistNet moves centres and spreads, and gradients go back to it."""
    reference = one_gpu("span head, --mc-backend torch", family=MOVED.family, mc_backend="torch")
    result = matrix.within(reference, MOVED, tmp_path)
    assert "triton" in rotary_of(matrix.made(MOVED))
    assert "torch" in rotary_of(result)


def test_moved_spans_are_worth_comparing(matrix: Matrix, tmp_path: Path) -> None:
    """A kernel that left them where they lie would not agree."""
    found, spread, _ = matrix.compared(
        one_gpu("fixed spans", family=MOVED.family), MOVED, tmp_path, change="fixed_spans"
    )
    assert found.loss > TIMES_SPREAD * spread.loss
    assert found.grad_norm > TIMES_SPREAD * spread.grad_norm


@pytest.mark.parametrize("how", RECOMPUTED)
def test_learned_gists_agree_under_recomputation(matrix: Matrix, tmp_path: Path, how: str) -> None:
    matrix.within(one_gpu(f"span head, {how} recompute", family=MOVED.family, **RECOMPUTED[how]), MOVED, tmp_path)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8_linear_layers_train(matrix: Matrix, tmp_path: Path, recipe: str) -> None:
    flags: Flags = {"fp8_format": "hybrid", "fp8_recipe": recipe}
    found, _, result = matrix.compared(one_gpu(f"FP8, {recipe}", **flags), ONE, tmp_path)
    assert result.losses[-1] < result.losses[0] - 1
    assert 0 < found.loss < FP8_NEAR


def test_local_and_transformer_engine_layers_load_each_others_checkpoints(matrix: Matrix, tmp_path: Path) -> None:
    """The loss of the first step is that of the loaded weights, and so are those of an evaluation."""

    def start(name: str, family: str, load: Path | None, steps: int = 1) -> tuple[TrainResult, Path]:
        save = tmp_path / name / "checkpoint"
        # what only looks at its weights leaves them as they are
        source = {} if load is None else {"load": load, "finetune": True, "lr": 1e-9, "min_lr": 1e-9}
        saved = {"save": save, "save_interval": steps, "train_iters": steps, "no_save_optim": True}
        flags = tiny_flags(**{**FAMILIES[family], **matrix.data(), **source, **saved})
        return train(flags, workdir=tmp_path / name).check(), save

    first, local = start("local", "local bf16", None, parity.STEPS)
    stayed, _ = start("local-local", "local bf16", local)
    there, te = start("local-te", "te", local)
    back, _ = start("te-local", "local bf16", te)
    assert stayed.losses[0] < first.losses[0] * LEARNED
    for moved in (there, back):
        assert moved.losses[0] == pytest.approx(stayed.losses[0], rel=SAME_WEIGHTS)
    own, other = (evaluated(te, tmp_path / name, *flags) for name, *flags in (("own",), ("other", *LOCAL_LAYERS)))
    assert own == pytest.approx(other, rel=SAME_WEIGHTS)


def evaluated(checkpoint: Path, workdir: Path, *flags: str) -> dict[str, float]:
    """Return the losses of an evaluation on this machine's GPU by input."""
    sizes = ("--micro-batch-size", "2", "--mc-eval-samples", "4")
    command("evaluate", ["--load", str(checkpoint), *sizes, *flags], workdir=workdir).check()
    found = json.loads((checkpoint / "evaluation.json").read_text())
    return {name: found[name] for name in ("recency", "mixed", "full")}


def test_the_doctor_sees_transformer_engine(matrix: Matrix, tmp_path: Path) -> None:
    flags = tiny_flags(**{**FAMILIES["te"], **matrix.data(), "log_interval": 1})
    found = command("doctor", flags, workdir=tmp_path).check().log
    assert (
        found.count(
            "SpanSelfAttention, gaussian_rope, rotary triton, core TEDotProductAttention (transformer_engine, auto"
        )
        == 4
    )
    assert "NOT ACTIVE" not in found
