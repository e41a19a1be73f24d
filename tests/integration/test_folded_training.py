"""Training with linear biases in queries and keys: the function that BiasedAttention computes, and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import recording
from tests.launch import TrainResult, train
from tests.small import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, parse_only, refusal, small_flags

FOLDED = {
    "position_embedding_type": "none",
    "gaussian_rope_learnable_sigma": None,
    "kv_channels": 16,
    "position_bias": ["grape-a"],
    "grape_a_learnable": True,
    "bias_slope_scale": 0.1,
    "bias_fold": True,
}
CASES: dict[str, dict[str, Any]] = {
    "learned slopes": {},
    "two biases, normed": {"position_bias": ["grape-a", "alibi"], "qk_layernorm": True},
    "gated, centred norms": {"qk_layernorm": True, "grape_a_gate": "q", "normalization": "LayerNorm"},
    "moved gists": {"mc_gist_kind": "gistnet", "mc_gist_hidden_size": 32, "mc_gist_span_head": True},
    "recomputed": {"recompute_granularity": "selective", "qk_layernorm": True},
    "all recomputed": {
        **{"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "grape_a_gate": "q",
    },
    "by layer": {
        "position_embedding_type": "rope",
        "no_rope_freq": 2,
        "window_size": "15,0",
        "window_attn_skip_freq": 2,
        "position_bias": None,
        "grape_a": True,
    },
}


def added_biases():
    """Let layers whose channels are spare add their biases to scores."""
    from megacontext_megatron.attention import layer_spec, self_attention

    layer_spec.bias_fold = self_attention.bias_fold = lambda *_: None
    return recording.positional_gradients()


def trained(corpus: Path, workdir: Path, before: Any = recording.positional_gradients, **flags: Any) -> TrainResult:
    values = {**FOLDED, "train_iters": 2, **flags}
    return train(small_flags(corpus, **values), workdir=workdir, before=before).check()


@pytest.mark.parametrize("case", CASES)
def test_folded_biases_are_added_biases(corpus, tmp_path, case):
    folded, added = (
        trained(corpus, tmp_path / name, before, **CASES[case])
        for name, before in (("folded", recording.positional_gradients), ("added", added_biases))
    )
    assert folded.losses == pytest.approx(added.losses, rel=10 * LOSS_TOLERANCE)
    assert folded.grad_norms == pytest.approx(added.grad_norms, rel=10 * GRAD_NORM_TOLERANCE)
    for ours, theirs in zip(folded.values[0], added.values[0], strict=True):
        assert any("log_slope_scale" in name for name in ours)
        for name, values in ours.items():
            assert values == pytest.approx(theirs[name], rel=1e-3, abs=1e-4 * max(map(abs, theirs[name]))), name


def test_spare_channels_change_what_a_model_computes(corpus, tmp_path):
    """So that the equality above is not of runs that both ignore the flag."""
    without = trained(corpus, tmp_path, bias_fold=None).losses
    assert trained(corpus, tmp_path / "folded").losses[0] != pytest.approx(without[0], rel=1e-3)


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory) -> dict[bool, Path]:
    """Return the checkpoints of a run with and of one without the flag."""
    place = tmp_path_factory.mktemp("saved")
    for fold in (True, False):
        name = str(fold)
        trained(corpus, place / f"run{name}", bias_fold=fold, train_iters=1, save=place / name, save_interval=1)
    return {fold: place / str(fold) for fold in (True, False)}


def said(corpus: Path, workdir: Path, *cases: dict[str, Any]) -> list[str]:
    """Return how command lines are refused, the settings where they are not."""
    outcomes = parse_only([small_flags(corpus, **{**FOLDED, "train_iters": 2, **flags}) for flags in cases], workdir)
    return [refusal(outcome) if outcome["code"] else outcome["settings"] for outcome in outcomes]


def test_a_resume_that_folds_otherwise_is_refused_by_name(corpus, saved, tmp_path):
    off, on, same, restored = said(
        corpus,
        tmp_path,
        {"load": saved[True], "bias_fold": None},
        {"load": saved[False]},
        {"load": saved[True]},
        {"load": saved[True], "bias_fold": None, "use_checkpoint_args": True},
    )
    assert "--bias-fold: checkpoint True, this run False" in off
    assert "--bias-fold: checkpoint False, this run True" in on
    assert "bias_fold=True" in same
    assert "bias_fold=True" in restored


def test_a_resumed_run_repeats_every_bit(corpus, saved, tmp_path):
    through = trained(corpus, tmp_path / "through", save=tmp_path / "saved", save_interval=1, train_iters=3)
    resumed = trained(corpus, tmp_path / "resumed", load=tmp_path / "saved", ckpt_step=1, train_iters=3)
    assert resumed.losses == through.losses[1:]
