"""How often rotary pairs wrap around over a history, and the line that says so."""

import math

import pytest
import torch

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.encoding_config import (
    ClexConfig,
    GrapeMConfig,
    LinearRule,
    Llama3Rule,
    LongRopeRule,
    MultiscaleConfig,
    NtkRule,
    SectionRule,
    YarnRule,
)
from megacontext_megatron.position.wrapping import unfinished, wrapping_line, wraps

OMEGA = torch.tensor([1.0, 2 * math.pi / 100, 2 * math.pi / 1001], dtype=torch.float64)
ORIGINAL = {"factor": 4.0, "original_length": 512}


def test_wraps_count_turns():
    torch.testing.assert_close(
        wraps(OMEGA, 1000), torch.tensor([159.15494, 10.0, 0.999001]).double(), rtol=1e-6, atol=0
    )
    assert unfinished(OMEGA, 1000).tolist() == [False, False, True]
    assert unfinished(OMEGA, 1002).tolist() == [False, False, False]


def test_the_line_says_base_stretch_and_length():
    # Pairs have wavelengths 2 pi and 200 pi = 628.3 tokens.
    line = wrapping_line(RotaryConfig(head_dim=4, rule=LinearRule(factor=2.0), length=1000))
    assert line == (
        "rotary base 10000, stretch linear x2, history of 1000 tokens: "
        "2 pairs wrap around 79.6 to 0.796 times, 1 never complete a turn"
    )


def test_layers_may_say_their_own():
    line = wrapping_line(RotaryConfig(head_dim=4, by_layer=MultiscaleConfig(), length=1000), OMEGA.repeat(2, 1))
    assert "stretch multiscale bases 1000 to 100000" in line
    assert "6 pairs wrap around 159.2 to 0.999 times, 2 never complete a turn" in line


@pytest.mark.parametrize(
    ("settings", "stretch"),
    [
        ({}, "none"),
        ({"interpolation": 4}, "linear x4"),
        ({"llama3_factor": 8.0}, "llama3 x8 from 8192 tokens"),
        ({"rule": NtkRule(factor=4.5)}, "ntk x4.5"),
        ({"rule": NtkRule(**ORIGINAL)}, "dynamic ntk x4 from 512 tokens"),
        ({"rule": YarnRule(**ORIGINAL), "resonance": True}, "yarn x4 from 512 tokens and wavelengths of whole tokens"),
        (
            {"rule": LongRopeRule(**ORIGINAL, short_factors=(1.0, 1.0), long_factors=(1.0, 2.0))},
            "longrope x4 from 512 tokens",
        ),
        ({"rule": Llama3Rule(**ORIGINAL)}, "llama3 x4 from 512 tokens"),
        ({"rule": SectionRule(axes=2, sections=(1, 1))}, "mrope over 2 axes"),
        ({"rule": SectionRule(axes=2)}, "axial over 2 axes"),
        ({"by_layer": ClexConfig(original_length=512)}, "clex from 512 tokens"),
        ({"by_layer": GrapeMConfig()}, "grapem"),
    ],
)
def test_each_stretch_has_a_name(settings, stretch):
    line = wrapping_line(RotaryConfig(head_dim=4, length=512, **settings))
    assert f"stretch {stretch}, history of 512 tokens" in line
