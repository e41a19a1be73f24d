"""Every flag of an encoding reaches the settings that the model is built from."""

from __future__ import annotations

import dataclasses

import pytest

from megacontext_megatron.encoding_flags import ENCODING_FLAGS
from tests.small import parse_only, refusal, small_flags

PLAIN = {"position_embedding_type": "rope", "gaussian_rope_learnable_sigma": None}
LENGTH = {"rope_stretch": 4, "rope_original_length": 64}
FACTORS = [1, 1, 2, 3]


def named(name, **flags):
    return {**PLAIN, "position_embedding_type": name, **flags}


YARN = named("yarn", **LENGTH)
LONGROPE = named("longrope", **LENGTH, longrope_short_factors=FACTORS, longrope_long_factors=FACTORS)
CLEX = named("clex", rope_original_length=64)
GRAPEM = named("grapem")


def biased(*names, **flags):
    return {**PLAIN, "position_bias": list(names), **flags}


CASES = {
    "gaussian_rope_base": ({}, {"gaussian_rope_base": "multiscale"}, "MultiscaleConfig("),
    "rope_stretch": (named("ntk", rope_stretch=4), {"rope_stretch": 2}, "NtkRule(factor=2.0"),
    "rope_stretch_rule": (PLAIN, {"rope_stretch": 4, "rope_stretch_rule": "linear"}, "LinearRule(factor=4.0)"),
    "rope_original_length": (YARN, {"rope_original_length": 32}, "original_length=32"),
    "rope_resonance": (PLAIN, {"rope_resonance": True}, "resonance=True"),
    "yarn_mscale": (YARN, {"yarn_mscale": 0.7}, "mscale=0.7"),
    "yarn_mscale_all_dim": (YARN, {"yarn_mscale_all_dim": 0.7}, "mscale_all_dim=0.7"),
    "yarn_attention_factor": (YARN, {"yarn_attention_factor": 1.2}, "attention_factor=1.2"),
    "yarn_deepseek": ({**YARN, "yarn_mscale_all_dim": 1}, {"yarn_deepseek": True}, "deepseek=True"),
    "longrope_short_factors": (LONGROPE, {"longrope_short_factors": [1, 2, 3, 4]}, "(1.0, 2.0, 3.0, 4.0)"),
    "longrope_long_factors": (LONGROPE, {"longrope_long_factors": [1, 2, 3, 5]}, "(1.0, 2.0, 3.0, 5.0)"),
    "longrope_select": (LONGROPE, {"longrope_select": "long"}, "select='long'"),
    "longrope_start_tokens": (LONGROPE, {"longrope_start_tokens": 8}, "start_tokens=8"),
    "longrope_attention_factor": (LONGROPE, {"longrope_attention_factor": 1.3}, "attention_factor=1.3"),
    "llama3_low_factor": (named("llama3"), {"llama3_low_factor": 2}, "low=2.0"),
    "llama3_high_factor": (named("llama3"), {"llama3_high_factor": 8}, "high=8.0"),
    "multiscale_low": (named("multiscale"), {"multiscale_low": 500}, "low=500.0"),
    "multiscale_high": (named("multiscale"), {"multiscale_high": 5e5}, "high=500000.0"),
    "clex_hidden_factor": (CLEX, {"clex_hidden_factor": 2}, "hidden_factor=2.0"),
    "clex_activation": (CLEX, {"clex_activation": "silu"}, "activation='silu'"),
    "clex_max_t": (CLEX, {"clex_max_t": 4}, "max_t=4"),
    "axial_axes": (named("axial"), {"axial_axes": 4}, "axes=4"),
    "mrope_interleaved_sections": (
        named("mrope", mrope_section=[2, 1, 1]),
        {"mrope_interleaved_sections": True},
        "interleaved_sections=True",
    ),
    "grapem_learnable_freq": (GRAPEM, {"no_grapem_learnable_freq": True}, "learnable=False"),
    "grapem_per_head": (GRAPEM, {"grapem_per_head": True}, "per_head=True"),
    "grapem_log_freq_scale": (GRAPEM, {"grapem_log_freq_scale": 8}, "log_freq_scale=8.0"),
    "grapem_contextual": (GRAPEM, {"grapem_contextual": True}, "contextual=True"),
    "position_bias": (PLAIN, {"position_bias": ["alibi"]}, "BiasConfig(name='alibi', layers=(1, 2)"),
    "grape_a": (
        {**PLAIN, "window_size": "15,0", "window_attn_skip_freq": 2},
        {"grape_a": True},
        "BiasConfig(name='grape-a', layers=(2,)",
    ),
    "grape_a_gate": (biased("grape-a"), {"grape_a_gate": "k"}, "gate='k'"),
    "grape_a_learnable": (biased("grape-a"), {"grape_a_learnable": True}, "learnable_slopes=True"),
    "bias_slope_scale": (biased("alibi"), {"bias_slope_scale": 0.5}, "slope_scale=0.5"),
    "bias_fold": (
        {**PLAIN, "position_embedding_type": "none", "position_bias": ["alibi"], "kv_channels": 16},
        {"bias_fold": True},
        "bias_fold=True",
    ),
    "t5_num_buckets": (biased("t5"), {"t5_num_buckets": 16}, "t5_buckets=16"),
    "t5_max_distance": (biased("t5"), {"t5_max_distance": 64}, "t5_max_distance=64"),
    "fire_hidden_size": (biased("fire"), {"fire_hidden_size": 16}, "fire_hidden=16"),
    "fire_num_layers": (biased("fire"), {"fire_num_layers": 2}, "fire_layers=2"),
    "fire_length": (biased("fire"), {"fire_length": 64}, "fire_length=64"),
    "fire_shared": (biased("fire"), {"fire_shared": True}, "fire_shared=True"),
    "cope_positions": (biased("cope", cope_count="entry"), {"cope_positions": 32}, "cope_positions=32"),
    "cope_count": (biased("cope", cope_count="entry"), {"cope_count": "width"}, "cope_count='width'"),
    "slow_band_periods": (biased("slow-bands"), {"slow_band_periods": [10, 100]}, "periods=(10.0, 100.0)"),
    "sinusoidal_scale": (named("sinusoidal"), {"sinusoidal_scale": 0.1}, "scale=0.1"),
    "learned_absolute_interpolate": (
        named("learned_absolute", max_position_embeddings=512),
        {"learned_absolute_interpolate": True},
        "interpolate=True",
    ),
}
WITHOUT_A_CASE = {
    # the default, spelled out
    "grapem_share_across_heads",
    # read where there is a base: tests/integration/test_retrofit.py
    *("retrofit", "retrofit_lora_rank", "retrofit_lora_length", "retrofit_adapters"),
}


def test_every_flag_has_a_case():
    names = {field.name for group in ENCODING_FLAGS for field in dataclasses.fields(group)}
    assert names == CASES.keys() | WITHOUT_A_CASE


@pytest.fixture(scope="module")
def settings(corpus, tmp_path_factory):
    """Return the settings of every case, before and after its change, from one process."""
    changes = [{**before, **change} for before, change, _ in CASES.values()]
    lines = [small_flags(corpus, **flags) for flags in [*(before for before, *_ in CASES.values()), *changes]]
    outcomes = parse_only(lines, tmp_path_factory.mktemp("parse"))
    for line, outcome in zip(lines, outcomes, strict=True):
        assert outcome["code"] == 0, (line, refusal(outcome))
    made = [outcome["settings"] for outcome in outcomes]
    return dict(zip(CASES, zip(made[: len(CASES)], made[len(CASES) :], strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_flag_changes_the_settings(settings, name):
    before, after = settings[name]
    said = CASES[name][2]
    assert said in after
    assert before != after
    assert said not in before
