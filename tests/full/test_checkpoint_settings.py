"""What a checkpoint says of its run: restored where nothing was typed, refused or printed where it differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.full.test_checkpoints import training_rows
from tests.launch import train
from tests.parity import TP
from tests.small import (
    MICRO_BATCHES,
    TOKENS_ONLY,
    parse_only,
    refusal,
    rows,
    small_flags,
    small_training,
)

MIDDLE = 2


@pytest.fixture(scope="module")
def saved(small_run) -> Path:
    """The folder of the small run's checkpoints."""
    return small_run.save_dir


@pytest.fixture(scope="module")
def odd_settings() -> dict[str, Any]:
    """Settings of the plugin and of rotary that are no defaults, one of each kind."""
    return {
        "gaussian_rope_sigma": "half-width",
        "gaussian_rope_learnable_sigma": "head",
        "gaussian_rope_sides": "k",
        "gaussian_rope_renorm": "rms",
        "gaussian_rope_phase": "megatron",
        "gaussian_rope_log_width_bias": True,
        "mc_plan": "mix",
        "mc_level2_prob": 0.6,
        "mc_eod_policy": "no-cross",
        "rotary_base": 5000,
        "rotary_percent": 0.5,
        "no_rope_freq": "([0]*1+[1]*1)",
        "window_size": "32,0",
        "window_attn_skip_freq": 2,
        "eval_iters": 0,
    }


@pytest.fixture(scope="module")
def rope_run(corpus, tmp_path_factory):
    """A run of Megatron's own rope, with the shapes of the small run and tokens alone."""
    folder = tmp_path_factory.mktemp("rope")
    return small_training(
        corpus, folder, **TOKENS_ONLY, position_embedding_type="rope", eval_iters=0, save=folder / "checkpoints"
    ).check()


@pytest.mark.full
def test_checkpoint_arguments_restore_encoding_and_settings(corpus, tmp_path, odd_settings):
    whole = small_training(corpus, tmp_path, fresh=True, save=tmp_path / "saved", **odd_settings).check()
    kept = ("cpu", "micro_batch_size", "global_batch_size", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters")
    kept += ("train_iters", "weight_decay", "clip_grad", "eval_interval", "tokenizer_type", "vocab_size", "split")
    kept += ("null_tokenizer_eod_id", "make_vocab_size_divisible_by", "num_workers", "data_path", "data_cache_path")
    flags = {flag.replace("_", "-") for flag in kept}
    words = small_flags(corpus, **odd_settings)
    few = list(_with_values(words, flags))
    assert not [word for word in few if "position" in word or word.startswith(("--mc-", "--gaussian", "--seq-"))]
    load = ["--load", str(tmp_path / "saved"), "--ckpt-step", str(MIDDLE), "--use-checkpoint-args", "--eval-iters", "0"]
    resumed = train([*few, *load], workdir=tmp_path / "resumed", before=rows).check()
    assert resumed.losses == whole.losses[MIDDLE:]
    assert resumed.grad_norms == whole.grad_norms[MIDDLE:]
    assert training_rows(resumed) == training_rows(whole)[MIDDLE * MICRO_BATCHES :]


def _with_values(words, names):
    """Return those flags of a command line, with their values, whose names are given."""
    kept = False
    for word in words:
        if word.startswith("--"):
            kept = word.removeprefix("--") in names
        if kept:
            yield word


def test_checkpoint_arguments_restore_what_was_not_typed(corpus, saved, tmp_path):
    few = ["--cpu", "--load", str(saved), "--use-checkpoint-args", "--micro-batch-size", "2", "--train-iters", "9"]
    few += [
        "--lr",
        "1e-3",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "320",
        "--null-tokenizer-eod-id",
        "256",
    ]
    few += ["--data-path", str(corpus), "--split", "90,5,5", "--eval-interval", "2", "--eval-iters", "1"]
    lines = [few, [*few, "--gaussian-rope-sides", "k"], [*few, "--mc-variants", "1"], [*few, "--mc-horizon", "8"]]
    lines += [[*few, "--position-embedding-type", "rope"], small_flags(corpus)]
    restored, sides, variants, horizon, stock, typed = parse_only(lines, tmp_path)
    assert restored["code"] == 0, restored["err"]
    assert restored["settings"] == typed["settings"]
    assert "horizon=8" in horizon["settings"], horizon["err"]
    assert "--gaussian-rope-sides: checkpoint qk, this run k" in refusal(sides)
    assert "--mc-variants: checkpoint 2, this run 1" in refusal(variants)
    assert "--position-embedding-type" in refusal(stock)


FIXED = {
    "--mc-block-size": ({"mc_block_size": 16, "mc_source_length": 768}, "8", "16"),
    "--mc-max-level": ({"mc_max_level": 1, "mc_source_length": 256}, "2", "1"),
    "--gaussian-rope-sigma": ({"gaussian_rope_sigma": "width"}, "uniform", "width"),
    "--gaussian-rope-sides": ({"gaussian_rope_sides": "k"}, "qk", "k"),
    "--gaussian-rope-renorm": ({"gaussian_rope_renorm": "rms"}, "none", "rms"),
    "--gaussian-rope-phase": ({"gaussian_rope_phase": "megatron"}, "exact", "megatron"),
    "--gaussian-rope-learnable-sigma": ({"gaussian_rope_learnable_sigma": "head"}, "level", "head"),
    "--gaussian-rope-log-width-bias": ({"gaussian_rope_log_width_bias": True}, "False", "True"),
    "--position-embedding-type": (
        {"position_embedding_type": "rope", **TOKENS_ONLY, "seq_length": 64},
        "gaussian_rope",
        "rope",
    ),
    "--rotary-base": ({"rotary_base": 500}, "10000", "500"),
    "--rotary-percent": ({"rotary_percent": 0.5}, "1.0", "0.5"),
    "--rotary-interleaved": ({"rotary_interleaved": True}, "False", "True"),
    "--no-rope-freq": ({"no_rope_freq": 2}, "None", "2"),
    "--window-size": ({"window_size": "8,0"}, "None", "(8, 0)"),
}
RESUMED = {
    "--mc-variants": ({"mc_variants": 1}, "2", "1"),
    "--mc-source-length": ({"mc_source_length": 1024}, "512", "1024"),
    "--seq-length": ({"seq_length": 72}, "64", "72"),
    "--megacontext": ({**TOKENS_ONLY}, "True", "False"),
}
WEIGHTS = {
    "--num-layers": ({"num_layers": 4}, "2", "4"),
    "--hidden-size": ({"hidden_size": 64}, "32", "64"),
    "--ffn-hidden-size": ({"ffn_hidden_size": 96}, "64", "96"),
    "--num-query-groups": ({"num_query_groups": 4}, "2", "4"),
    "--normalization": ({"normalization": "LayerNorm"}, "RMSNorm", "LayerNorm"),
    "--qk-layernorm": ({"qk_layernorm": True}, "False", "True"),
    "--swiglu": ({"swiglu": None}, "True", "False"),
    "--disable-bias-linear": ({"disable_bias_linear": None}, "True", "False"),
    "--untie-embeddings-and-output-weights": ({"untie_embeddings_and_output_weights": True}, "False", "True"),
    "--num-experts": ({"num_experts": 2}, "None", "2"),
}
UNFIT = {"--gaussian-rope-learnable-sigma", "--gaussian-rope-log-width-bias", "--no-rope-freq", "--mc-max-level"}
"""Fixed settings that decide which positional parameters there are, so that weights cannot be taken over either."""


def _difference(flag, table):
    _, was, now = table[flag]
    return f"{flag}: checkpoint {was}, this run {now}"


def test_a_resume_with_other_settings_is_refused_by_the_name_of_each(corpus, saved, tmp_path):
    table = {**FIXED, **RESUMED, **WEIGHTS}
    lines = [small_flags(corpus, load=saved, **overrides) for overrides, _, _ in table.values()]
    both = {"gaussian_rope_sigma": "width", "mc_variants": 1, "rotary_base": 500, "num_layers": 4}
    *outcomes, several = parse_only([*lines, small_flags(corpus, load=saved, **both)], tmp_path)
    for flag, outcome in zip(table, outcomes, strict=True):
        said = refusal(outcome)
        assert str(saved) in said
        assert _difference(flag, table) in said
    said = refusal(several)
    for flag in ("--gaussian-rope-sigma", "--mc-variants", "--rotary-base", "--num-layers"):
        assert _difference(flag, table) in said


def test_finetuning_prints_each_difference_and_refuses_weights_that_do_not_fit(corpus, saved, tmp_path):
    table = {**FIXED, **RESUMED, **WEIGHTS}
    lines = [small_flags(corpus, load=saved, finetune=True, **table[flag][0]) for flag in table]
    for flag, outcome in zip(table, parse_only(lines, tmp_path), strict=True):
        if flag in WEIGHTS or flag in UNFIT:
            said = refusal(outcome)
            assert _difference(flag, table) in said
            assert "--finetune" not in said
            continue
        assert outcome["code"] == 0, outcome["err"]
        printed = [line for line in outcome["out"].splitlines() if line.startswith("> finetuning with another ")]
        assert any(_difference(flag, table) in line for line in printed) == (flag not in RESUMED)


@pytest.mark.full
def test_a_stock_checkpoint_is_refused_or_finetuned(rope_run, corpus, tmp_path):
    tokens = {**TOKENS_ONLY, "gaussian_rope_phase": "megatron"}
    learned = {"gaussian_rope_learnable_sigma": "level"}
    resumed, learning = parse_only(
        [
            small_flags(corpus, load=rope_run.save_dir, **tokens),
            small_flags(corpus, load=rope_run.save_dir, finetune=True, **learned),
        ],
        tmp_path,
    )
    assert "--position-embedding-type: checkpoint rope, this run gaussian_rope" in refusal(resumed)
    assert "--gaussian-rope-learnable-sigma: checkpoint none, this run level" in refusal(learning)
    again = {"load": rope_run.save_dir, "finetune": True, "eval_iters": 0, "train_iters": 2}
    ours = small_training(corpus, tmp_path / "ours", **again, **tokens).check()
    stock = small_training(corpus, tmp_path / "stock", **again, **TOKENS_ONLY, position_embedding_type="rope").check()
    assert "finetuning with another --position-embedding-type: checkpoint rope, this run gaussian_rope" in ours.log
    assert ours.losses == stock.losses
    assert ours.grad_norms == stock.grad_norms
    mixed = small_training(corpus, tmp_path / "mixed", **again, gaussian_rope_learnable_sigma=None).check()
    assert len(mixed.losses) == 2


def test_vocabularies_padded_differently_are_refused(corpus, saved, tmp_path):
    flags = {"load": saved, "make_vocab_size_divisible_by": 64}
    lines = [small_flags(corpus, **flags, **TP), small_flags(corpus, **flags, finetune=True, **TP)]
    lines.append(small_flags(corpus, load=saved, **TP))
    *refused, accepted = parse_only(lines, tmp_path, world_size=2)
    for outcome in refused:
        said = refusal(outcome)
        assert "padded to 320, this run's to 384" in said
        assert "--make-vocab-size-divisible-by" in said
        assert "--tensor-model-parallel-size" in said
    assert accepted["code"] == 0, accepted["err"]
