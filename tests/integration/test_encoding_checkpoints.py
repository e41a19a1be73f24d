"""Checkpoints fix encodings and biases: what differs is refused by name, and a resumed run repeats every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import recording
from tests.launch import TrainResult, train
from tests.small import parse_only, refusal, small_flags

PLAIN = {"position_embedding_type": "rope", "gaussian_rope_learnable_sigma": None}
BIASED = {**PLAIN, "position_bias": ["alibi", "t5"]}
LEARNED = {
    **PLAIN,
    "position_embedding_type": "grapem",
    "grapem_per_head": True,
    "position_bias": ["grape-a", "fox"],
    "grape_a_learnable": True,
}


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory) -> Path:
    """Return the checkpoints of a run with a bias that has no parameters and one that has some."""
    place = tmp_path_factory.mktemp("saved")
    flags = small_flags(corpus, **BIASED, train_iters=1, save=place / "biased", save_interval=1)
    train(flags, workdir=place / "run").check()
    return place / "biased"


def said(corpus: Path, workdir: Path, *cases: dict[str, Any]) -> list[str]:
    """Return how command lines are refused, nothing where they are not."""
    outcomes = parse_only([small_flags(corpus, **flags) for flags in cases], workdir)
    return [refusal(outcome) if outcome["code"] else "" for outcome in outcomes]


def test_a_resume_without_a_bias_is_refused_by_name(corpus, saved, tmp_path):
    here = {"load": saved, "train_iters": 2}
    stock = {**PLAIN, "megacontext": None} | dict.fromkeys(
        ("mc_source_length", "mc_variants", "mc_block_size", "mc_recent_tokens", "mc_horizon", "mc_level2_prob")
    )
    without, other_slopes, tokens, same = said(
        corpus,
        tmp_path,
        {**PLAIN, **here},
        {**BIASED, **here, "bias_slope_scale": 0.5},
        {**stock, **here},
        {**BIASED, **here, "position_bias": ["t5", "alibi"]},
    )
    assert "--position-bias: checkpoint ['alibi', 't5'], this run []" in without
    assert "--bias-slope-scale: checkpoint 1.0, this run 0.5" in other_slopes
    assert "--position-bias: checkpoint ['alibi', 't5'], this run []" in tokens
    assert same == ""


def test_finetuning_adds_what_has_no_parameters_and_refuses_what_has(corpus, saved, tmp_path):
    here = {"load": saved, "finetune": True}
    yarn = {"rope_stretch": 4, "rope_original_length": 64, "gaussian_rope_base": "yarn"}
    fewer, stretched, fire, learned = said(
        corpus,
        tmp_path,
        {**PLAIN, **here, "position_bias": ["t5"]},
        {**BIASED, **here, **yarn, "position_embedding_type": "gaussian_rope"},
        {**BIASED, **here, "position_bias": ["alibi", "t5", "fire"]},
        {**BIASED, **here, "position_embedding_type": "grapem"},
    )
    assert (fewer, stretched) == ("", "")
    assert "--position-bias fire" in fire
    assert "--position-embedding-type" in learned


def test_a_base_with_parameters_of_the_plugin_is_no_base_of_a_retrofit(corpus, saved, tmp_path):
    [said_so] = said(corpus, tmp_path, {**PLAIN, "pretrained_checkpoint": saved, "retrofit": ["slow-bands"]})
    assert "--retrofit needs a base without parameters of the plugin" in said_so
    assert "--position-bias t5" in said_so


def test_checkpoint_arguments_restore_encoding_and_biases(corpus, saved, tmp_path):
    lines = [
        small_flags(corpus, **{**PLAIN, "load": saved, "use_checkpoint_args": True, **typed})
        for typed in ({"position_embedding_type": None}, {})
    ]
    for outcome in parse_only(lines, tmp_path):
        assert outcome["code"] == 0, refusal(outcome)
        assert "encoding='rope'" in outcome["settings"]
        assert "BiasConfig(name='alibi'" in outcome["settings"]
        assert "BiasConfig(name='t5'" in outcome["settings"]


def test_a_model_without_groups_loads_where_groups_are_not_named(corpus, tmp_path):
    alone = {**PLAIN, "group_query_attention": None, "num_query_groups": None}
    saving = small_flags(corpus, **alone, train_iters=1, save=tmp_path / "saved", save_interval=1)
    train(saving, workdir=tmp_path / "run").check()
    [resumed] = said(corpus, tmp_path / "parse", {**alone, "load": tmp_path / "saved", "train_iters": 2})
    assert resumed == ""


def test_learned_encodings_resume_bit_for_bit(corpus, tmp_path):
    def run(name: str, **flags: Any) -> TrainResult:
        values = {**LEARNED, "train_iters": 4, "save": tmp_path / "saved", "save_interval": 2, **flags}
        return train(
            small_flags(corpus, **values), workdir=tmp_path / name, before=recording.positional_gradients
        ).check()

    through = run("through")
    resumed = run("resumed", load=tmp_path / "saved", ckpt_step=2, save=None)
    assert resumed.losses == through.losses[2:]
    assert resumed.values[0] == through.values[0][2:]
