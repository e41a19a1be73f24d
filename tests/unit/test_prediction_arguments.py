"""Flags of gist prediction become settings, or are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small import parse_only, refusal, small_flags

REFUSED = {
    "--mc-predict-readout has no effect without": {"mc_predict_readout": "infonce"},
    "--mc-predict-level1 and -level2 are not supported with --pipeline-model-parallel-size 2": {
        "mc_predict_level1": 0.1,
        "pipeline_model_parallel_size": 2,
    },
    "--mc-predict-level1 -0.5 must be a finite number": {"mc_predict_level1": -0.5},
    "--mc-predict-level2 needs --mc-max-level 2": {
        "mc_predict_level2": 0.1,
        "mc_max_level": 1,
        "mc_source_length": 256,
    },
    "--mc-predict-level2 predicts the next 1024 tokens": {
        "mc_predict_level2": 0.1,
        "mc_block_size": 32,
        "gaussian_rope_learnable_sigma": None,
    },
    "no gists to predict with --mc-plan recency": {
        "mc_predict_level1": 0.1,
        "mc_plan": "recency",
        "mc_variants": 1,
        "mc_level2_prob": None,
        "gaussian_rope_learnable_sigma": None,
    },
}
ACCEPTED = {
    "level1=0.02, level2=0.0, readout='hidden'": {"mc_predict_level1": 0.02},
    "level1=0.02, level2=0.01, readout='soft-embed'": {
        "mc_predict_level1": 0.02,
        "mc_predict_level2": 0.01,
        "mc_predict_readout": "soft-embed",
    },
}


@pytest.mark.parametrize("table", [REFUSED, ACCEPTED], ids=["refused", "accepted"])
def test_flags_are_taken_or_refused_by_name(table: dict[str, dict], corpus: Path, tmp_path: Path) -> None:
    lines = [small_flags(corpus, **flags) for flags in table.values()]
    outcomes = parse_only(lines, tmp_path, world_size=2)
    for expected, outcome in zip(table, outcomes, strict=True):
        text = refusal(outcome) if table is REFUSED else outcome["settings"]
        assert expected in text
