"""Phases: the angle of each rotary pair at a span's centre."""

from __future__ import annotations

import math

from torch import Tensor

from megacontext_megatron.position.frequencies import RotaryFrequencies


def exact_angles(doubled_centre: Tensor, frequencies: RotaryFrequencies) -> Tensor:
    """Return omega mu modulo one turn, fp32 [..., r] in [-pi, pi], for 2 mu int64 [...] up to 2^52."""
    return integer_angles(doubled_centre.unsqueeze(-1), frequencies.turns_high, frequencies.turns_low).float()


def integer_angles(doubled_centre: Tensor, turns_high: Tensor, turns_low: Tensor) -> Tensor:
    """Return angles modulo one turn, float64 in [-pi, pi], from 2 mu and turns per half token, which broadcast.

    All are in integers (turns_low float64, below 1) of 2^-64 turn.  The product runs in two's complement, where
    overflow drops whole turns: the high word wraps exactly, and the low word adds at most half a unit of error.
    """
    whole = doubled_centre * turns_high
    rest = (doubled_centre.double() * turns_low).round().long()
    return (whole + rest).double() * (2 * math.pi / 2**64)


def megatron_angles(doubled_centre: Tensor, frequencies: RotaryFrequencies) -> Tensor:
    """Return omega mu as Megatron computes it, in fp32: noise above 2^24 tokens, bit-equal to stock rope below."""
    centre = doubled_centre.double().mul(0.5).float()
    if frequencies.position_scale != 1.0:
        centre = centre * frequencies.position_scale
    return centre.unsqueeze(-1) * frequencies.unscaled
