"""The one source of rotary frequencies: Megatron's own, the rules applied to them, and their exact size in turns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import mpmath
import torch
from torch import Tensor

from megacontext_megatron.config import ConfigError, RotaryConfig
from megacontext_megatron.encoding_config import LinearRule, Llama3Rule, LongRopeRule
from megacontext_megatron.position.rules import attention_factor, query_factor, resonant_wavelengths, ruled_frequencies

_WORD = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryFrequencies:
    """Rotary frequencies of one layer, [r] for r rotary pairs.

    `omega` fp32, radians per token, as stored (interpolation included).  `turns_high` int64 and `turns_low` float64
    hold the turns per half token, modulo one turn, in units of 2^-64 turn: the whole and the fractional part.
    `unscaled` fp32 and `position_scale` are what Megatron multiplies one after the other.  `attention_factor`
    multiplies cos and sin of queries and keys, `query_factor` whole query heads.  Rows whose centre lies before
    `start_tokens` turn by `start` instead, where there is one.
    """

    omega: Tensor
    turns_high: Tensor
    turns_low: Tensor
    unscaled: Tensor
    position_scale: float = 1.0
    attention_factor: float = 1.0
    query_factor: float = 1.0
    start: RotaryFrequencies | None = None
    start_tokens: int = 0

    @property
    def fusable(self) -> bool:
        """Whether the fused kernel computes it: one set for all rows, and no factors."""
        return self.attention_factor == 1.0 and self.query_factor == 1.0 and self.start is None

    def to(self, device: torch.device) -> RotaryFrequencies:
        """Return the same frequencies on `device`."""
        if self.omega.device == device:
            return self
        return replace(
            self,
            omega=self.omega.to(device),
            turns_high=self.turns_high.to(device),
            turns_low=self.turns_low.to(device),
            unscaled=self.unscaled.to(device),
            start=None if self.start is None else self.start.to(device),
        )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rotary_frequencies(config: RotaryConfig) -> RotaryFrequencies:
    """Return the frequencies of `config` on the CPU: Megatron's own, on which `rule` and `resonance` act in float64.

    What Megatron has itself is computed by Megatron, to the same bits.  Frequencies that layers find themselves are
    not made here.  Raises ConfigError for a rule beside a stretch of Megatron's, or one that does not fit.
    """
    stretch, config = _in_megatrons_terms(config)
    stock, scale = _inverse_frequencies(config), 1.0 / stretch
    if config.rule is None and not config.resonance:
        omega = stock * scale
        high, low = turns_per_half_token(omega)
        return RotaryFrequencies(omega=omega, turns_high=high, turns_low=low, unscaled=stock, position_scale=scale)
    plain = stock.double() / stretch
    frequencies = replace(
        _of(ruled_frequencies(config, plain), resonance=config.resonance),
        attention_factor=attention_factor(config),
        query_factor=query_factor(config),
    )
    if isinstance(config.rule, LongRopeRule) and config.rule.start_tokens > 0:
        start = _of(plain, resonance=config.resonance)
        return replace(frequencies, start=start, start_tokens=config.rule.start_tokens)
    return frequencies


def _in_megatrons_terms(config: RotaryConfig) -> tuple[float, RotaryConfig]:
    """Return by how much Megatron divides positions, and `config` without a rule where Megatron has it."""
    rule = config.rule
    if rule is None:
        return config.interpolation or 1.0, config
    if config.interpolation or config.llama3_factor is not None:
        raise ConfigError(
            "--rotary-seq-len-interpolation-factor and --use-rope-scaling already change the frequencies: leave them "
            "out beside another frequency rule."
        )
    if isinstance(rule, LinearRule):
        return rule.factor, replace(config, rule=None)
    # At a factor of 1 Megatron's blend is not the identity to the last bit.
    if isinstance(rule, Llama3Rule) and rule == Llama3Rule(factor=rule.factor) and rule.factor != 1.0:
        return 1.0, replace(config, rule=None, llama3_factor=rule.factor)
    return 1.0, config


def _inverse_frequencies(config: RotaryConfig) -> Tensor:
    """Return the inverse frequencies of Megatron's RotaryEmbedding, fp32 [r], interpolation not included."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    return RotaryEmbedding(
        kv_channels=config.head_dim,
        rotary_percent=config.percent,
        rotary_interleaved=config.interleaved,
        rotary_base=config.base,
        rope_scaling=config.llama3_factor is not None,
        rope_scaling_factor=config.llama3_factor or 1.0,
        use_cpu_initialization=True,
    ).inv_freq


def _of(omega: Tensor, *, resonance: bool) -> RotaryFrequencies:
    """Return frequencies without factors from float64 radians per token."""
    if resonance:
        periods = resonant_wavelengths(omega)
        stored = (2 * math.pi / periods.double()).float()
        high, low = turns_of_wavelengths(periods)
    else:
        stored = omega.float()
        high, low = turns_per_half_token(stored)
    return RotaryFrequencies(omega=stored, turns_high=high, turns_low=low, unscaled=stored)


def turns_per_half_token(omega: Tensor) -> tuple[Tensor, Tensor]:
    """Return omega / (4 pi) modulo 1 in units of 2^-64 turn: whole part int64 (wrapped), fraction float64.

    `omega` is fp32 [r], taken as exact.
    """
    with mpmath.workprec(4 * _WORD):
        return _split([mpmath.ldexp(mpmath.mpf(value) / (4 * mpmath.pi) % 1, _WORD) for value in omega.tolist()])


def turns_of_wavelengths(periods: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / (2 periods) as turns_per_half_token does, for wavelengths of whole tokens, int64 [r].

    The whole turns of a wavelength then cancel in the product with a place, so rows that are a wavelength apart have
    the same angle.
    """
    with mpmath.workprec(4 * _WORD):
        return _split([mpmath.ldexp(1, _WORD - 1) / value for value in periods.tolist()])


def _split(units: list[Any]) -> tuple[Tensor, Tensor]:
    """Return numbers from 0 to 2^64 as whole part, int64 in two's complement, and fraction, float64."""
    high, low = [], []
    for value in units:
        whole = int(mpmath.floor(value))
        high.append(whole - 2**_WORD if whole >= 2 ** (_WORD - 1) else whole)
        low.append(float(value - whole))
    return torch.tensor(high, dtype=torch.int64, device="cpu"), torch.tensor(low, dtype=torch.float64, device="cpu")


def wavelengths(frequencies: RotaryFrequencies) -> Tensor:
    """Return each pair's period in tokens, float64 [r]."""
    return 2 * math.pi / frequencies.omega.double()
