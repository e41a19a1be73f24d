"""Rotary frequencies that a layer finds itself: fixed by query group, or learned (GRAPE-M; CLEX in position.clex)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.encoding_config import GrapeMConfig, MultiscaleConfig
from megacontext_megatron.position.clex import ClexFrequencies
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.parameters import PositionalParameters, SumOverRanks
from megacontext_megatron.position.rules import multiscale, rotary_width


class FixedFrequencies(torch.nn.Module):
    """Frequencies that nothing changes, fp32 [1 or local query groups, r] in radians per token.

    They are no buffer, so that casting the model leaves them alone and no checkpoint holds them.
    """

    def __init__(self, omega: Tensor) -> None:
        super().__init__()
        self._omega = omega

    @torch.inference_mode(False)  # a table moved in a validation must serve the backward of training
    def forward(self, device: torch.device) -> Tensor:
        """Return omega on `device`."""
        self._omega = self._omega.to(device)
        return self._omega


class GrapeFrequencies(PositionalParameters):
    """GRAPE-M with planes of neighbouring channels: omega = exp(log_freq / scale), one rate for each rotary pair.

    The scale divides the gradient of what is stored, `log_freq` fp32 [r], or [groups r] where each query group has
    rates of its own; query heads share those of their group, without which scores would not be functions of distances.
    The initial rates are the plain ones of `rotary`, up to |ln omega| 2^-24 relatively.  With an orthonormal pair of
    channels a, b, exp(n omega (b a^T - a b^T)) is the rotation by n omega (2512.07805, section 2.2).
    """

    def __init__(
        self, config: GrapeMConfig, rotary: RotaryConfig, share: HeadShare, sum_over_ranks: SumOverRanks
    ) -> None:
        super().__init__(sum_over_ranks)
        initial = plain_frequencies(rotary).double().log() * config.log_freq_scale
        self._groups = share.groups if config.per_head else 1
        self._local = share.local_groups if config.per_head else slice(None)
        self._scale = config.log_freq_scale
        self.log_freq = self.new_parameter(self._groups * len(initial))
        self.log_freq.data += initial.repeat(self._groups).to(self.log_freq)

    def forward(self, device: torch.device) -> Tensor:
        """Return omega, fp32 [1 or local query groups, r] in radians per token, where the parameter is.

        The exponential runs in float64, so that only storing rounds.
        """
        del device
        stored = self.shared(self.log_freq).view(self._groups, -1)[self._local]
        return (stored.double() / self._scale).exp().float()


def layer_frequencies(
    rotary: RotaryConfig, share: HeadShare, sum_over_ranks: SumOverRanks, layer_number: int
) -> FixedFrequencies | GrapeFrequencies | ClexFrequencies:
    """Return the frequencies of layer `layer_number` that `rotary.by_layer` asks for.

    Raises ValueError where it asks for none, or where tensor-parallel ranks share query groups that differ.
    """
    config = rotary.by_layer
    by_group = isinstance(config, MultiscaleConfig) or (isinstance(config, GrapeMConfig) and config.per_head)
    if by_group and share.groups % share.ranks:
        raise ValueError(f"{share.groups} query groups with frequencies of their own for {share.ranks} ranks")
    match config:
        case GrapeMConfig(learnable=True):
            return GrapeFrequencies(config, rotary, share, sum_over_ranks)
        case GrapeMConfig():
            return FixedFrequencies(plain_frequencies(rotary).unsqueeze(0))
        case MultiscaleConfig():
            omega = multiscale(config, share.groups, rotary_width(rotary)) / (rotary.interpolation or 1)
            return FixedFrequencies(omega[share.local_groups].float())
        case None:
            raise ValueError("no layer finds its own frequencies")
        case _:
            return ClexFrequencies(config, rotary.length, plain_frequencies(rotary), sum_over_ranks, seed=layer_number)


def plain_frequencies(rotary: RotaryConfig) -> Tensor:
    """Return the frequencies that layers start from, fp32 [r]: those of `rotary` without what layers find."""
    return rotary_frequencies(dataclasses.replace(rotary, by_layer=None)).omega
