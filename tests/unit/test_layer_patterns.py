"""Megatron's per-layer patterns: what they choose, and which do not fit."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megacontext_megatron.config import ConfigError
from megacontext_megatron.layer_patterns import check_layer_patterns, layers_without_rope, windowed_layers

BASE = {
    "num_layers": 4, "window_size": (31, 0), "window_attn_skip_freq": None, "no_rope_freq": None, "mc_encoding": "rope",
}  # fmt: skip


def given(**changes: Any) -> Namespace:
    return Namespace(**{**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "windowed", "unrotated"),
    [
        ({}, (1, 2, 3, 4), ()),
        ({"window_attn_skip_freq": 4, "no_rope_freq": 4}, (1, 2, 3), (4,)),
        ({"window_attn_skip_freq": [0, 1, 1, 0], "no_rope_freq": [1, 0, 0, 1]}, (2, 3), (1, 4)),
        ({"window_size": None, "no_rope_freq": 2}, (), (2, 4)),
        ({"window_size": None, "window_attn_skip_freq": 4, "mc_encoding": None}, (), ()),
    ],
)
def test_patterns_choose_layers(changes: dict[str, Any], windowed: tuple[int, ...], unrotated: tuple[int, ...]):
    args = given(**changes)
    check_layer_patterns(args)
    assert windowed_layers(args) == windowed
    assert layers_without_rope(args.no_rope_freq, 4) == unrotated


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window_attn_skip_freq": [1, 0]}, "--window-attn-skip-freq has 2 entries for --num-layers 4"),
        ({"window_attn_skip_freq": [1, 1, 1, 0, 1]}, "--window-attn-skip-freq has 5 entries"),
        ({"window_attn_skip_freq": 0}, "--window-attn-skip-freq 0 must be at least 1"),
        ({"window_attn_skip_freq": 1}, "--window-attn-skip-freq 1 leaves no layer a window"),
        ({"window_attn_skip_freq": [0] * 4}, "leaves no layer a window"),
        ({"window_attn_skip_freq": 2, "window_size": None}, "no effect without --window-size"),
        ({"no_rope_freq": [1, 0]}, "--no-rope-freq has 2 entries"),
        ({"no_rope_freq": 3}, "--num-layers 4 must be a multiple of --no-rope-freq 3"),
        ({"no_rope_freq": -1, "mc_encoding": None}, "--no-rope-freq -1 must be at least 1"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        check_layer_patterns(given(**changes))
