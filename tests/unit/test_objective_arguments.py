"""Flags of the objective: what they become, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.small import parse_only, refusal, small_flags

GISTNET: dict[str, Any] = {"mc_gist_kind": "gistnet"}
CACHE: dict[str, Any] = {"mc_teacher": "cache", "mc_teacher_path": "taught"}
POOLING: dict[str, Any] = {**GISTNET, **CACHE, "mc_loss_pooling": 1.0}
FORWARD: dict[str, Any] = {"mc_loss_kl": 1.0, "mc_teacher": "forward"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({f"mc_loss_{name}": -0.5}, f"--mc-loss-{name.replace('_', '-')} -0.5") for name in
      ("advantage", "kl", "contrast", "pooling", "gist_rows")),
    ({"mc_loss_advantage": "nan"}, "--mc-loss-advantage nan must be a finite number"),
    ({"mc_loss_advantage": 1.0, "mc_variants": 1}, "--mc-loss-advantage compares variants"),
    ({"mc_loss_contrast": 1.0}, "--mc-loss-contrast trains gists"),
    ({**CACHE, "mc_loss_pooling": 1.0}, "--mc-loss-pooling trains gists"),
    ({**GISTNET, "mc_loss_pooling": 1.0}, "--mc-loss-pooling regresses on cached states"),
    ({**GISTNET, **FORWARD, "mc_loss_pooling": 1.0}, "--mc-loss-pooling regresses on cached states"),
    ({"mc_loss_kl": 1.0}, "--mc-loss-kl needs a teacher"),
    ({"mc_teacher": "forward"}, "--mc-teacher forward teaches nothing"),
    (CACHE, "--mc-teacher cache teaches nothing"),
    ({"mc_loss_kl": 1.0, "mc_teacher": "cache"}, "--mc-teacher cache and --mc-teacher-path"),
    ({**FORWARD, "mc_teacher_path": "taught"}, "--mc-teacher cache and --mc-teacher-path"),
    ({**FORWARD, "pipeline_model_parallel_size": 2}, "--mc-teacher forward runs the model twice"),
    ({**FORWARD, "context_parallel_size": 2}, "--mc-teacher forward with --context-parallel-size 2"),
    ({**GISTNET, "mc_phase": "pooling"}, "--mc-phase pooling needs --mc-loss-pooling"),
    ({**POOLING, "mc_phase": "pooling-then-substitution"}, "--mc-pooling-samples"),
    ({**POOLING, "mc_pooling_samples": 8}, "--mc-phase pooling-then-substitution"),
    ({**POOLING, "mc_phase": "pooling-then-substitution", "mc_pooling_samples": -4}, "--mc-pooling-samples -4 must be"),
    ({**POOLING, "mc_phase": "pooling-then-substitution", "mc_pooling_samples": 3}, "multiple of --mc-variants 2"),
    ({**POOLING, "mc_phase": "pooling", "mc_loss_contrast": 1.0}, "--mc-loss-contrast has no effect with --mc-phase"),
    ({**FORWARD, "seq_length": 512, "mc_plan": "recency", "mc_variants": 1, "mc_level2_prob": None,
      "gaussian_rope_learnable_sigma": None}, "--mc-teacher forward would teach the model what it sees itself"),
    ({**GISTNET, "mc_guard_after": 1}, "--mc-guard-after 1 is too soon for --mc-gist-kind gistnet"),
    ({"mc_max_level": 1, "mc_level2_prob": None, "mc_source_length": 256, "mc_curriculum": "0:128:0.5"},
     "names a probability of level 2, which --mc-max-level 1 rules out"),
    ({**POOLING, "mc_phase": "pooling", "mc_gist_span_head": True}, "--mc-gist-span-head would never learn"),
]  # fmt: skip
"""Command lines, and what the sentence that refuses them says."""


def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path):
    lines = [small_flags(tmp_path / "text", **flags) for flags, _ in REFUSED]
    outcomes = parse_only(lines, tmp_path, world_size=2)
    for (flags, words), outcome in zip(REFUSED, outcomes, strict=True):
        assert words in refusal(outcome), flags


def test_answers_are_asked_for_by_ids_of_the_tokenizer(corpus: Path, tmp_path: Path):
    beyond, last = (small_flags(corpus, mc_loss_after_token=[3, token]) for token in (320, 319))
    refused, accepted = parse_only([beyond, last], tmp_path)
    assert "--mc-loss-after-token 320 is no id of the tokenizer, which has 320" in refusal(refused)
    assert "after_token=(3, 319)" in accepted["settings"]


def test_a_second_forward_needs_rows_that_ranks_can_share_out(tmp_path: Path):
    flags = {**FORWARD, "tensor_model_parallel_size": 2, "sequence_parallel": True, "mc_block_size": 5}
    flags |= {"mc_source_length": 255, "mc_recent_tokens": 15, "mc_horizon": 15, "mc_max_level": 1}
    [outcome] = parse_only([small_flags(tmp_path / "text", **flags)], tmp_path, world_size=2)
    assert "--mc-source-length 255 must be a multiple of --tensor-model-parallel-size 2" in refusal(outcome)


def test_objectives_become_settings(corpus: Path, tmp_path: Path):
    lines = [
        small_flags(corpus, **FORWARD, mc_loss_advantage=0.25, mc_loss_gist_rows=0.5),
        small_flags(corpus, **FORWARD, tensor_model_parallel_size=2, sequence_parallel=True),
        small_flags(corpus, **GISTNET, mc_loss_contrast=0.125),
    ]
    plain, split, gists = parse_only(lines, tmp_path, world_size=2)
    assert [each["code"] for each in (plain, split, gists)] == [0, 0, 0]
    assert "advantage=0.25, kl=1.0, contrast=0.0, pooling=0.0, gist_rows=0.5" in plain["settings"]
    assert "teacher='forward', teacher_path=None" in plain["settings"]
    assert "contrast=0.125" in gists["settings"]


@pytest.mark.parametrize("flag", ["--mc-loss-kl", "--mc-phase", "--mc-teacher-path"])
def test_objectives_need_contexts(tmp_path: Path, flag: str):
    value = {"--mc-loss-kl": "1.0", "--mc-phase": "pooling", "--mc-teacher-path": "taught"}[flag]
    line = [*small_flags(tmp_path / "text", megacontext=None, mc_source_length=None), flag, value]
    [outcome] = parse_only([line], tmp_path)
    assert "has no effect without --megacontext" in refusal(outcome)
