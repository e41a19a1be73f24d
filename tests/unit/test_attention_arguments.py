"""Which backend computes a layer's attention: by what it is able to, or by name, and else a refusal that says why."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

import pytest

from megacontext_megatron import attention_arguments
from megacontext_megatron.attention_arguments import attention_config, attention_notices
from megacontext_megatron.config import ConfigError
from megacontext_megatron.encoding_config import BiasConfig

BASE = {
    "cpu": False, "bf16": True, "fp16": False, "attention_dropout": 0.0, "softmax_type": "vanilla",
    "gaussian_rope_log_width_bias": False, "qk_clip": False, "log_max_attention_logit": False, "cp_comm_type": ["p2p"],
    "tensor_model_parallel_size": 1, "group_query_attention": False, "num_query_groups": 1,
    "megacontext": True, "mc_block_size": 32, "mc_max_level": 2, "kv_channels": 128, "hidden_size": 512,
    "num_attention_heads": 4, "num_layers": 4, "seq_length": 1024, "context_parallel_size": 1,
    "window_size": (127, 0), "window_attn_skip_freq": 4, "transformer_impl": "local", "deterministic_mode": False,
    "mc_window_backend": "auto", "mc_global_backend": "auto", "mc_reach_skip": False, "mc_encoding": "rope",
    "mc_gist_span_head": False, "grape_a": False, "grape_a_learnable": False, "grape_a_gate": "none",
    "position_bias": [], "bias_fold": False, "retrofit": [], "qk_layernorm": False, "normalization": "RMSNorm",
}  # fmt: skip
TE = {"transformer_impl": "transformer_engine"}
A2A = {"context_parallel_size": 2, "cp_comm_type": ["a2a"]}
RING = {**TE, "context_parallel_size": 2}
GRAPE = BiasConfig(name="grape-a", layers=(4,), learnable_slopes=True)
LEARNED = {"grape_a": True, "grape_a_learnable": True}
FIRE = BiasConfig(name="fire", layers=(4,))
WINDOWS = ("triton",) * 3


def given(**changes: Any) -> Namespace:
    return Namespace(**{**BASE, **changes})


def chosen(*biases: BiasConfig, **changes: Any) -> tuple[str, ...]:
    return attention_config(given(**changes), biases).backends


@pytest.mark.parametrize(
    ("changes", "biases", "expected"),
    [
        ({}, (), (*WINDOWS, "cudnn")),
        (TE, (), (*WINDOWS, "megatron")),
        (LEARNED, (GRAPE,), (*WINDOWS, "triton")),
        ({**TE, **LEARNED}, (GRAPE,), (*WINDOWS, "triton")),
        ({**TE, **LEARNED, "bias_fold": True}, (GRAPE,), (*WINDOWS, "megatron")),
        ({**LEARNED, "bias_fold": True}, (GRAPE,), (*WINDOWS, "cudnn")),
        ({}, (FIRE,), (*WINDOWS, "megatron")),
        ({"cpu": True, "bf16": False}, (), ("megatron",) * 4),
        ({"bf16": False}, (), ("megatron",) * 4),
        ({"attention_dropout": 0.1}, (), ("megatron",) * 4),
        ({"kv_channels": 96}, (), ("megatron",) * 3 + ("cudnn",)),
        ({"kv_channels": 192}, (), ("megatron",) * 4),
        ({"deterministic_mode": True}, (), (*WINDOWS, "triton")),
        ({"context_parallel_size": 2}, (), (*WINDOWS, "triton")),
        ({"context_parallel_size": 8}, (), ("megatron",) * 3 + ("triton",)),
        ({"log_max_attention_logit": True, **TE}, (), ("megatron",) * 4),
        ({**LEARNED, "mc_block_size": 128}, (GRAPE,), (*WINDOWS, "megatron")),
        ({**LEARNED, "mc_block_size": 128, "mc_max_level": 1}, (GRAPE,), (*WINDOWS, "triton")),
        ({**LEARNED, "mc_block_size": 128, "megacontext": False}, (GRAPE,), (*WINDOWS, "triton")),
        ({**LEARNED, "mc_block_size": 128}, (dataclasses.replace(GRAPE, slope_scale=0.1),), (*WINDOWS, "triton")),
        ({**TE, "context_parallel_size": 8, "cp_comm_type": ["all_gather"]}, (), ("megatron",) * 4),
        ({"window_size": None, "window_attn_skip_freq": None}, (), ("cudnn",) * 4),
        ({"mc_window_backend": "megatron", "mc_global_backend": "triton"}, (), ("megatron",) * 3 + ("triton",)),
        ({"mc_encoding": None}, (), ()),
    ],
)
def test_the_first_that_is_able_is_chosen(changes: dict[str, Any], biases: tuple[BiasConfig, ...], expected: tuple):
    assert chosen(*biases, **changes) == expected


@pytest.mark.parametrize(
    ("changes", "biases", "said"),
    [
        ({"mc_global_backend": "cudnn", **LEARNED}, (GRAPE,), "--mc-global-backend cudnn .* layer 4: it adds no bias"),
        ({"mc_global_backend": "cudnn", "context_parallel_size": 2}, (), "one context-parallel rank's rows"),
        ({"mc_global_backend": "flex", **LEARNED}, (GRAPE,), "hundreds of times slower"),
        ({"mc_global_backend": "triton"}, (FIRE,), "linear in the distance"),
        ({"mc_window_backend": "triton", "cpu": True}, (), "--mc-window-backend triton .* layer 1: it runs on a GPU"),
        ({"mc_window_backend": "triton", "bf16": False}, (), "half precision"),
        ({"mc_window_backend": "triton", "attention_dropout": 0.1}, (), "no dropout"),
        ({"mc_window_backend": "triton", "softmax_type": "off-by-one"}, (), "--softmax-type off-by-one"),
        ({"mc_window_backend": "triton", "qk_clip": True}, (), "largest scores, which --qk-clip"),
        ({"mc_global_backend": "triton", "mc_block_size": 128}, (GRAPE,), "lower --bias-slope-scale"),
        (
            {"mc_window_backend": "megatron", **RING},
            (),
            "--mc-window-backend megatron .* layer 1: .*no sliding windows",
        ),
        (
            {"attention_dropout": 0.1, **RING, "cp_comm_type": ["a2a", "p2p", "a2a", "a2a"]},
            (),
            "auto .* layer 2 .*ring",
        ),
        ({"mc_window_backend": "triton", "context_parallel_size": 8}, (), "longer than the 64 rows of a chunk"),
        ({"mc_window_backend": "triton", "kv_channels": 96}, (), "64 or 128 channels, not of 96"),
        ({"mc_window_backend": "flex", "window_size": None}, (), "no layer attends to a window"),
        ({"mc_global_backend": "flash4"}, (), "flash-attn-4 is not installed"),
        ({**TE}, (FIRE,), "--mc-global-backend auto finds no attention for layer 4"),
        ({**TE, **A2A, "tensor_model_parallel_size": 4}, (), "layer 4 .*a multiple of --tensor-model-parallel-size"),
        ({**TE, **A2A, "group_query_attention": True}, (), "layer 4 .*whole query groups"),
        ({**TE, **A2A, **LEARNED}, (GRAPE,), "--cp-comm-type a2a has no effect"),
        ({**TE, "attention_dropout": 0.1}, (GRAPE,), "layer 4 .*add --attention-dropout 0"),
        ({**TE, "kv_channels": 96}, (GRAPE,), "layer 4 .*heads of 64 or 128 .*--bias-fold"),
        ({**LEARNED, "mc_gist_span_head": True, **TE}, (GRAPE,), "--mc-gist-span-head moves them"),
        ({"mc_reach_skip": True, **LEARNED}, (GRAPE,), "--mc-reach-skip needs --qk-layernorm"),
        (
            {"mc_reach_skip": True, "qk_layernorm": True},
            (),
            "--mc-reach-skip has no effect: no layer has linear biases",
        ),
        (
            {"mc_reach_skip": True, "qk_layernorm": True, "attention_dropout": 0.1, **LEARNED},
            (GRAPE,),
            "layer 4, which has a linear bias, does not run in the plugin's kernel: it has no dropout",
        ),
        (
            {"mc_reach_skip": True, "qk_layernorm": True, "bias_fold": True, **LEARNED},
            (GRAPE,),
            "does not run in the plugin's kernel: give --mc-global-backend triton",
        ),
        (
            {
                "mc_window_backend": "triton",
                "num_attention_heads": 256,
                "num_query_groups": 1,
                "group_query_attention": True,
            },
            (),
            "up to 128 query heads of a group, not 256",
        ),
        ({"mc_encoding": None, "mc_reach_skip": True}, (), "--mc-reach-skip has no effect without"),
        ({"mc_encoding": None, "mc_window_backend": "flex"}, (), "--mc-window-backend has no effect without"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], biases: tuple[BiasConfig, ...], said: str, monkeypatch: pytest.MonkeyPatch
):
    known = attention_arguments.find_spec
    monkeypatch.setattr(attention_arguments, "find_spec", lambda name: None if "flash" in name else known(name))
    with pytest.raises(ConfigError, match=said):
        chosen(*biases, **changes)


def test_reach_is_skipped_where_norms_bound_scores():
    config = attention_config(given(**LEARNED, mc_reach_skip=True, qk_layernorm=True), (GRAPE,))
    assert config.reach_skip
    assert config.backend_of(4) == "triton"
    assert config.backend_of(5) == "megatron"
    folded = given(**LEARNED, mc_reach_skip=True, qk_layernorm=True, bias_fold=True, mc_global_backend="triton")
    assert attention_config(folded, (GRAPE,)).reach_skip


@pytest.mark.parametrize(
    ("changes", "biases", "said"),
    [
        (LEARNED, (GRAPE,), []),
        ({"cpu": True, "bf16": False}, (GRAPE,), []),
        ({"mc_window_backend": "megatron"}, (), []),
        (
            {"attention_dropout": 0.1},
            (),
            [
                "layer 1, 2, 3, 4: dense attention instead of triton: it has no dropout; add --attention-dropout 0",
                "layer 4: dense attention instead of cudnn: it has no dropout; add --attention-dropout 0",
            ],
        ),
        (
            {"context_parallel_size": 8},
            (),
            [
                "layer 1, 2, 3: dense attention instead of triton: a window of 127 rows is longer than the 64 rows of "
                "a chunk of --context-parallel-size",
                "layer 4: triton instead of cudnn: it sees one context-parallel rank's rows alone",
            ],
        ),
        (
            {**LEARNED, "bias_fold": True, "mc_global_backend": "triton"},
            (GRAPE,),
            ["layer 4: triton adds biases to scores, and --bias-fold takes channels from heads for nothing"],
        ),
    ],
)
def test_what_is_passed_over_is_said(changes: dict[str, Any], biases: tuple[BiasConfig, ...], said: list[str]):
    args = given(**changes)
    assert attention_notices(args, biases, attention_config(args, biases)) == said
