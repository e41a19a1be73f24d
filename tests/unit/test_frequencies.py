"""Rotary frequencies: Megatron's numbers, and their exact size in turns."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.position.frequencies import rotary_frequencies, turns_per_half_token, wavelengths
from tests import oracles

EPS = torch.finfo(torch.float32).eps
ONE_TURN = 2**64

omegas = st.floats(min_value=2.0**-40, max_value=64.0, width=32)


@pytest.mark.parametrize("base", [10_000, 500_000, 1_000_000])
@pytest.mark.parametrize("interpolation", [None, 3, 8])
@pytest.mark.parametrize(("percent", "rotated"), [(1.0, 128), (0.5, 64), (0.2, 25)])
def test_frequencies_follow_the_definition(base, interpolation, percent, rotated):
    frequencies = rotary_frequencies(
        RotaryConfig(head_dim=128, base=base, percent=percent, interpolation=interpolation)
    )
    expected = oracles.inverse_frequencies(rotated, base, interpolation or 1)
    # The exponent of the base is rounded to fp32 before the power.
    np.testing.assert_allclose(frequencies.omega.numpy(), expected, rtol=EPS * (2 + math.log(base)))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_stretches_slow_pairs_only(factor):
    config = RotaryConfig(head_dim=128, base=500_000, llama3_factor=factor)
    plain = oracles.inverse_frequencies(128, 500_000)
    expected = oracles.llama3_frequencies(plain, factor)
    omega = rotary_frequencies(config).omega
    # In the mixed range the share is a difference of numbers up to 4, taken in fp32.
    np.testing.assert_allclose(omega.numpy(), expected, rtol=EPS * 64)
    assert omega[0] == 1.0
    assert omega[-1] < plain[-1] / (factor - 0.1)


@given(st.lists(omegas, min_size=1, max_size=8))
@example([1.0, 2.0**-30, 6.2831855, 12.566371, 13.0, 1e-12])
def test_turns_are_exact_to_117_bits(values):
    omega = torch.tensor(values, dtype=torch.float32)
    high, low = turns_per_half_token(omega)
    assert (high.dtype, low.dtype) == (torch.int64, torch.float64)
    assert bool(((low >= 0) & (low <= 1)).all())
    with mpmath.workprec(512):
        for value, whole, rest in zip(omega.tolist(), high.tolist(), low.tolist(), strict=True):
            turns = mpmath.mpf(value) / (4 * mpmath.pi)
            error = turns * ONE_TURN - whole - mpmath.mpf(rest)
            error -= mpmath.nint(error / ONE_TURN) * ONE_TURN
            assert abs(error) <= 2.0**-53


def test_wavelength_is_one_turn():
    frequencies = rotary_frequencies(RotaryConfig(head_dim=64))
    periods = wavelengths(frequencies)
    assert periods.dtype == torch.float64
    np.testing.assert_allclose((periods * frequencies.omega.double()).numpy(), 2 * np.pi, rtol=1e-15)
    assert periods[0].item() == pytest.approx(6.283185307, abs=1e-6)


def test_moving_takes_every_tensor_along():
    frequencies = rotary_frequencies(RotaryConfig(head_dim=8, interpolation=4))
    assert frequencies.to(torch.device("cpu")) is frequencies
    moved = frequencies.to(torch.device("meta"))
    tensors = (moved.omega, moved.turns_high, moved.turns_low, moved.unscaled)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.position_scale == 0.25


def test_frequencies_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        frequencies = rotary_frequencies(RotaryConfig(head_dim=22))
    assert {frequencies.omega.device.type, frequencies.turns_high.device.type} == {"cpu"}
