"""Frequency rules against the definitions, transformers, x-transformers, rotary-embedding-torch and Megatron."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from rotary_embedding_torch import RotaryEmbedding as LucidrainsRotary
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from x_transformers.x_transformers import RotaryEmbedding as XRotary

from megacontext_megatron.config import ConfigError, RotaryConfig
from megacontext_megatron.encoding_config import (
    LinearRule,
    Llama3Rule,
    LongRopeRule,
    MultiscaleConfig,
    NtkRule,
    SectionRule,
    YarnRule,
)
from megacontext_megatron.position import rules
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.phase import megatron_angles
from tests import oracles

EPS = torch.finfo(torch.float32).eps
HEAD_DIM, BASE, LENGTH = 128, 10_000, 4096
PAIRS = HEAD_DIM // 2
GROWING = tuple(1.0 + 0.1 * k for k in range(PAIRS))
SHORT = tuple(1.0 + 0.01 * k for k in range(PAIRS))
LONGROPE = LongRopeRule(factor=32.0, original_length=LENGTH, short_factors=SHORT, long_factors=GROWING)


def settings(rule=None, **fields):
    return RotaryConfig(**({"head_dim": HEAD_DIM, "base": BASE, "rule": rule} | fields))


def ruled(config):
    """Frequencies of a rule from plain ones that are exact in float64."""
    plain = oracles.inverse_frequencies(rules.rotary_width(config), config.base)
    return rules.ruled_frequencies(config, torch.from_numpy(plain)).numpy()


def by_transformers(kind, config, length=None, **parameters):
    """Frequencies and the factor on cos and sin that transformers computes in fp32."""
    theirs = LlamaConfig(
        head_dim=config.head_dim,
        max_position_embeddings=LENGTH,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": config.base,
            "partial_rotary_factor": config.percent,
            **parameters,
        },
    )
    omega, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=length)
    return omega.double().numpy(), factor


def assert_as_in_fp32(ours, theirs, base, factor=1.0):
    """Powers in fp32 are as good as their exponents, which the logarithm of the base multiplies."""
    np.testing.assert_allclose(ours, theirs, rtol=EPS * (4 + 2 * math.log(base * factor)))


def yarn_by_definition(width, base, length, factor, *, fast=32.0, slow=1.0, truncate=True):
    """YaRN as its authors' code states it, pair by pair."""
    found = []
    bounds = [width * math.log(length / (2 * math.pi * n)) / (2 * math.log(base)) for n in (fast, slow)]
    if truncate:
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], width - 1)
    for k, omega in enumerate(oracles.inverse_frequencies(width, base)):
        ramp = min(max((k - low) / (high - low), 0.0), 1.0)
        found.append((1 - ramp) * omega + ramp * omega / factor)
    return np.array(found)


# Each rule


@pytest.mark.parametrize("factor", [2.0, 2.5, 32.0])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_linear(factor, percent):
    config = settings(LinearRule(factor=factor), percent=percent)
    width = int(HEAD_DIM * percent)
    np.testing.assert_array_equal(ruled(config), oracles.inverse_frequencies(width, BASE, factor))
    assert_as_in_fp32(ruled(config), by_transformers("linear", config, factor=factor)[0], BASE)
    theirs = XRotary(width, interpolation_factor=factor)(torch.ones(1))[0][0, 0, 0::2]
    assert_as_in_fp32(ruled(config), theirs.numpy(), BASE)


@pytest.mark.parametrize("factor", [2.0, 8.0, 40.0])
@pytest.mark.parametrize("percent", [1.0, 0.5])
def test_ntk(factor, percent):
    config = settings(NtkRule(factor=factor), percent=percent)
    width = int(HEAD_DIM * percent)
    ours = ruled(config)
    stretched = BASE * factor ** (width / (width - 2))
    np.testing.assert_allclose(ours, oracles.inverse_frequencies(width, stretched), rtol=1e-13)
    plain = oracles.inverse_frequencies(width, BASE)
    assert ours[0] == plain[0]
    assert ours[-1] == pytest.approx(plain[-1] / factor, rel=1e-13)
    theirs = XRotary(width, base_rescale_factor=factor)(torch.ones(1))[0][0, 0, 0::2]
    assert_as_in_fp32(ours, theirs.numpy(), BASE, factor)
    lucidrains = LucidrainsRotary(width, theta_rescale_factor=factor).freqs.detach().numpy()
    assert_as_in_fp32(ours, lucidrains, BASE, factor)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("length", [100, LENGTH, LENGTH + 1, 3 * LENGTH, 50_000])
def test_dynamic_ntk(factor, length):
    config = settings(NtkRule(factor=factor, original_length=LENGTH), length=length)
    alpha = factor * length / LENGTH - (factor - 1) if length > LENGTH else 1.0
    expected = oracles.inverse_frequencies(HEAD_DIM, BASE * alpha ** (HEAD_DIM / (HEAD_DIM - 2)))
    np.testing.assert_allclose(ruled(config), expected, rtol=1e-13)
    assert_as_in_fp32(ruled(config), by_transformers("dynamic", config, length, factor=factor)[0], BASE, alpha)


def test_a_single_pair_has_no_base():
    assert ruled(settings(NtkRule(factor=8.0), head_dim=2)).tolist() == [1.0]


YARN_SHAPES = [(1.0, 10_000, LENGTH), (0.5, 10_000, LENGTH), (1.0, 1_000_000, LENGTH)]
# Ramps that would begin before the first pair, and end behind the last channel.
YARN_SHAPES += [(1.0, 10_000, 128), (1.0, 100, 400_000)]


@pytest.mark.parametrize("shape", YARN_SHAPES)
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("numbers", [(4.0, 32.0, 1.0), (40.0, 16.0, 2.0)])
def test_yarn(shape, truncate, numbers):
    percent, base, length = shape
    factor, fast, slow = numbers
    rule = YarnRule(factor=factor, original_length=length, beta_fast=fast, beta_slow=slow, truncate=truncate)
    config = settings(rule, percent=percent, base=base)
    width = int(HEAD_DIM * percent)
    expected = yarn_by_definition(width, base, length, factor, fast=fast, slow=slow, truncate=truncate)
    np.testing.assert_allclose(ruled(config), expected, rtol=1e-13)
    parameters = {"factor": factor, "original_max_position_embeddings": length, "truncate": truncate}
    omega, attention = by_transformers("yarn", config, beta_fast=fast, beta_slow=slow, **parameters)
    assert_as_in_fp32(ruled(config), omega, base, factor)
    assert rules.attention_factor(config) == pytest.approx(attention, rel=1e-15)
    assert attention == pytest.approx(0.1 * math.log(factor) + 1)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_megatrons(truncate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    stock = YarnRotaryEmbedding(
        HEAD_DIM,
        rotary_base=BASE,
        use_cpu_initialization=True,
        scaling_factor=16.0,
        original_max_position_embeddings=LENGTH,
        mscale=1.0,
        mscale_all_dim=0.5,
        correction_range_round_to_int=truncate,
    )
    angles, factor = stock.get_emb(2)
    rule = YarnRule(factor=16.0, original_length=LENGTH, truncate=truncate, mscale=1.0, mscale_all_dim=0.5)
    assert_as_in_fp32(ruled(settings(rule)), angles[1, 0, 0, :PAIRS].numpy(), BASE, 16)
    assert rules.attention_factor(settings(rule)) == pytest.approx(factor, rel=1e-15)
    found = rotary_frequencies(settings(rule)).omega
    torch.testing.assert_close(found, angles[1, 0, 0, :PAIRS], rtol=16 * EPS, atol=0)


MSCALES = [{}, {"mscale": 0.707}, {"mscale_all_dim": 0.707}, {"mscale": 0.707, "mscale_all_dim": 0.0}]
MSCALES += [{"mscale": 0.707, "mscale_all_dim": 1.0}, {"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 2.0}]


@pytest.mark.parametrize("mscale", MSCALES, ids=str)
@pytest.mark.parametrize("factor", [0.5, 1.0, 40.0])
def test_yarn_attention_factors(mscale, factor):
    config = settings(YarnRule(factor=factor, original_length=LENGTH, **mscale))
    parameters = {"factor": factor, "original_max_position_embeddings": LENGTH}
    expected = by_transformers("yarn", config, **parameters, **mscale)[1]
    assert rules.attention_factor(config) == pytest.approx(expected, rel=1e-15)
    assert rules.query_factor(config) == 1.0


@pytest.mark.parametrize("all_dim", [None, 0.0, 0.707, 1.0])
def test_deepseek_scales_the_softmax_of_whole_heads(all_dim):
    parameters = {"rope_type": "yarn", "rope_theta": BASE, "factor": 40.0, "original_max_position_embeddings": LENGTH}
    if all_dim is not None:
        parameters |= {"mscale": all_dim, "mscale_all_dim": all_dim}
    small = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "q_lora_rank": 4, "kv_lora_rank": 4}
    small |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    attention = DeepseekV3Attention(DeepseekV3Config.from_dict(small | {"rope_parameters": parameters}), 0)
    config = settings(
        YarnRule(factor=40.0, original_length=LENGTH, mscale=all_dim, mscale_all_dim=all_dim, deepseek=True)
    )
    assert rules.query_factor(config) == pytest.approx(attention.scaling * math.sqrt(8), rel=1e-12)
    assert rules.attention_factor(config) == 1.0


@pytest.mark.parametrize("select", ["by-length", "long", "short"])
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1])
def test_longrope(select, length):
    rule = LongRopeRule(factor=32.0, original_length=LENGTH, short_factors=SHORT, long_factors=GROWING, select=select)
    config = settings(rule, length=length)
    long = select == "long" or (select == "by-length" and length == LENGTH + 1)
    divisors = np.array(GROWING if long else SHORT)
    np.testing.assert_allclose(ruled(config), oracles.inverse_frequencies(HEAD_DIM, BASE) / divisors, rtol=1e-15)
    parameters = {"factor": 32.0, "original_max_position_embeddings": LENGTH}
    parameters |= {"short_factor": list(SHORT), "long_factor": list(GROWING)}
    omega, attention = by_transformers("longrope", config, LENGTH + 1 if long else LENGTH, **parameters)
    assert_as_in_fp32(ruled(config), omega, BASE)
    assert rules.attention_factor(config) == pytest.approx(attention, rel=1e-15)


def test_longrope_attention_factors():
    # Phi-3-mini-128k: 131072 over 4096.
    assert rules.attention_factor(settings(LONGROPE)) == pytest.approx(1.190238, abs=1e-6)
    plain = LongRopeRule(factor=1.0, original_length=4, short_factors=(), long_factors=())
    cases = ((plain, 1.0), (replace(plain, factor=0.5), 1.0), (replace(plain, factor=32.0, attention_factor=1.3), 1.3))
    for rule, expected in cases:
        assert rules.attention_factor(settings(rule)) == expected


@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 2.0, 8.0, 4096)])
def test_llama3(factor, low, high, original):
    config = settings(Llama3Rule(factor=factor, low=low, high=high, original_length=original), base=500_000)
    parameters = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    omega, _ = by_transformers("llama3", config, original_max_position_embeddings=original, **parameters)
    np.testing.assert_allclose(ruled(config), omega, rtol=64 * EPS)
    if (low, high, original) == (1.0, 4.0, 8192):
        expected = oracles.llama3_frequencies(oracles.inverse_frequencies(HEAD_DIM, 500_000), factor)
        np.testing.assert_allclose(ruled(config), expected, rtol=1e-13)


# Bases of query groups


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_multiscale(groups):
    found = rules.multiscale(MultiscaleConfig(low=1e3, high=1e5), groups, HEAD_DIM).numpy()
    bases = np.geomspace(1e3, 1e5, groups) if groups > 1 else [math.sqrt(1e3 * 1e5)]
    expected = np.stack([oracles.inverse_frequencies(HEAD_DIM, base) for base in bases])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-13)


# What Megatron has, and what changes nothing


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_linear_by_a_whole_number_is_bit_equal_to_megatrons(factor):
    stock = RotaryEmbedding(HEAD_DIM, 1.0, seq_len_interpolation_factor=factor, use_cpu_initialization=True)
    found = rotary_frequencies(settings(LinearRule(factor=float(factor))))
    angles = megatron_angles(2 * torch.arange(300), found)
    assert torch.equal(angles, stock.get_freqs_non_repeated(300))
    assert torch.equal(found.omega, rotary_frequencies(settings(interpolation=factor)).omega)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_is_bit_equal_to_megatrons(factor):
    stock = RotaryEmbedding(
        HEAD_DIM, 1.0, rotary_base=500_000, rope_scaling=True, rope_scaling_factor=factor, use_cpu_initialization=True
    )
    assert torch.equal(rotary_frequencies(settings(Llama3Rule(factor=factor), base=500_000)).omega, stock.inv_freq)


ONES = (1.0,) * PAIRS
NOTHING = {
    "linear": LinearRule(factor=1.0),
    "ntk": NtkRule(factor=1.0),
    "ntk in its length": NtkRule(factor=8.0, original_length=LENGTH),
    "yarn": YarnRule(factor=1.0, original_length=LENGTH, mscale=1.0, mscale_all_dim=2.0),
    "deepseek": YarnRule(factor=1.0, original_length=LENGTH, mscale_all_dim=1.0, deepseek=True),
    "longrope": LongRopeRule(factor=1.0, original_length=LENGTH, short_factors=ONES, long_factors=ONES),
    "llama3": Llama3Rule(factor=1.0),
    "mrope": SectionRule(axes=3, sections=(16, 24, 24)),
    "axial": SectionRule(axes=1),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("base", [10_000, 500_000])
def test_factors_of_one_are_rope_to_the_last_bit(name, base):
    found = rotary_frequencies(settings(NOTHING[name], base=base, length=LENGTH))
    plain = rotary_frequencies(settings(base=base))
    for part in ("omega", "turns_high", "turns_low", "unscaled"):
        assert torch.equal(getattr(found, part), getattr(plain, part))
    assert found.position_scale == 1.0
    assert found.fusable
    unruled = oracles.inverse_frequencies(HEAD_DIM, base)
    np.testing.assert_array_equal(ruled(settings(NOTHING[name], base=base, length=LENGTH)), unruled)


def test_llama3_by_a_factor_of_one_is_rope_where_megatrons_is_not():
    wide = {"head_dim": 256, "base": 500_000}
    plain = rotary_frequencies(settings(**wide)).omega
    assert torch.equal(rotary_frequencies(settings(Llama3Rule(factor=1.0), **wide)).omega, plain)
    assert not torch.equal(rotary_frequencies(settings(llama3_factor=1.0, **wide)).omega, plain)


# Refusals


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (LongRopeRule(factor=2.0, original_length=8, short_factors=ONES[1:], long_factors=ONES), "--longrope-short"),
        (
            LongRopeRule(factor=2.0, original_length=8, short_factors=ONES, long_factors=(), select="long"),
            "--longrope-long",
        ),
        (LongRopeRule(factor=2.0, original_length=8, short_factors=(*ONES[1:], 0.0), long_factors=()), "positive"),
        (SectionRule(axes=3), "--axial-axes 3"),
        (SectionRule(axes=3, sections=(16, 24, 23)), "--mrope-section 16 24 23"),
        (SectionRule(axes=2, sections=(16, 24, 24)), "must be 2 sizes"),
        (SectionRule(axes=3, sections=(16, 24, 24), interleaved_sections=True), "first size"),
        (YarnRule(factor=2.0, original_length=5), "--rope-original-length 5"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule, words):
    with pytest.raises(ConfigError, match=words):
        rotary_frequencies(settings(rule))


@pytest.mark.parametrize("stretch", [{"interpolation": 2}, {"llama3_factor": 8.0}])
def test_a_rule_beside_a_stretch_of_megatrons_is_refused(stretch):
    with pytest.raises(ConfigError, match="--rotary-seq-len-interpolation-factor and --use-rope-scaling"):
        rotary_frequencies(settings(NtkRule(factor=2.0), **stretch))
