"""Spans that gists move: where they start, how far they may move, and what reaches them from rotated queries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacontext_megatron.config import SIGMA_RULES, GaussianRopeConfig, RotaryConfig, SigmaRule
from megacontext_megatron.context.assembly import assemble_rows, gists_of
from megacontext_megatron.context.gists import embedding_rms
from megacontext_megatron.kernels import gaussian, reference
from megacontext_megatron.kernels.gaussian import FusedGaussianRotary
from megacontext_megatron.position.frequencies import RotaryFrequencies, rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary
from megacontext_megatron.spans.metadata import (
    CARRIER_COLUMNS,
    GREATEST_LOG_SCALE,
    GREATEST_OFFSET,
    SpanMetadata,
    SpanShift,
    base_sigma,
    carried_places,
    is_carrier,
)
from tests import oracles
from tests.unit.test_assembly import embeddings, planned, small
from tests.unit.test_gistnet import network, trained

HEAD_DIM = 8
HEADS, GROUPS = 4, 2
ROUNDING = 2e-4
"""Of the largest gradient: a phase of some hundred tokens is rounded to fp32, and so are sums over channels."""


def mixed_spans() -> SpanMetadata:
    """Return 6 rows of 2 contexts [2, 6]: two levels of gists and tokens, early and late."""
    level = torch.tensor([[2, 1, 1, 0, 0, 0], [1, 2, 0, 1, 0, 0]])
    start = torch.tensor([[0, 9, 12, 15, 16, 17], [300, 306, 315, 318, 321, 322]])
    return SpanMetadata.of_nodes(start, level, 3)


def raw_values(spans: SpanMetadata, seed: int = 1) -> Tensor:
    """Return what a span head might say of each row [b, s, 2], nothing of tokens."""
    raw = torch.randn(*spans.start.shape, 2, generator=torch.Generator().manual_seed(seed))
    return raw.masked_fill((spans.level == 0).unsqueeze(-1), 0.0)


@pytest.mark.parametrize("rule", SIGMA_RULES)
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
def test_a_head_that_says_nothing_moves_nothing(rule: SigmaRule, factor: float):
    """Bit for bit, so that a run with a span head starts as one without."""
    spans = mixed_spans()
    still = SpanShift.bounded(torch.zeros(*spans.start.shape, 2), spans.width)
    plain, moved = spans.pack(rule, sigma_factor=factor), spans.pack(rule, still, factor)
    assert moved.shape == (*plain.shape[:-1], len(CARRIER_COLUMNS) + 1)
    assert is_carrier(plain)
    assert is_carrier(moved)
    assert torch.equal(moved[..., :-1], plain)
    assert not moved[..., -1].any()


def test_the_head_of_a_new_network_says_nothing():
    context = small(variants=2)
    tokens, spans = embeddings(context, 2, seed=1), planned(context, 2)
    shift = assemble_rows(tokens, spans, context, network(span_head=True)).shift
    assert shift is not None
    assert torch.equal(spans.pack("uniform", shift)[..., :-1], spans.pack("uniform"))


@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e30]))
def test_moves_are_bounded(seed: int, scale: float):
    """The centre stays within a quarter of the width, the spread within a factor of four."""
    spans = mixed_spans()
    raw = scale * raw_values(spans, seed)
    shift = SpanShift.bounded(raw, spans.width)
    assert (shift.offset.dtype, shift.log_scale.dtype) == (torch.float32, torch.float32)
    assert (shift.offset.abs() <= spans.width / 4).all()
    packed = SpanMetadata.unpack(spans.pack("uniform", shift))
    base = base_sigma(spans.width, "uniform").t()
    assert packed.sigma is not None
    assert packed.offset is not None
    tokens = (spans.level == 0).t()
    assert not packed.offset[tokens].any()
    assert not packed.sigma[tokens].any()
    ratio = (packed.sigma / base)[~tokens]
    assert ((ratio > 0.2499) & (ratio < 4.001)).all()
    wanted = raw.double().tanh()
    expected = spans.width * wanted[..., 0] / 4, wanted[..., 1] * math.log(4)
    torch.testing.assert_close(shift.offset.double(), expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(shift.log_scale.double(), expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variants", [1, 3])
def test_each_row_moves_as_its_own_gist_says(variants: int):
    """Rows of both levels, against a loop; tokens stay where they are."""
    context = small(variants)
    tokens, spans = embeddings(context, 2, seed=1), planned(context, 2)
    net = trained(torch.float32, span_head=True)
    levels = gists_of(tokens, embedding_rms(tokens), context, net)
    shift = assemble_rows(tokens, spans, context, net).shift
    assert shift is not None
    seen = set()
    for row, (start, level) in enumerate(zip(spans.start.flatten(), spans.level.flatten(), strict=True)):
        number, level = row // context.window // variants, int(level)
        seen.add(level)
        raw = torch.zeros(2)
        if level:
            of_level = levels[level - 1].shift
            assert of_level is not None
            raw = of_level[int(start) // context.block_size**level, number]
        offset, log_scale = raw.double().tanh().tolist()
        found = shift.offset.flatten()[row], shift.log_scale.flatten()[row]
        expected = GREATEST_OFFSET * context.block_size**level * offset, GREATEST_LOG_SCALE * log_scale
        np.testing.assert_allclose([float(each) for each in found], expected, rtol=1e-5, atol=1e-7)
    assert seen == {0, 1, 2}


def test_carried_places_carry_gradients_where_spans_move():
    spans = mixed_spans()
    raw = raw_values(spans).requires_grad_()
    centre, sigma, offset = carried_places(spans.pack("uniform", SpanShift.bounded(raw, spans.width)))
    assert offset is not None
    assert (centre.requires_grad, sigma.requires_grad, offset.requires_grad) == (False, True, True)
    assert torch.equal(centre.long(), spans.doubled_centre.T)


Finish = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def frequencies() -> RotaryFrequencies:
    return rotary_frequencies(RotaryConfig(head_dim=HEAD_DIM))


def by_module(query: Tensor, key: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
    """Finish queries and keys as a layer in plain PyTorch does."""
    module = GaussianRotary(GaussianRopeConfig(), frequencies(), interleaved=False)
    return module(query, key, SpanMetadata.unpack(carrier))


def by_kernel(query: Tensor, key: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
    """Finish them as a layer on the kernel does, out of the mixed projection."""
    module = FusedGaussianRotary(GaussianRopeConfig(), frequencies(), interleaved=False)
    s, b = query.shape[:2]
    grouped = query.view(s, b, GROUPS, -1)
    mixed = torch.cat([grouped, key, torch.zeros_like(key)], dim=-1)
    found, keys, _ = module.split(mixed, HEAD_DIM, carrier)
    return found, keys


def by_kernel_apart(query: Tensor, key: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
    """Finish them as a layer on the kernel does whose projection Megatron splits itself."""
    module = FusedGaussianRotary(GaussianRopeConfig(), frequencies(), interleaved=False)
    return module(query, key, SpanMetadata.unpack(carrier))


def by_reference(query: Tensor, key: Tensor, carrier: Tensor) -> tuple[Tensor, Tensor]:
    """Finish them as the kernel's reference does."""
    real, gaussian.span_rotary = gaussian.span_rotary, reference.span_rotary
    try:
        return by_kernel_apart(query, key, carrier)
    finally:
        gaussian.span_rotary = real


def objective(raw: np.ndarray, query: np.ndarray, key: np.ndarray, weights: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the weighted sum of finished queries and keys of rows whose spans move by raw [b, s, 2], in float64."""
    spans = mixed_spans()
    width = spans.width.numpy().astype(np.float64)
    mu = spans.doubled_centre.numpy() / 2 + width / 4 * np.tanh(raw[..., 0])
    sigma = np.sqrt((width**2 - 1) / 12) * 4.0 ** np.tanh(raw[..., 1])
    omega = oracles.inverse_frequencies(HEAD_DIM, 10000.0)
    turn = oracles.normal_expectation(omega, mu.T[..., None, None], sigma.T[..., None, None])
    total = 0.0
    for x, weight in zip((query, key), weights, strict=True):
        pairs, _ = oracles.as_complex(x, HEAD_DIM // 2, interleaved=False)
        wanted, _ = oracles.as_complex(weight, HEAD_DIM // 2, interleaved=False)
        total += float((pairs * turn * wanted.conj()).real.sum())
    return total


@pytest.mark.parametrize("finish", [by_module, by_reference, by_kernel, by_kernel_apart])
def test_gradients_of_moves_are_finite_differences(finish: Finish):
    """Through bounds, carrier and rotation, of centre and spread, against differences of the definition."""
    spans = mixed_spans()
    generator = torch.Generator().manual_seed(3)
    s, b = spans.start.shape[1], spans.start.shape[0]
    query, weight_q = torch.randn(2, s, b, HEADS, HEAD_DIM, generator=generator)
    key, weight_k = torch.randn(2, s, b, GROUPS, HEAD_DIM, generator=generator)
    raw = raw_values(spans).requires_grad_()
    q, k = finish(query, key, spans.pack("uniform", SpanShift.bounded(raw, spans.width)))
    loss = (q * weight_q).sum() + (k * weight_k).sum()
    loss.backward()
    given = [t.double().numpy() for t in (query, key)]
    weights = weight_q.double().numpy(), weight_k.double().numpy()
    at = raw.detach().double().numpy()
    assert float(loss) == pytest.approx(objective(at, given[0], given[1], weights), rel=1e-4)
    expected, step = np.zeros_like(at), 1e-5
    for place in np.ndindex(*at.shape):
        around = [at.copy(), at.copy()]
        around[0][place] += step
        around[1][place] -= step
        high, low = (objective(each, given[0], given[1], weights) for each in around)
        expected[place] = (high - low) / (2 * step)
    assert raw.grad is not None
    gists = (spans.level > 0).numpy()
    assert np.abs(expected[gists]).min(axis=0).all()
    # A token's spread is 0 whatever scales it; its centre would move, were it not given 0.
    np.testing.assert_allclose(raw.grad.numpy(), expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


def test_a_moved_gist_is_rotated_where_it_moved_to():
    """By a quarter of its width: what a token that stands there would get, but for the damping."""
    spans = SpanMetadata.of_nodes(torch.tensor([[0]]), torch.tensor([[1]]), 8)
    far = torch.full((1, 1, 2), 30.0)
    shift = dataclasses.replace(SpanShift.bounded(far, spans.width), log_scale=torch.zeros(1, 1))
    query, key = torch.randn(2, 1, 1, 2, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    found, _ = by_module(query, key, spans.pack("none", shift))
    # The centre of tokens 0..7 is 3.5; a quarter of the width further lies 5.5, the centre of tokens 2..9.
    there = SpanMetadata.of_nodes(torch.tensor([[2]]), torch.tensor([[1]]), 8)
    expected, _ = by_module(query, key, there.pack("none"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
