"""Queries and keys finished under frequency rules: factors, the start window, far places."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megacontext_megatron.config import GaussianRopeConfig, RotaryConfig
from megacontext_megatron.encoding_config import LinearRule, Llama3Rule, LongRopeRule, NtkRule, SectionRule, YarnRule
from megacontext_megatron.position.frequencies import rotary_frequencies, wavelengths
from megacontext_megatron.position.gaussian import GaussianRotary
from megacontext_megatron.spans.metadata import SpanMetadata
from tests import oracles

EPS = torch.finfo(torch.float32).eps
HEAD_DIM, LENGTH, BLOCK, FAR = 32, 1024, 32, 2**30
PAIRS = HEAD_DIM // 2
SHORT = tuple(1.0 + 0.05 * k for k in range(PAIRS))
GROWING = tuple(1.0 + 0.5 * k for k in range(PAIRS))
LONGROPE = LongRopeRule(factor=8.0, original_length=LENGTH, short_factors=SHORT, long_factors=GROWING)
YARN = YarnRule(factor=8.0, original_length=LENGTH)
DEEPSEEK = YarnRule(factor=8.0, original_length=LENGTH, mscale=1.0, mscale_all_dim=1.0, deepseek=True)

CONFIGS = {
    "linear": RotaryConfig(head_dim=HEAD_DIM, rule=LinearRule(factor=2.5)),
    "ntk": RotaryConfig(head_dim=HEAD_DIM, rule=NtkRule(factor=8.0)),
    "dynamic_ntk": RotaryConfig(head_dim=HEAD_DIM, rule=NtkRule(factor=2.0, original_length=LENGTH), length=9 * LENGTH),
    "yarn": RotaryConfig(head_dim=HEAD_DIM, rule=YARN),
    "yarn, half the head": RotaryConfig(head_dim=HEAD_DIM, percent=0.5, interleaved=True, rule=YARN),
    "deepseek, half the head": RotaryConfig(head_dim=HEAD_DIM, percent=0.5, rule=DEEPSEEK),
    "longrope": RotaryConfig(head_dim=HEAD_DIM, rule=LONGROPE, length=8 * LENGTH),
    "llama3": RotaryConfig(head_dim=HEAD_DIM, rule=Llama3Rule(factor=8.0, original_length=LENGTH)),
    "resonance": RotaryConfig(head_dim=HEAD_DIM, resonance=True),
    "resonance_yarn": RotaryConfig(head_dim=HEAD_DIM, rule=YARN, resonance=True),
    "resonance_longrope": RotaryConfig(head_dim=HEAD_DIM, rule=LONGROPE, resonance=True, length=8 * LENGTH),
    "mrope": RotaryConfig(head_dim=HEAD_DIM, rule=SectionRule(axes=3, sections=(8, 4, 4))),
    "axial": RotaryConfig(head_dim=HEAD_DIM, rule=SectionRule(axes=2)),
}
WINDOW = RotaryConfig(head_dim=HEAD_DIM, rule=replace(LONGROPE, start_tokens=16), length=8 * LENGTH)
TOLD = {"yarn": 0.1 * math.log(8) + 1, "longrope": math.sqrt(1 + math.log(8) / math.log(LENGTH))}
"""Factors on cos and sin, by a word in the name of a setting."""


def rotary(config, **settings):
    return GaussianRotary(GaussianRopeConfig(**settings), rotary_frequencies(config), config.interleaved)


def random_rows(rows, heads=2, *, seed=0, batch=1):
    return torch.randn(rows, batch, heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def tokens_at(*places):
    start = torch.tensor(places).unsqueeze(1)
    return SpanMetadata.of_nodes(start, torch.zeros_like(start), BLOCK)


def mixed_spans(shift=0):
    """Two gists and four tokens, in one column."""
    start = torch.tensor([1024, 2048, 2080, 2081, 2082, 2100]).unsqueeze(1) + shift
    return SpanMetadata.of_nodes(start, torch.tensor([2, 1, 0, 0, 0, 0]).unsqueeze(1), BLOCK)


def expected_factors(spans, omega, *, spread=1.0):
    """E[exp(i w x)] of every row in float64, [s, b, 1, r]."""
    width = spans.width.double().numpy()
    mu = spans.start.double().numpy() + (width - 1) / 2
    sigma = spread * np.vectorize(oracles.uniform_spread)(spans.width.numpy())
    return oracles.normal_expectation(omega.double().numpy(), mu[..., None, None], sigma[..., None, None])


def stored_frequencies(config):
    """Frequencies as they are stored, because phases of many radians belong to those; whole wavelengths are exact."""
    frequencies = rotary_frequencies(config)
    return 2 * math.pi / wavelengths(frequencies).round() if config.resonance else frequencies.omega


def told_factor(name):
    return next((factor for word, factor in TOLD.items() if word in name), 1.0)


def logits(module, spans, query, key):
    return torch.einsum("ibnh,jbnh->bnij", *(x.double() for x in module(query, key, spans)))


# Forward


@pytest.mark.parametrize("name", CONFIGS)
def test_finished_rows_are_the_expected_rotation_times_the_factors(name):
    config, spans = CONFIGS[name], mixed_spans()
    query, key = random_rows(6, 4), random_rows(6, 2, seed=1)
    finished = rotary(config)(query, key, spans)
    factors = told_factor(name) * expected_factors(spans, stored_frequencies(config))
    if "deepseek" in name:
        query = query * (0.1 * math.log(8) + 1) ** 2
    for ours, plain in zip(finished, (query, key), strict=True):
        expected = oracles.multiplied(plain.numpy(), factors, interleaved=config.interleaved)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=12 * EPS * plain.abs().max().item())


BY_TRANSFORMERS = {
    "linear": ("linear", {"factor": 2.5}),
    "dynamic_ntk": ("dynamic", {"factor": 2.0}),
    "yarn": ("yarn", {"factor": 8.0, "original_max_position_embeddings": LENGTH}),
    "longrope": (
        "longrope",
        {
            "factor": 8.0,
            "original_max_position_embeddings": LENGTH,
            "short_factor": list(SHORT),
            "long_factor": list(GROWING),
        },
    ),
    "llama3": (
        "llama3",
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": LENGTH,
        },
    ),
}


@pytest.mark.parametrize("name", BY_TRANSFORMERS)
@pytest.mark.parametrize("last", [LENGTH - 1, 3 * LENGTH])
def test_tokens_are_finished_as_in_transformers(name, last):
    kind, parameters = BY_TRANSFORMERS[name]
    theirs = LlamaConfig(
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": kind, "rope_theta": 10_000, **parameters},
    )
    places = [0, 1, 500, last]
    query, key = random_rows(4, 4), random_rows(4, 2, seed=1)
    cos, sin = LlamaRotaryEmbedding(theirs)(query, torch.tensor([places]))
    heads_first = [x.permute(1, 2, 0, 3) for x in (query, key)]
    expected = apply_rotary_pos_emb(heads_first[0], heads_first[1], cos, sin)
    finished = rotary(replace(CONFIGS[name], length=last + 1))(query, key, tokens_at(*places))
    for ours, other in zip(finished, expected, strict=True):
        # Their angle is rounded where it lies, at up to as many radians as the place, and so is the frequency in it.
        bound = 8 * EPS * (1 + torch.tensor(places)) * other.abs().max()
        assert bool(((ours - other.permute(2, 0, 1, 3)).abs() <= bound.view(-1, 1, 1, 1)).all())


# Gradients


def assert_gradients(config, factors, *, told, others=1.0):
    """Compare gradients of sum_ij W_ij logit_ij, a logit being told^2 Re(conj(f_i q_i) f_j k_j) + others (q_i . k_j).

    `factors` f are complex, [s, r]; the last product is that of the channels that do not turn.
    """
    weights = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).double()
    query, key = random_rows(6, 1).requires_grad_(), random_rows(6, 1, seed=1).requires_grad_()
    (logits(rotary(config), mixed_spans(), query, key)[0, 0] * weights).sum().backward()
    rows = [x.detach()[:, 0, 0].numpy() for x in (query, key)]
    split = [oracles.as_complex(x, factors.shape[-1], interleaved=config.interleaved) for x in rows]
    for leaf, weight, (numbers, passed) in ((query, weights, split[1]), (key, weights.T, split[0])):
        slope = told**2 * factors.conj() * (weight.numpy() @ (numbers * factors))
        expected = oracles.as_channels(slope, others * (weight.numpy() @ passed), interleaved=config.interleaved)
        assert leaf.grad is not None
        found = leaf.grad[:, 0, 0].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=32 * EPS * np.abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_logits_are_those_of_the_definition(name):
    config, deepseek = CONFIGS[name], 0.1 * math.log(8) + 1
    factors = expected_factors(mixed_spans(), stored_frequencies(config))[:, 0, 0]
    told, others = (deepseek, deepseek**2) if "deepseek" in name else (told_factor(name), 1.0)
    assert_gradients(config, factors, told=told, others=others)


def test_gradients_on_both_sides_of_the_windows_edge():
    config = replace(WINDOW, rule=replace(LONGROPE, start_tokens=1600))
    before, after = (
        expected_factors(mixed_spans(), stored_frequencies(replace(config, rule=rule)))[:, 0, 0]
        for rule in (None, LONGROPE)
    )
    # The centre of the first row is 1535.5.
    assert_gradients(config, np.concatenate([before[:1], after[1:]]), told=told_factor("longrope"))


# Relative law


@pytest.mark.parametrize("name", [*CONFIGS, "window"])
def test_shifting_every_row_by_2_30_tokens_changes_no_logit(name):
    module = rotary(CONFIGS.get(name, WINDOW))
    query, key = random_rows(6), random_rows(6, seed=1)
    near, far = (logits(module, mixed_spans(shift), query, key) for shift in (0, FAR))
    size = torch.einsum("ibn,jbn->bnij", query.norm(dim=-1), key.norm(dim=-1)).double()
    # Each of four angles is off by at most pi EPS / 2, every finished channel by a few roundings; factors up to 1.5.
    assert bool(((near - far).abs() <= 1.5 * 12 * EPS * size).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pair_a_million_tokens_away_has_the_logit_of_one_at_the_start(name):
    module = rotary(CONFIGS[name])
    query, key = random_rows(2), random_rows(2, seed=1)
    near, far = (logits(module, tokens_at(p, p + 40), query, key) for p in (3, 1_000_003))
    torch.testing.assert_close(near / HEAD_DIM, far / HEAD_DIM, rtol=0, atol=1e-5)


# The start window


def test_rows_before_the_window_ends_keep_the_plain_set():
    plain, ruled = (rotary(replace(WINDOW, rule=rule)) for rule in (None, LONGROPE))
    windowed, told = rotary(WINDOW), told_factor("longrope")
    start = torch.tensor([0, 15, 16, 0, 32, 900]).unsqueeze(1)
    # The centre of a block of 32 at 0 is 15.5, that of the next one 47.5.
    spans = SpanMetadata.of_nodes(start, torch.tensor([0, 0, 0, 1, 1, 0]).unsqueeze(1), BLOCK)
    early = torch.tensor([True, True, False, True, False, False])
    query, key = random_rows(6, 4), random_rows(6, 2, seed=1)
    for found, before, after in zip(*(m(query, key, spans) for m in (windowed, plain, ruled)), strict=True):
        assert torch.equal(found[~early], after[~early])
        torch.testing.assert_close(found[early], told * before[early], rtol=4 * EPS, atol=4 * EPS)
        assert not torch.equal(found[1], after[1])


def test_a_displaced_row_turns_by_the_set_of_its_window():
    spans = tokens_at(3, 400)
    displaced = replace(spans, offset=torch.tensor([[5.0], [5.0]]))
    query, key = random_rows(2), random_rows(2, seed=1)
    found = rotary(WINDOW)(query, key, displaced)
    expected = rotary(WINDOW)(query, key, tokens_at(8, 405))
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=16 * math.pi * EPS)


def test_the_relative_law_ends_at_the_windows_edge():
    module = rotary(WINDOW)
    query, key = random_rows(2), random_rows(2, seed=1)
    inside, across, outside = (logits(module, tokens_at(p, p + 10), query, key)[0, :, 1, 0] for p in (2, 10, 40))
    assert bool(((inside - across).abs() > 1e-2).all())
    assert bool(((outside - across).abs() > 1e-2).all())


def test_a_window_of_no_tokens_is_no_window():
    assert rotary_frequencies(CONFIGS["longrope"]).start is None
    assert rotary_frequencies(WINDOW).start_tokens == 16


# What the fused kernel covers


def test_factors_and_windows_are_not_fused():
    fused = {name for name, config in CONFIGS.items() if rotary_frequencies(config).fusable}
    assert fused == {"linear", "ntk", "dynamic_ntk", "llama3", "resonance", "mrope", "axial"}
    no_factor = replace(WINDOW, rule=replace(LONGROPE, attention_factor=1.0, start_tokens=1))
    assert not rotary_frequencies(no_factor).fusable


def test_moving_takes_the_window_along():
    moved = rotary_frequencies(WINDOW).to(torch.device("meta"))
    assert moved.start is not None
    assert {moved.omega.device.type, moved.start.omega.device.type} == {"meta"}
    assert (moved.start_tokens, moved.attention_factor) == (16, told_factor("longrope"))
