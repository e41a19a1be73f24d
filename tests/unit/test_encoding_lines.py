"""What a run says of its encoding: bands that wrap around, and heads that do not see the far end."""

from __future__ import annotations

import dataclasses

import pytest

from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, RotaryConfig, Settings
from megacontext_megatron.encoding_config import BiasConfig, MultiscaleConfig, NtkRule, RetrofitConfig
from megacontext_megatron.encoding_lines import encoding_lines

HEADS, GROUPS, LAYERS = 8, 4, 2
PLAIN = Settings(
    encoding="rope",
    rotary=RotaryConfig(head_dim=64),
    context=ContextConfig(window=256, source_length=4096, block_size=8, recent_tokens=16, horizon=16),
    gaussian=GaussianRopeConfig(sigma="none"),
)


def lines(**changed: object) -> list[str]:
    return list(encoding_lines(dataclasses.replace(PLAIN, **changed), HEADS, GROUPS, LAYERS))


def test_base_stretch_and_source_stand_beside_the_turns():
    [said] = lines(rotary=RotaryConfig(head_dim=64, rule=NtkRule(factor=8.0)))
    assert "rotary base 10000, stretch ntk x8, history of 4096 tokens" in said
    assert "32 pairs wrap around 651.9 to" in said


def test_frequencies_of_a_layer_are_counted_themselves():
    [said] = lines(rotary=RotaryConfig(head_dim=64, by_layer=MultiscaleConfig()))
    assert "128 pairs wrap around 651.9 to 0.00934 times, 32 never complete a turn" in said


@pytest.mark.parametrize(("scale", "blind"), [(1.0, 7), (0.009, 0)])
def test_heads_that_a_slope_blinds_are_counted(scale, blind):
    _, said = lines(biases=(BiasConfig(name="alibi", layers=(1, 2), slope_scale=scale),))
    assert said.startswith("score bias alibi on all layers, slopes ")
    assert f": {blind} of 8 heads lower the scores of the oldest of 4096 tokens" in said


def test_other_biases_name_their_layers():
    retrofit = RetrofitConfig(parts=("alibi-lora",))
    _, slow, lora = lines(biases=(BiasConfig(name="slow-bands", layers=(2,)),), retrofit=retrofit)
    assert slow == "score bias slow-bands on layer 2, periods 1e+06, 1e+07, 1e+08, 1e+09 tokens"
    assert lora == "score bias alibi-lora on layer 1, 0 at the start"


def test_nothing_is_said_of_megatrons_own_code_or_of_what_is_not_rotated():
    assert lines(gaussian=None) == []
    assert lines(no_rope_layers=(1, 2)) == []
