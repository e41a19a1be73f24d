"""Requests of encodings that are not defined, do not run or have no effect are refused by name."""

from __future__ import annotations

import pytest

from tests.small import TOKENS_ONLY

ROPE = {"position_embedding_type": "rope", "gaussian_rope_learnable_sigma": None}
NONE = {**ROPE, "position_embedding_type": "none"}
TOKENS = {**TOKENS_ONLY, **ROPE}
STRETCHED = {**ROPE, "rope_stretch": 4}


def named(name, **flags):
    return {**ROPE, "position_embedding_type": name, **flags}


ROTARY = {
    "no rule": (STRETCHED, "--rope-stretch has no effect without --rope-stretch-rule"),
    "no stretch": (named("ntk"), "--rope-stretch is needed for ntk"),
    "a shrink": (named("ntk", rope_stretch=0.5), "--rope-stretch 0.5", "at least 1"),
    "no original length": (named("yarn", rope_stretch=4), "--rope-original-length is needed for yarn"),
    "a rule of a rule": (named("ntk", rope_stretch=4, rope_stretch_rule="yarn"), "--rope-stretch-rule has no effect"),
    "a stretch of llama3": (named("llama3", rope_stretch=4), "--rope-stretch has no effect without"),
    "two scalings": (named("ntk", rope_stretch=4, use_rope_scaling=True), "--use-rope-scaling", "ntk"),
    "half of DeepSeek's form": (
        named("yarn", rope_stretch=4, rope_original_length=64, yarn_deepseek=True),
        "--yarn-deepseek needs --yarn-mscale-all-dim",
    ),
    "a factor of what has none": (
        named("yarn", rope_stretch=4, rope_original_length=64, yarn_deepseek=True, yarn_mscale_all_dim=1)
        | {"yarn_attention_factor": 1.1},
        "--yarn-attention-factor",
        "--yarn-deepseek",
    ),
    "factors of too few pairs": (
        named("longrope", rope_stretch=4, rope_original_length=64, longrope_short_factors=[1, 1]),
        "--longrope-short-factors takes 4 positive numbers",
    ),
    "no sections": (named("mrope"), "--mrope-section is needed"),
    "sections of too few pairs": (named("mrope", mrope_section=[1, 1, 1]), "--mrope-section [1, 1, 1]", "4 rotary"),
    "three axes of four pairs": (named("axial", axial_axes=3), "--axial-axes 3"),
    "whole wavelengths of learned ones": (named("grapem", rope_resonance=True), "--rope-resonance has no effect"),
    "heads alike and not": (
        named("grapem", grapem_per_head=True, grapem_share_across_heads=True),
        "--grapem-per-head and --grapem-share-across-heads contradict",
    ),
    "steps of rope": ({**ROPE, "grapem_contextual": True}, "--grapem-contextual has no effect without"),
    "a base of rope": ({**ROPE, "gaussian_rope_base": "ntk"}, "--gaussian-rope-base has no effect without"),
    "damping of rope": ({**ROPE, "gaussian_rope_sigma": "width"}, "--gaussian-rope-sigma has no effect without"),
}
BIASES = {
    "an unknown gate": ({**ROPE, "grape_a_gate": "q"}, "--grape-a-gate has no effect without --position-bias grape-a"),
    "slopes of nothing": ({**ROPE, "bias_slope_scale": 2}, "--bias-slope-scale has no effect without"),
    "slopes that rise": ({**NONE, "position_bias": ["alibi"], "bias_slope_scale": -1}, "--bias-slope-scale -1.0"),
    "grape-a twice": ({**NONE, "position_bias": ["grape-a"], "grape_a": True}, "--grape-a", "contradict"),
    "no layer for grape-a": ({**NONE, "grape_a": True, "window_size": "15,0"}, "--grape-a", "--window-size"),
    "paths over gists": ({**NONE, "position_bias": ["grape-ap"]}, "--position-bias grape-ap", "--mc-plan recency"),
    "gists that count for what": ({**NONE, "position_bias": ["cope"]}, "--cope-count is needed"),
    "wider queries than cope reads": (
        {**NONE, "position_bias": ["cope"], "cope_count": "width", "gaussian_rope_log_width_bias": True},
        "--position-bias cope",
        "--gaussian-rope-log-width-bias",
    ),
    "buckets of nothing": ({**NONE, "t5_num_buckets": 16}, "--t5-num-buckets has no effect without"),
}
FOLDED = {**NONE, "kv_channels": 16, "position_bias": ["alibi"], "bias_fold": True}
GATED = {**FOLDED, "position_bias": ["grape-a"]}
FOLDS = {
    "no bias to fold": ({**FOLDED, "position_bias": None}, "--bias-fold has no effect without a bias that is linear"),
    "no linear bias to fold": (
        {**FOLDED, "position_bias": ["fire"]},
        "--bias-fold has no effect without a bias that is linear",
    ),
    "channels that are rotated": (
        {**FOLDED, "position_embedding_type": "rope", "no_rope_freq": 2},
        "--bias-fold needs layers without rotary, and layer 1 would",
        "--no-rope-freq",
    ),
    "channels that are rotated everywhere": (
        {**FOLDED, "position_embedding_type": "rope"},
        "--bias-fold needs layers without rotary, and layers 1, 2 would",
    ),
    "gates of keys": ({**GATED, "grape_a_gate": "k"}, "--bias-fold", "--grape-a-gate k"),
    "gates of both": ({**GATED, "grape_a_gate": "qk"}, "--bias-fold", "--grape-a-gate qk"),
    "another bias beside": (
        {**FOLDED, "position_bias": ["alibi", "t5"]},
        "--bias-fold is not supported with --position-bias t5",
        "layers 1, 2",
    ),
    "another bias beside on one layer": (
        {**FOLDED, "position_bias": ["fox"], "grape_a": True, "window_size": "15,0", "window_attn_skip_freq": 2},
        "--bias-fold is not supported with --position-bias fox",
        "layer 2",
    ),
    "a frozen base": ({**FOLDED, **ROPE, "retrofit": ["slow-bands"]}, "--bias-fold with --retrofit"),
    "a sink": ({**FOLDED, "softmax_type": "off-by-one"}, "--bias-fold with --softmax-type"),
    "gradients out of range": ({**FOLDED, "fp16": True}, "--bias-fold with --fp16", "--bf16"),
    "gated heads": ({**FOLDED, "attention_output_gate": True}, "--bias-fold with --attention-output-gate"),
    "clipped weights": ({**FOLDED, "qk_clip": True}, "--bias-fold with --qk-clip"),
    "narrow heads": ({**FOLDED, "kv_channels": 8}, "--bias-fold takes 4 channels", "--kv-channels 8"),
    "scores out of range": (
        {**FOLDED, "bias_slope_scale": 257},
        "--bias-fold over 512 tokens",
        "more than 16384",
        "--bias-slope-scale",
    ),
}
SPLIT = {
    "contextual positions over ranks": (
        {**NONE, "position_bias": ["cope"], "cope_count": "width", "context_parallel_size": 2},
        "--position-bias cope",
        "--context-parallel-size 2",
    ),
    "paths over ranks": (
        {**TOKENS, "position_bias": ["grape-ap"], "context_parallel_size": 2},
        "--position-bias grape-ap",
        "--context-parallel-size 2",
    ),
    "one network in two stages": (
        {**NONE, "position_bias": ["fire"], "fire_shared": True, "pipeline_model_parallel_size": 2},
        "--fire-shared",
        "--pipeline-model-parallel-size",
    ),
}
ADDITIVE = {
    "a short table": (
        named("learned_absolute", max_position_embeddings=64),
        "--max-position-embeddings 64",
        "512 tokens of history",
    ),
    "moved places that were added": (
        named("sinusoidal", mc_gist_kind="gistnet", mc_gist_span_head=True),
        "--mc-gist-span-head",
        "sinusoidal",
    ),
    "a kernel of what is not rotated": (named("sinusoidal", mc_backend="torch"), "--mc-backend torch has no effect"),
    "a phase of what is not rotated": (
        named("sinusoidal", gaussian_rope_phase="megatron"),
        "--gaussian-rope-phase has no effect",
    ),
}
RETROFIT = {
    "no base": ({**ROPE, "retrofit": ["slow-bands"]}, "--retrofit needs --pretrained-checkpoint"),
    "another encoding": (
        {"retrofit": ["slow-bands"], "pretrained_checkpoint": "base"},
        "--pretrained-checkpoint base holds no checkpoint",
    ),
    "an optimizer in parts": (
        {**ROPE, "retrofit": ["slow-bands"], "use_distributed_optimizer": True},
        "--use-distributed-optimizer with --retrofit",
    ),
    "adapters of nothing": ({**ROPE, "retrofit_adapters": "a.safetensors"}, "--retrofit-adapters has no effect"),
    "a rank of nothing": ({**ROPE, "retrofit_lora_rank": 4}, "--retrofit-lora-rank has no effect"),
}


@pytest.mark.parametrize(
    "cases",
    [ROTARY, BIASES, FOLDS, ADDITIVE, RETROFIT],
    ids=["rotary", "biases", "folds", "additive", "retrofit"],
)
def test_encodings_that_cannot_be_had_are_refused_by_name(refused, cases):
    refused(cases)


def test_what_ranks_cannot_share_is_refused(refused):
    refused(SPLIT, world_size=2)


def test_biases_of_transformer_engine_are_refused(refused):
    on_te = {"cpu": None, "transformer_impl": "transformer_engine", "bf16": True}
    cases = {
        "a bias": ({**NONE, "position_bias": ["cope"]}, "--position-bias", "--transformer-impl local alone"),
        "a bias that is not folded": (
            {**FOLDED, "position_bias": ["t5"], "grape_a": True, "window_size": "15,0", "window_attn_skip_freq": 2},
            "--position-bias",
            "--transformer-impl local alone",
        ),
        "a folded bias, without the package": (FOLDED, "the default, without Transformer Engine"),
        "a folded bias, rounded": (
            {**FOLDED, "attention_backend": "unfused"},
            "--bias-fold with --attention-backend unfused",
        ),
        "slopes by key": (
            {**NONE, "grape_a": True, "grape_a_gate": "k"},
            "--grape-a-gate k",
            "--transformer-impl local alone",
        ),
        "steps": (named("grapem", grapem_contextual=True), "--grapem-contextual", "add --transformer-impl local"),
    }
    refused({name: ({**flags, **on_te}, *said) for name, (flags, *said) in cases.items()})
