"""Every term of the objective, taught by a cache, in each layout against one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import write_corpus
from tests.launch import call
from tests.parity import (
    CLEARLY,
    COMPARED_STEPS,
    CP,
    DIST_OPT,
    FULL_RECOMPUTE,
    GISTNET,
    LEVEL,
    MIXED,
    ONE,
    PP,
    STEPS,
    TP,
    TP_SP,
    VPP,
    Flags,
    Layout,
    References,
)
from tests.small import command

pytestmark = pytest.mark.full

TERMS: Flags = {"mc_loss_kl": 1.0, "mc_loss_contrast": 0.5, "mc_loss_pooling": 1.0, "mc_teacher": "cache"}
PER_TOKEN: Flags = {"calculate_per_token_loss": True, "eod_mask_loss": True}
FORWARD: Flags = {"mc_teacher": "forward", "mc_teacher_path": None, "mc_loss_pooling": None}
PADDED = {"vocab_size": 307}
"""A vocabulary of which the last tensor-parallel rank holds 13 padding entries."""

LAYOUTS = {
    "TP2": (2, TP),
    "TP2+SP": (2, TP_SP),
    "PP2": (2, PP),
    "PP2, virtual stages": (2, VPP),
    "CP2": (2, CP),
    "DP2, distributed optimizer": (2, DIST_OPT),
    "TP2xCP2+SP": (4, {**TP_SP, **CP}),
    "CP2xPP2": (4, {**CP, **PP}),
    "TP2+SP, full recompute": (2, {**TP_SP, **FULL_RECOMPUTE}),
}
OTHERS = (
    Layout(name="per token, CP2", ranks=2, flags=CP, family="per token"),
    Layout(name="per token, PP2", ranks=2, flags=PP, family="per token"),
    Layout(name="per token, DP2", ranks=2, family="per token"),
    Layout(name="forward, TP2", ranks=2, flags=TP, family="forward"),
    Layout(name="forward, TP2+SP", ranks=2, flags=TP_SP, family="forward"),
    Layout(name="forward, DP2, distributed optimizer", ranks=2, flags=DIST_OPT, family="forward"),
    Layout(name="forward, full recompute", flags=FULL_RECOMPUTE, family="forward"),
)
ALL = [Layout(name=name, ranks=ranks, flags=flags, family="cache") for name, (ranks, flags) in LAYOUTS.items()]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Return one-process runs that learn from a cache, whose teacher is a model of the same shape."""
    folder = tmp_path_factory.mktemp("taught")
    call(write_corpus, {"prefix": str(folder / "paragraphs"), "separator": "\n\n"}, workdir=folder).check()
    base = MIXED | LEVEL | GISTNET | PADDED
    teachers = References(folder / "paragraphs", folder / "teacher", {"teacher": base})
    words = ["--cpu", "--load", teachers.checkpoint("teacher"), "--mc-teacher-path", folder / "cache"]
    words += ["--mc-teacher-samples", str(STEPS * int(base["global_batch_size"]) // int(base["mc_variants"]))]
    command("teacher", words, workdir=folder / "work").check()
    cached = base | TERMS | {"mc_teacher_path": folder / "cache"}
    families = {"cache": cached, "per token": cached | PER_TOKEN, "forward": cached | FORWARD}
    return References(folder / "paragraphs", folder / "runs", families)


@pytest.mark.parametrize("layout", [*ALL, *OTHERS], ids=str)
def test_agrees_with_one_process(taught: References, tmp_path: Path, layout: Layout) -> None:
    result = taught.agrees(layout, tmp_path, steps=COMPARED_STEPS)
    terms = {"advantage", "kl", "contrast"} | ({"pooling"} if layout.family != "forward" else set())
    assert {tag.rpartition("/")[2] for tag in result.tags("mc/term/")} == terms
    assert all(max(result.scalars(tag)) > 0 for tag in result.tags("mc/term/"))


def local_imitation() -> None:
    """Take the mean of KL over the rows that one context-parallel rank happens to hold."""
    from megacontext_megatron.model import objective

    real = objective.imitation
    objective.imitation = lambda student, lesson, mask, variants, over_context, **given: real(
        student, lesson, mask, variants, lambda value: value, **given
    )


def neighbouring_lesson() -> None:
    """Teach each row what the row before it should have learned."""
    from megacontext_megatron.model.teaching import Teacher

    real = Teacher.__call__

    def late(self: Teacher, *args: Any, **kwargs: Any) -> Any:
        lesson = real(self, *args, **kwargs)
        assert lesson.logits is not None
        return dataclasses.replace(lesson, logits=lesson.logits.roll(1, dims=0))

    Teacher.__call__ = late


def first_vocabulary() -> None:
    """Teach every tensor-parallel rank the first one's part of the vocabulary."""
    from megacontext_megatron.model import teaching

    real = teaching.Teacher.__call__

    def first(self: Any, model: Any, batch: Any, *, last: bool) -> Any:
        lesson = real(self, model, batch, last=last)
        assert lesson.logits is not None
        logits = batch.logits[..., : lesson.logits.shape[-1]].transpose(0, 1)
        return dataclasses.replace(lesson, logits=logits)

    teaching.Teacher.__call__ = first


def unscaled_gist_terms() -> None:
    """Let the terms of gists weigh as if there were one micro-batch."""
    from megacontext_megatron.model import step

    step.get_num_microbatches = lambda: 1


FAULTS = (
    (local_imitation, ALL[4]),
    (neighbouring_lesson, dataclasses.replace(ONE, family="cache")),
    (first_vocabulary, ALL[0]),
    (unscaled_gist_terms, ALL[2]),
)


@pytest.mark.parametrize(("fault", "layout"), FAULTS, ids=[f"{fault.__name__}, {layout}" for fault, layout in FAULTS])
def test_fault_is_noticed(taught: References, tmp_path: Path, fault: Callable[[], Any], layout: Layout) -> None:
    assert taught.compared(layout, tmp_path, steps=3, before=fault).excess() > CLEARLY


@pytest.mark.parametrize("without", ["mc_loss_kl", "mc_loss_contrast", "mc_loss_pooling"])
def test_term_is_worth_comparing(taught: References, tmp_path: Path, without: str) -> None:
    """A layout that left a term's gradient out would not agree."""
    layout = dataclasses.replace(ONE, family="cache", flags={without: 1e-9})
    assert taught.compared(layout, tmp_path, steps=6).excess() > CLEARLY
