"""What a run says of its encoding before it starts: how often bands wrap around, and how far slopes reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from megacontext_megatron.config import Settings
from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.layer_frequencies import layer_frequencies
from megacontext_megatron.position.linear_biases import alibi_slopes
from megacontext_megatron.position.wrapping import wrapping_line

SLOPED = ("alibi", "grape-a", "grape-ap")
FORGOTTEN = 20.0
"""Nats by which a bias has to lower a score for a row not to be seen."""


def encoding_lines(settings: Settings, heads: int, groups: int, num_layers: int) -> Iterator[str]:
    """Yield a line for rotary frequencies and one for each score bias; none where Megatron's own code runs."""
    if settings.gaussian is None:
        return
    length = settings.context.source_length
    if len(settings.no_rope_layers) < num_layers:
        rotary = dataclasses.replace(settings.rotary, length=length)
        yield wrapping_line(rotary, _first_frequencies(settings, heads, groups))
    for bias in settings.biases:
        yield f"score bias {bias.name} on {_layers(bias, num_layers)}{_reach(bias, heads, length)}"
    if settings.slopes_by_query(1):
        yield "score bias alibi-lora on layer 1, 0 at the start"


def _first_frequencies(settings: Settings, heads: int, groups: int) -> Tensor | None:
    """Return the frequencies, [groups, r], that layers find before they learn; None where the run fixes them."""
    if settings.rotary.by_layer is None:
        return None
    share = HeadShare(heads=heads, groups=groups, width=settings.rotary.head_dim)
    with torch.no_grad():
        return layer_frequencies(settings.rotary, share, lambda value: value, 1)(torch.device("cpu"))


def _layers(bias: BiasConfig, num_layers: int) -> str:
    if len(bias.layers) == num_layers:
        return "all layers"
    return f"layer{'s' * (len(bias.layers) > 1)} {', '.join(map(str, bias.layers))}"


def _reach(bias: BiasConfig, heads: int, length: int) -> str:
    """Return the range of a bias's slopes, and how many heads they keep from seeing the oldest of `length` tokens."""
    if bias.name == "slow-bands":
        return f", periods {', '.join(f'{period:g}' for period in bias.periods)} tokens"
    if bias.name not in SLOPED:
        return ""
    slopes = [slope * bias.slope_scale for slope in alibi_slopes(heads)]
    blind = sum(slope * length > FORGOTTEN for slope in slopes)
    return (
        f", slopes {max(slopes):.3g} to {min(slopes):.3g}: {blind} of {heads} heads lower the scores of the oldest of "
        f"{length} tokens by more than {FORGOTTEN:g} nats"
    )
