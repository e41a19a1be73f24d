"""The one source of rotary frequencies: Megatron's own inverse frequencies, and their exact size in turns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import mpmath
import torch
from torch import Tensor

from megacontext_megatron.config import RotaryConfig

_WORD = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryFrequencies:
    """Rotary frequencies of one layer, [r] for r rotary pairs.

    `omega` fp32, radians per token, as stored (interpolation included).  `turns_high` int64 and `turns_low` float64
    hold the turns per half token, modulo one turn, in units of 2^-64 turn: the whole and the fractional part.
    `unscaled` fp32 and `position_scale` are what Megatron multiplies one after the other.
    """

    omega: Tensor
    turns_high: Tensor
    turns_low: Tensor
    unscaled: Tensor
    position_scale: float

    def to(self, device: torch.device) -> RotaryFrequencies:
        """Return the same frequencies on `device`."""
        if self.omega.device == device:
            return self
        return RotaryFrequencies(
            omega=self.omega.to(device),
            turns_high=self.turns_high.to(device),
            turns_low=self.turns_low.to(device),
            unscaled=self.unscaled.to(device),
            position_scale=self.position_scale,
        )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rotary_frequencies(config: RotaryConfig) -> RotaryFrequencies:
    """Return the frequencies Megatron's RotaryEmbedding would use for `config`, on the CPU."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    stock = RotaryEmbedding(
        kv_channels=config.head_dim,
        rotary_percent=config.percent,
        rotary_interleaved=config.interleaved,
        rotary_base=config.base,
        rope_scaling=config.llama3_factor is not None,
        rope_scaling_factor=config.llama3_factor or 1.0,
        use_cpu_initialization=True,
    )
    scale = 1.0 / config.interpolation if config.interpolation else 1.0
    omega = stock.inv_freq * scale
    high, low = turns_per_half_token(omega)
    return RotaryFrequencies(omega=omega, turns_high=high, turns_low=low, unscaled=stock.inv_freq, position_scale=scale)


def turns_per_half_token(omega: Tensor) -> tuple[Tensor, Tensor]:
    """Return omega / (4 pi) modulo 1 in units of 2^-64 turn: whole part int64 (wrapped), fraction float64.

    `omega` is fp32 [r], taken as exact.
    """
    high, low = [], []
    with mpmath.workprec(4 * _WORD):
        for value in omega.tolist():
            units = mpmath.ldexp(mpmath.mpf(value) / (4 * mpmath.pi) % 1, _WORD)
            whole = int(mpmath.floor(units))
            high.append(whole - 2**_WORD if whole >= 2 ** (_WORD - 1) else whole)
            low.append(float(units - whole))
    return torch.tensor(high, dtype=torch.int64, device="cpu"), torch.tensor(low, dtype=torch.float64, device="cpu")


def wavelengths(frequencies: RotaryFrequencies) -> Tensor:
    """Return each pair's period in tokens, float64 [r]."""
    return 2 * math.pi / frequencies.omega.double()
