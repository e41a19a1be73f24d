"""Phases: exact modulo one turn however far the centre, or bit for bit Megatron's."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.phase import exact_angles, megatron_angles
from tests import oracles

EPS = torch.finfo(torch.float32).eps
FARTHEST = 2**52  # twice the centre 2^51
SHIFT = 2**30
NOWHERE_NEAR = 1e-2

CONFIGS = {
    "1e4": RotaryConfig(head_dim=128, base=10_000),
    "5e5": RotaryConfig(head_dim=128, base=500_000),
    "1e6": RotaryConfig(head_dim=128, base=1_000_000),
    "interpolated": RotaryConfig(head_dim=128, interpolation=3),
    "llama3": RotaryConfig(head_dim=128, base=500_000, llama3_factor=8.0),
}
doubled_centres = st.integers(0, FARTHEST)


def unit_vectors(angles):
    return torch.stack([angles.cos(), angles.sin()]).double()


@pytest.mark.parametrize("name", CONFIGS)
@given(doubled=st.lists(doubled_centres, min_size=1, max_size=4))
@example(doubled=[0, 1, 2, FARTHEST])
@example(doubled=[FARTHEST - 1, 2**31 - 1, 2**31 + 1, 2**33 - 1])
@example(doubled=[2 * 10**15 + 1, 2**24 + 1, 2**25 - 1, 3 * 2**50 + 31])
def test_exact_phase_is_within_1e_6_of_mpmath(name, doubled):
    frequencies = rotary_frequencies(CONFIGS[name])
    angles = exact_angles(torch.tensor(doubled), frequencies)
    omega = frequencies.omega.tolist()
    expected = torch.tensor([[oracles.cos_sin(w, d) for w in omega] for d in doubled], dtype=torch.float64)
    assert (unit_vectors(angles) - expected.movedim(-1, 0)).abs().max() <= 1e-6


@given(doubled=st.lists(doubled_centres, min_size=1, max_size=8))
def test_exact_phase_is_one_turn_of_fp32(doubled):
    angles = exact_angles(torch.tensor(doubled).view(-1, 1), rotary_frequencies(CONFIGS["1e4"]))
    assert angles.dtype == torch.float32
    assert angles.shape == (len(doubled), 1, 64)
    assert angles.abs().max() <= torch.tensor(math.pi)


@given(doubled_centres.filter(bool))
def test_exact_phase_of_the_mirrored_place_is_the_conjugate(doubled):
    frequencies = rotary_frequencies(CONFIGS["1e4"])
    there, mirrored = (unit_vectors(exact_angles(torch.tensor([d]), frequencies)) for d in (doubled, -doubled))
    assert (there[0] - mirrored[0]).abs().max() <= 4 * EPS
    assert (there[1] + mirrored[1]).abs().max() <= 4 * EPS


def relative_turn(rule, frequencies, centres):
    """Unit vectors of the angle between the first two of some doubled centres."""
    angles = rule(torch.tensor(centres), frequencies).double()
    return unit_vectors(angles[0] - angles[1])


@given(first=st.integers(0, 2**50), second=st.integers(0, 2**50))
def test_shifting_both_places_changes_no_relative_phase(first, second):
    frequencies = rotary_frequencies(CONFIGS["1e4"])
    near = relative_turn(exact_angles, frequencies, [first, second])
    far = relative_turn(exact_angles, frequencies, [first + 2 * SHIFT, second + 2 * SHIFT])
    # Four angles of up to pi, each rounded to fp32 once and by half a unit in the last place.
    assert (near - far).abs().max() <= 4 * math.pi * EPS / 2


def test_shifting_ruins_megatrons_phases():
    frequencies = rotary_frequencies(CONFIGS["1e4"])
    near = relative_turn(megatron_angles, frequencies, [2 * 100, 2 * 93])
    far = relative_turn(megatron_angles, frequencies, [2 * (100 + SHIFT), 2 * (93 + SHIFT)])
    assert (near - far).abs().max() > NOWHERE_NEAR


@pytest.mark.parametrize("offset", [0, 4095, 2**24 - 300])
@pytest.mark.parametrize("percent", [1.0, 0.5, 0.4])
@pytest.mark.parametrize("interpolation", [None, 2, 3])
@pytest.mark.parametrize("rule", [(10_000, None), (1_000_000, None), (500_000, 8.0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_megatron_phase_is_bit_equal_to_megatrons(offset, percent, interpolation, rule, interleaved):
    base, llama3_factor = rule
    stock = RotaryEmbedding(
        64,
        percent,
        rotary_interleaved=interleaved,
        seq_len_interpolation_factor=interpolation,
        rotary_base=base,
        rope_scaling=llama3_factor is not None,
        rope_scaling_factor=llama3_factor or 8.0,
        use_cpu_initialization=True,
    )
    frequencies = rotary_frequencies(
        RotaryConfig(
            head_dim=64,
            base=base,
            percent=percent,
            interleaved=interleaved,
            interpolation=interpolation,
            llama3_factor=llama3_factor,
        )
    )
    angles = megatron_angles(2 * torch.arange(offset, offset + 300), frequencies)
    assert torch.equal(angles, stock.get_freqs_non_repeated(300, offset))


def test_megatron_phase_knows_half_places():
    frequencies = rotary_frequencies(CONFIGS["1e4"])
    assert torch.equal(megatron_angles(torch.tensor([31]), frequencies)[0], 15.5 * frequencies.omega)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_phases_agree_where_fp32_suffices(name):
    frequencies = rotary_frequencies(CONFIGS[name])
    doubled = torch.arange(2048)
    difference = unit_vectors(exact_angles(doubled, frequencies)) - unit_vectors(megatron_angles(doubled, frequencies))
    # Megatron rounds the place, its scale and the product: each moves the angle by half a unit at most.
    bound = EPS * (4 + 1.5 * doubled.double()[:, None] / 2 * frequencies.omega.double())
    assert bool((difference.abs() <= bound).all())
