"""Resonance: wavelengths of whole tokens, so that rows a wavelength apart turn alike, however far."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.encoding_config import LongRopeRule, YarnRule
from megacontext_megatron.position import rules
from megacontext_megatron.position.frequencies import rotary_frequencies, turns_of_wavelengths, wavelengths
from megacontext_megatron.position.phase import exact_angles

EPS = torch.finfo(torch.float32).eps

RESONANT = {
    "plain": RotaryConfig(head_dim=128, resonance=True),
    "1e6": RotaryConfig(head_dim=128, base=1_000_000, resonance=True),
    "yarn": RotaryConfig(head_dim=128, resonance=True, rule=YarnRule(factor=32.0, original_length=4096)),
    "interpolated": RotaryConfig(head_dim=128, resonance=True, interpolation=3),
}


def whole_wavelengths(config):
    return wavelengths(rotary_frequencies(config)).round().long()


@pytest.mark.parametrize("name", RESONANT)
def test_every_wavelength_is_the_nearest_whole_number_of_tokens(name):
    found = wavelengths(rotary_frequencies(RESONANT[name]))
    rounded = found.round()
    np.testing.assert_allclose(found.numpy(), rounded.numpy(), rtol=EPS)
    exact = wavelengths(rotary_frequencies(replace(RESONANT[name], resonance=False)))
    # Unrounded ones follow from frequencies in fp32.
    assert bool(((rounded - exact).abs() <= 0.5 + 2 * EPS * exact).all())
    assert rounded[0] == {"interpolated": 19}.get(name, 6)


@pytest.mark.parametrize("name", RESONANT)
def test_rows_a_wavelength_apart_have_the_same_angle_to_the_last_bit(name):
    config = RESONANT[name]
    frequencies, periods = rotary_frequencies(config), whole_wavelengths(config)
    draws = torch.Generator().manual_seed(0)
    # Doubled places within the first wavelength, on the grid and between its points, and up to 2^50 beyond.
    first = torch.rand(400, len(periods), generator=draws, dtype=torch.float64).mul(2 * periods).long()
    rounds = torch.randint(1, 2**20, first.shape, generator=draws)
    rounds[-100:] = 2**50 // (2 * periods)
    for pair in range(len(periods)):
        doubled = torch.stack([first[:, pair], first[:, pair] + rounds[:, pair] * 2 * periods[pair]])
        near, far = exact_angles(doubled, frequencies)[..., pair]
        assert torch.equal(near, far)
        expected = np.exp(1j * np.pi * first[:, pair].numpy() / periods[pair].item())
        np.testing.assert_allclose(torch.polar(torch.ones_like(near), near).numpy(), expected, rtol=0, atol=4 * EPS)


def test_rounded_frequencies_alone_would_drift():
    config = RESONANT["plain"]
    stored, periods = rotary_frequencies(replace(config, resonance=False)), whole_wavelengths(config)
    drift = exact_angles(2 * periods[:1] * 10_000, stored)[0, 0]
    assert drift.abs() > 1e-2
    assert exact_angles(2 * periods[:1] * 10_000, rotary_frequencies(config))[0, 0] == 0


def test_half_a_turn_is_exact():
    high, low = turns_of_wavelengths(torch.tensor([1, 2, 6, 7]))
    assert high.tolist()[:2] == [-(2**63), 2**62]
    assert low.tolist()[:2] == [0.0, 0.0]
    for period, whole, rest in zip((6, 7), high.tolist()[2:], low.tolist()[2:], strict=True):
        assert whole == 2**63 // period
        assert rest == pytest.approx(2**63 % period / period, rel=1e-15)


def test_wavelengths_round_half_to_even():
    periods = torch.tensor([2 * math.pi, 2.5, 3.5, 1000.4999, 1000.5001, 54_410.2], dtype=torch.float64)
    rounded = rules.resonant_wavelengths(2 * math.pi / periods)
    assert rounded.tolist() == [6, 2, 4, 1000, 1001, 54_410]
    assert rounded.dtype == torch.int64


def test_both_sets_of_a_start_window_have_whole_wavelengths():
    rule = LongRopeRule(
        factor=4.0, original_length=64, short_factors=(2.5, 1.5), long_factors=(), start_tokens=8, attention_factor=1.0
    )
    found = rotary_frequencies(RotaryConfig(head_dim=4, rule=rule, resonance=True))
    assert found.start is not None
    # 2 pi and 200 pi, before and after the divisors.
    for frequencies, expected in ((found.start, [6, 628]), (found, [16, 942])):
        np.testing.assert_allclose(wavelengths(frequencies).numpy(), expected, rtol=EPS)
        assert exact_angles(torch.tensor([2 * expected[1] * 10_007]), frequencies)[0, 1] == 0
