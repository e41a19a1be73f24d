"""Sanity figures of rotary pairs: how often each wraps around over a history, and which never do."""

from __future__ import annotations

import math

from torch import Tensor

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.encoding_config import (
    ClexConfig,
    FrequencyRule,
    GrapeMConfig,
    LinearRule,
    Llama3Rule,
    LongRopeRule,
    MultiscaleConfig,
    NtkRule,
    SectionRule,
    YarnRule,
)
from megacontext_megatron.position.frequencies import rotary_frequencies


def wraps(omega: Tensor, length: int) -> Tensor:
    """Return the turns that each pair makes over `length` tokens, float64 of omega's shape (radians per token)."""
    return omega.double() * (length / (2 * math.pi))


def unfinished(omega: Tensor, length: int) -> Tensor:
    """Return which pairs never complete a turn over `length` tokens, bool of omega's shape."""
    return wraps(omega, length) < 1.0


def wrapping_line(config: RotaryConfig, omega: Tensor | None = None) -> str:
    """Return one line: base, stretch, length of the history, and how often its pairs wrap around over it.

    `omega`, [r] or [groups, r] in radians per token, is given where layers find it themselves; it is copied to the CPU.
    """
    omega = (rotary_frequencies(config).omega if omega is None else omega).detach().cpu()
    turns = wraps(omega, config.length)
    fewest, most = turns.min().item(), turns.max().item()
    slow = int(unfinished(omega, config.length).sum())
    return (
        f"rotary base {config.base}, stretch {_stretch(config)}, history of {config.length} tokens: "
        f"{omega.numel()} pairs wrap around {most:.1f} to {fewest:.3g} times, {slow} never complete a turn"
    )


def _stretch(config: RotaryConfig) -> str:
    """Return what changes the frequencies, with its factor and the length it starts from; "none" where nothing does."""
    parts = []
    if config.interpolation:
        parts.append(f"linear x{config.interpolation}")
    if config.llama3_factor is not None:
        parts.append(f"llama3 x{config.llama3_factor:g} from 8192 tokens")
    if config.rule is not None:
        parts.append(_of_rule(config.rule))
    match config.by_layer:
        case MultiscaleConfig(low=low, high=high):
            parts.append(f"multiscale bases {low:g} to {high:g}")
        case ClexConfig(original_length=original):
            parts.append(f"clex from {original} tokens")
        case GrapeMConfig():
            parts.append("grapem")
    if config.resonance:
        parts.append("wavelengths of whole tokens")
    return " and ".join(parts) or "none"


def _of_rule(rule: FrequencyRule) -> str:
    match rule:
        case LinearRule(factor=factor):
            return f"linear x{factor:g}"
        case NtkRule(factor=factor, original_length=None):
            return f"ntk x{factor:g}"
        case NtkRule(factor=factor, original_length=original):
            return f"dynamic ntk x{factor:g} from {original} tokens"
        case YarnRule(factor=factor, original_length=original):
            return f"yarn x{factor:g} from {original} tokens"
        case LongRopeRule(factor=factor, original_length=original):
            return f"longrope x{factor:g} from {original} tokens"
        case Llama3Rule(factor=factor, original_length=original):
            return f"llama3 x{factor:g} from {original} tokens"
        case SectionRule(axes=axes, sections=sections):
            return f"{'mrope' if sections else 'axial'} over {axes} axes"
