"""Frequency rules: pure functions from plain rotary frequencies to those of an encoding, in float64.

`plain` is omega_i = base^(-2 i / d) for i = 0 .. r - 1, float64 [r] in radians per token, where d, the `width`, counts
the rotated channels of a head.  At a factor of 1 a rule returns `plain` to the last bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megacontext_megatron.config import ConfigError, RotaryConfig
from megacontext_megatron.encoding_config import (
    LinearRule,
    Llama3Rule,
    LongRopeRule,
    MultiscaleConfig,
    NtkRule,
    SectionRule,
    YarnRule,
)


def rotary_width(config: RotaryConfig) -> int:
    """Return d, the rotated channels of a head, as Megatron counts them."""
    return int(config.head_dim * config.percent) if config.percent < 1.0 else config.head_dim


def ruled_frequencies(config: RotaryConfig, plain: Tensor) -> Tensor:
    """Return the frequencies of `config.rule`, float64 [r]; `plain` where there is none.

    Raises ConfigError for a rule that does not fit the number of pairs.
    """
    rule, width = config.rule, rotary_width(config)
    match rule:
        case None:
            return plain
        case LinearRule():
            return linear(rule, plain)
        case NtkRule():
            return ntk(rule, plain, width, config.length)
        case YarnRule():
            return yarn(rule, plain, width, config.base)
        case LongRopeRule():
            return longrope(rule, plain, config.length)
        case Llama3Rule():
            return llama3(rule, plain)
        case SectionRule():
            return sectioned(rule, plain)


def linear(rule: LinearRule, plain: Tensor) -> Tensor:
    """Return omega_i / s (position interpolation, 2306.15595, equation 4)."""
    return plain / rule.factor


def ntk(rule: NtkRule, plain: Tensor, width: int, length: int) -> Tensor:
    """Return frequencies of the base times alpha^(d / (d - 2)): omega_i alpha^(-2 i / (d - 2)).

    alpha is s (NTK-aware, YaRN's section 3.1), or, by the `length` l of the history over the original L,
    s l / L - (s - 1) where l > L and 1 elsewhere (dynamic NTK, as transformers has it).  A single pair has the
    frequency 1 under every base.
    """
    if len(plain) == 1:
        return plain
    alpha, original = rule.factor, rule.original_length
    if original is not None:
        alpha = rule.factor * length / original - (rule.factor - 1) if length > original else 1.0
    return plain * alpha ** (-2 * _numbers(plain) / (width - 2))


def yarn(rule: YarnRule, plain: Tensor, width: int, base: float) -> Tensor:
    """Return (1 - ramp) omega_i + ramp omega_i / s, the ramp linear in the number i of a pair.

    It rises from 0 at c(beta_fast) to 1 at c(beta_slow), c(n) = d ln(L / (2 pi n)) / (2 ln base), the pair that turns n
    times over the original length L; `truncate` rounds both outwards.  That is what the authors' code and all others
    compute; equation 18 of the paper (2309.00071) ramps in L / wavelength instead.
    """

    def pair(turns: float) -> float:
        return width * math.log(rule.original_length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = pair(rule.beta_fast), pair(rule.beta_slow)
    if rule.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low > high:
        raise ConfigError(
            f"--rope-original-length {rule.original_length} leaves YaRN no pair to ramp over: raise it to the length "
            "that the base was trained on."
        )
    ramp = ((_numbers(plain) - low) / ((high - low) or 1e-3)).clamp(0, 1)
    return plain * (1 - ramp * (1 - 1 / rule.factor))


def longrope(rule: LongRopeRule, plain: Tensor, length: int) -> Tensor:
    """Return omega_i / lambda_i (2402.13753, equation 3) from the long set where the `length` exceeds the original."""
    long = rule.select == "long" or (rule.select == "by-length" and length > rule.original_length)
    name, divisors = ("long", rule.long_factors) if long else ("short", rule.short_factors)
    if len(divisors) != len(plain) or min(divisors) <= 0:
        raise ConfigError(
            f"--longrope-{name}-factors must be {len(plain)} positive numbers, one for each rotary pair, "
            f"not {len(divisors)}."
        )
    return plain / torch.tensor(divisors, dtype=torch.float64, device="cpu")


def llama3(rule: Llama3Rule, plain: Tensor) -> Tensor:
    """Return t omega_i + (1 - t) omega_i / s with t = (L / wavelength_i - low) / (high - low), from 0 to 1.

    Llama 3.1's code; there is no paper.
    """
    turns = rule.original_length * plain / (2 * math.pi)
    kept = ((turns - rule.low) / (rule.high - rule.low)).clamp(0, 1)
    return plain * (1 - (1 - kept) * (1 - 1 / rule.factor))


def sectioned(rule: SectionRule, plain: Tensor) -> Tensor:
    """Return the frequencies of pairs that belong to several axes, whose pairs section_axes names.

    Under mRoPE (Qwen2-VL, 2409.12191, section 2.1) they are the plain ones.  Under axial they restart on every axis:
    base^(-2 j / (d / axes)), which is every `axes`-th plain one.
    """
    section_axes(rule, len(plain))
    return plain if rule.sections else plain[:: rule.axes].repeat(rule.axes)


def section_axes(rule: SectionRule, pairs: int) -> Tensor:
    """Return the axis by which each of the rotary pairs turns, int64 [r]: that of its position and its spread.

    One run of pairs for each axis (axial, Qwen2-VL), or axes taking turns until each has its section's pairs, the
    first axis also all that remain (Qwen3-VL).  Raises ConfigError where pairs cannot be shared out so.
    """
    axes = torch.arange(rule.axes, device="cpu")
    if not rule.sections:
        if pairs % rule.axes:
            raise ConfigError(
                f"--axial-axes {rule.axes} does not divide the {pairs} rotary pairs: give a divisor, or change "
                "--kv-channels or --rotary-percent."
            )
        return axes.repeat_interleave(pairs // rule.axes)
    sections = torch.tensor(rule.sections, device="cpu")
    if len(sections) != rule.axes or min(rule.sections) < 0 or sum(rule.sections) != pairs:
        raise ConfigError(
            f"--mrope-section {' '.join(map(str, rule.sections))} must be {rule.axes} sizes that add up to the {pairs} "
            "rotary pairs."
        )
    if not rule.interleaved_sections:
        return axes.repeat_interleave(sections)
    number = torch.arange(pairs, device="cpu")
    axis = number % rule.axes
    axis = torch.where(number < sections[axis] * rule.axes, axis, 0)
    if not torch.equal(torch.bincount(axis, minlength=rule.axes), sections):
        raise ConfigError(
            f"--mrope-section {' '.join(map(str, rule.sections))} cannot take turns: with "
            "--mrope-interleaved-sections the first size must be the greatest."
        )
    return axis


def multiscale(config: MultiscaleConfig, groups: int, width: int) -> Tensor:
    """Return base_g^(-2 i / d), float64 [groups, r], with bases log-spaced from low to high over the query groups.

    Groups, because queries and their keys must turn alike.  One group has the geometric mean of both bases.
    """
    ends = torch.tensor([config.low, config.high], dtype=torch.float64, device="cpu").log()
    shares = (
        torch.linspace(0, 1, groups, dtype=torch.float64, device="cpu")
        if groups > 1
        else torch.full_like(ends[:1], 0.5)
    )
    log_bases = ends[0] + (ends[1] - ends[0]) * shares
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
    return torch.exp(-log_bases.unsqueeze(1) * exponents)


def resonant_wavelengths(omega: Tensor) -> Tensor:
    """Return 2 pi / omega rounded to whole tokens, half to even, int64 [...] (Resonance RoPE, 2403.00071, section 4).

    With frequencies 2 pi over these, every pair meets the same angles again after whole tokens.
    """
    return (2 * math.pi / omega).round().long()


def attention_factor(config: RotaryConfig) -> float:
    """Return what multiplies cos and sin, and so the logits twice: of YaRN and LongRoPE, else 1.

    YaRN (2309.00071, section 3.4): 0.1 ln s + 1, or a ratio of two such where both mscales are given and not 0, as in
    transformers; 1 under `deepseek`.  LongRoPE: sqrt(1 + ln s / ln L), for either set and in the start window too.
    """
    rule = config.rule
    if not isinstance(rule, YarnRule | LongRopeRule) or (isinstance(rule, YarnRule) and rule.deepseek):
        return 1.0
    if rule.attention_factor is not None:
        return rule.attention_factor
    if isinstance(rule, LongRopeRule):
        return math.sqrt(1 + math.log(rule.factor) / math.log(rule.original_length)) if rule.factor > 1 else 1.0
    if rule.mscale and rule.mscale_all_dim:
        return _mscale(rule.factor, rule.mscale) / _mscale(rule.factor, rule.mscale_all_dim)
    return _mscale(rule.factor, 1.0)


def query_factor(config: RotaryConfig) -> float:
    """Return what multiplies whole query heads: (0.1 mscale_all_dim ln s + 1)^2 under YaRN's `deepseek`, else 1.

    DeepSeek-V2 has it on the softmax scale, which is the same.
    """
    rule = config.rule
    if isinstance(rule, YarnRule) and rule.deepseek:
        return _mscale(rule.factor, rule.mscale_all_dim or 0.0) ** 2
    return 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _numbers(plain: Tensor) -> Tensor:
    return torch.arange(len(plain), dtype=torch.float64, device=plain.device)
