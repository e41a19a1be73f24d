"""Rotary pairs shared out over axes, against Qwen's models and rotary-embedding-torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding as LucidrainsRotary
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megacontext_megatron.encoding_config import SectionRule
from megacontext_megatron.position import rules
from tests import oracles

EPS = torch.finfo(torch.float32).eps
HEAD_DIM, BASE, LENGTH = 128, 10_000, 4096
PAIRS = HEAD_DIM // 2


def ruled(rule, base=BASE):
    """Frequencies of a rule from plain ones that are exact in float64."""
    return rules.sectioned(rule, torch.from_numpy(oracles.inverse_frequencies(HEAD_DIM, base))).numpy()


def pair_angles(rule, places, base=BASE):
    """Angles of pairs whose axes lie at `places` [axes, n], float64 [n, r]."""
    axes = rules.section_axes(rule, PAIRS).numpy()
    return places[axes].T * ruled(rule, base)


@pytest.mark.parametrize(
    ("kind", "sections", "interleaved"),
    [
        (Qwen2VLRotaryEmbedding, (16, 24, 24), False),
        (Qwen3VLTextRotaryEmbedding, (24, 20, 20), True),
        (Qwen3VLTextRotaryEmbedding, (40, 20, 4), True),
    ],
)
def test_mrope_assigns_axes_as_qwen_does(kind, sections, interleaved):
    parameters = {"rope_type": "default", "rope_theta": 1_000_000, "mrope_section": list(sections)}
    stock = kind(SimpleNamespace(max_position_embeddings=LENGTH, rope_parameters=parameters, head_dim=HEAD_DIM))
    places = np.random.default_rng(0).integers(0, 400, (3, 7)).astype(np.float64)
    cos, sin = stock(torch.zeros(1), torch.from_numpy(places).unsqueeze(1))
    rule = SectionRule(axes=3, sections=sections, interleaved_sections=interleaved)
    angles = pair_angles(rule, places, 1_000_000)
    # The angle is a product in fp32 of up to 400.
    np.testing.assert_allclose(cos[0, :, :PAIRS].numpy(), np.cos(angles), rtol=0, atol=400 * 8 * EPS)
    np.testing.assert_allclose(sin[0, :, :PAIRS].numpy(), np.sin(angles), rtol=0, atol=400 * 8 * EPS)


@pytest.mark.parametrize("axes", [1, 2, 4])
def test_axial_restarts_on_every_axis(axes):
    rule = SectionRule(axes=axes)
    stock = LucidrainsRotary(HEAD_DIM // axes, freqs_for="lang", cache_if_possible=False)
    sides = (5, 3, 4, 2)[:axes]
    grid = stock.get_axial_freqs(*sides)[..., 0::2].reshape(-1, PAIRS).detach().numpy()
    places = np.stack([side.ravel() for side in np.meshgrid(*map(np.arange, sides), indexing="ij")]).astype(float)
    np.testing.assert_allclose(pair_angles(rule, places), grid, rtol=32 * EPS)
    own = oracles.inverse_frequencies(HEAD_DIM // axes, BASE)
    np.testing.assert_allclose(ruled(rule), np.tile(own, axes), rtol=1e-13)


@pytest.mark.parametrize("rule", [SectionRule(axes=3, sections=(16, 24, 24)), SectionRule(axes=1)])
def test_equal_axes_are_one_dimension(rule):
    places = np.tile(np.arange(9.0), (rule.axes, 1))
    expected = np.arange(9.0)[:, None] * oracles.inverse_frequencies(HEAD_DIM, BASE)
    np.testing.assert_array_equal(pair_angles(rule, places), expected)
