"""ALiBi and GRAPE-A against the papers' equations, x-transformers and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from x_transformers.x_transformers import AlibiPositionalBias

from megacontext_megatron.encoding_config import GrapeGate
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.linear_biases import Alibi, GrapeA, alibi_slopes
from tests.bias_cases import GISTS, HEADS, TOKENS, WIDTH, Scene, assert_is, bias_of, precise

GATES: tuple[GrapeGate, ...] = ("none", "q", "k", "qk")
EPS = torch.finfo(torch.float32).eps
HEAD_COUNTS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 25, 32, 40, 48, 96, 112, 128)


@pytest.mark.parametrize("heads", HEAD_COUNTS)
def test_slopes_are_the_official_ones_for_any_number_of_heads(heads):
    ours = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    mpt = build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    assert ours.shape == (heads,)
    torch.testing.assert_close(ours, -mpt.double(), rtol=8 * EPS, atol=0)
    torch.testing.assert_close(ours, bloom.double(), rtol=64 * EPS, atol=0)
    torch.testing.assert_close(
        ours.float(), AlibiPositionalBias(heads).get_buffer("slopes").flatten(), rtol=EPS, atol=0
    )


def test_alibi_of_tokens_is_x_transformers():
    scene = Scene(widths=TOKENS)
    theirs = AlibiPositionalBias(HEADS)(len(TOKENS), len(TOKENS)).double()
    torch.testing.assert_close(scene.of(bias_of("alibi")), theirs.tril().expand(2, -1, -1, -1), rtol=EPS, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("widths", [TOKENS, GISTS])
def test_alibi_is_the_distance_of_centres_times_the_slope(widths, scale):
    def oracle(_: Any, scene: Scene):
        distance = scene.centre.t()[:, None, :, None] - scene.centre.t()[:, None, None, :]
        slopes = torch.tensor([2.0 ** (-8 * h / HEADS) for h in range(1, HEADS + 1)], dtype=torch.float64)
        return -scale * slopes[:, None, None] * distance

    assert_is(bias_of("alibi", slope_scale=scale), Scene(widths=widths), oracle)


def test_alibi_of_a_gist_is_the_mean_over_its_tokens():
    scene = Scene(widths=[32, *TOKENS])
    found = scene.of(bias_of("alibi"))[0, 0, -1, 0]
    places = torch.arange(32, dtype=torch.float64)
    torch.testing.assert_close(found, -(2.0**-2) * (41 - places).mean())


def unit(direction: torch.Tensor) -> torch.Tensor:
    """Return the direction of each head with length 1."""
    heads = direction.view(HEADS, WIDTH)
    return heads / heads.square().sum(-1, keepdim=True).sqrt()


def gates_of(bias: Any, scene: Scene):
    """Return lambda of queries and of keys, [b, np, s]; zeros where there is no such gate, halves without gates."""
    halves = torch.full((scene.batch, HEADS, len(scene.widths)), 0.5, dtype=torch.float64)
    found = []
    for direction, heads in ((bias.query_direction, scene.query), (bias.key_direction, scene.keys_by_head())):
        if direction is None:
            found.append(torch.zeros_like(halves))
        else:
            product = torch.einsum("sbhd,hd->bhs", heads, unit(direction))
            found.append(softplus(product / math.sqrt(WIDTH)))
    if bias.query_direction is None and bias.key_direction is None:
        return halves, halves
    return found


def rates_of(bias: Any) -> torch.Tensor:
    """Return omega of each head."""
    slopes = torch.tensor([2.0 ** (-8 * h / HEADS) for h in range(1, HEADS + 1)], dtype=torch.float64)
    return slopes if bias.log_slope_scale is None else slopes * bias.log_slope_scale.exp()


def equation_46(bias: Any, scene: Scene):
    """Return (j - i) omega (lambda_q + lambda_k), with centres for i and j."""
    of_query, of_key = gates_of(bias, scene)
    place = scene.centre.t()[:, None]
    return (
        (place[..., None, :] - place[..., :, None])
        * rates_of(bias)[:, None, None]
        * (of_query[..., :, None] + of_key[..., None, :])
    )


@pytest.mark.parametrize("widths", [TOKENS, GISTS])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_grape_a_is_equation_46(gate, learnable, widths):
    bias = precise(bias_of("grape-a", gate=gate, learnable_slopes=learnable))
    assert len(list(bias.parameters())) == learnable + {"none": 0, "q": 1, "k": 1, "qk": 2}[gate]
    assert_is(bias, Scene(widths=widths), equation_46)


def test_grape_a_is_the_group_action_of_equations_44_and_45():
    """Score augmented queries and keys by G(mu_q) and G(mu_k)^-T, whose generator both gates scale."""
    bias = precise(bias_of("grape-a", gate="qk", learnable_slopes=True))
    scene = Scene(widths=GISTS[1:])
    of_query, of_key = gates_of(bias, scene)
    rates, keys, found = rates_of(bias), scene.keys_by_head(), scene.of(bias)
    nilpotent = torch.zeros(WIDTH + 2, WIDTH + 2, dtype=torch.float64)
    nilpotent[-1, -2] = 1
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for b, h in ((0, 0), (1, 3)):
        for i in range(len(scene.widths)):
            for j in range(i + 1):
                query = torch.cat([scene.query[i, b, h], one, zero])
                key = torch.cat([keys[j, b, h], zero, one])
                generator = -rates[h] * (of_query[b, h, i] + of_key[b, h, j]) * nilpotent
                place_i, place_j = scene.centre[i, b], scene.centre[j, b]
                turned_key = torch.linalg.inv(torch.matrix_exp(place_j * generator)).T @ key
                score = (torch.matrix_exp(place_i * generator) @ query) @ turned_key
                expected = query[:WIDTH] @ key[:WIDTH] + found[b, h, i, j]
                torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10)


def test_grape_a_starts_as_alibi_to_the_last_bit():
    for dtype in (torch.float32, torch.float64):
        scene = Scene(widths=GISTS, dtype=dtype)
        alibi = scene.of(bias_of("alibi", slope_scale=0.3))
        for learnable in (False, True):
            assert torch.equal(scene.of(bias_of("grape-a", learnable_slopes=learnable, slope_scale=0.3)), alibi)


def test_learned_slopes_stay_positive():
    bias = bias_of("grape-a", learnable_slopes=True)
    assert isinstance(bias, GrapeA)
    assert bias.log_slope_scale is not None
    bias.log_slope_scale.data.fill_(-20.0)
    assert bool((bias.slopes(torch.ones(())) > 0).all())


@pytest.mark.parametrize("gate", ["q", "k", "qk"])
def test_gates_do_not_know_how_long_their_directions_are(gate):
    scene = Scene(widths=TOKENS)
    bias = precise(bias_of("grape-a", gate=gate))
    before = scene.of(bias)
    for parameter in bias.parameters():
        parameter.data *= 3
    torch.testing.assert_close(scene.of(bias), before)


def test_alibi_keeps_fp32_slopes_in_a_bf16_model():
    share = HeadShare(heads=12, groups=12, width=WIDTH)
    scene = Scene(widths=GISTS, heads=12, groups=12, dtype=torch.float32)
    bias = bias_of("alibi", share)
    assert isinstance(bias, Alibi)
    slopes = torch.tensor(alibi_slopes(12))
    assert not torch.equal(slopes.bfloat16().float(), slopes)
    assert torch.equal(bias.bfloat16().slopes(slopes).flatten(), slopes)
    assert torch.equal(scene.of(bias)[0, :, -1, 0], -slopes * (scene.centre[-1, 0] - scene.centre[0, 0]).float())
