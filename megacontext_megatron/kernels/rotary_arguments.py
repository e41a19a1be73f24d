"""What a span rotary is given: places of rows, frequencies as integer turns, and options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mpmath
import torch
from torch import Tensor

from megacontext_megatron.position.frequencies import RotaryFrequencies

_WORD = 2.0**32
_PIECE = 24
_PIECES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryTable:
    """Rotary frequencies as the kernels read them: shared by all heads, or one row for each query group.

    Raises ValueError where shapes differ from these:

    `omega`: fp32 [1 or ng, r], radians per token; gets a gradient where it requires one.
    `words`: int32 [3, 1 or ng, r], turns per half token modulo one turn in units of 2^-96 turn, highest word first.
    """

    omega: Tensor
    words: Tensor

    def __post_init__(self) -> None:
        if self.omega.dim() != 2 or self.words.shape != (3, *self.omega.shape):
            raise ValueError(f"frequencies {tuple(self.omega.shape)} with words {tuple(self.words.shape)}")

    @classmethod
    def fixed(cls, frequencies: RotaryFrequencies) -> RotaryTable:
        """Return the table of one set of frequencies for all heads, on the device that holds them."""
        lowest = (frequencies.turns_low * _WORD).floor().long()
        words = torch.stack([frequencies.turns_high >> 32, frequencies.turns_high, lowest])
        return cls(omega=frequencies.omega.unsqueeze(0), words=_as_words(words).unsqueeze(1))

    @classmethod
    def learned(cls, omega: Tensor) -> RotaryTable:
        """Return the table of learnable frequencies, fp32 [1 or ng, r] of any size below 2^20, without a host sync."""
        return cls(omega=omega, words=turn_words(omega.detach()))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlaces:
    """Where each row lies, for s rows of b sequences; strides are free.

    Raises ValueError where shapes or the type of centres differ from these:

    `doubled_centre`: int64, or float64 of whole numbers, [s, b], twice the centre in tokens.
    `sigma`: floating [s, b] or [s, b, ng], tokens; absent for points; gets a gradient where it requires one.
    `offset`: fp32 [s, b], a displacement of the centre in tokens; gets a gradient where it requires one.
    `anchor`: int64 [b], any doubled centre near a sequence's rows, equal on all context-parallel ranks.  Attention sees
    only differences of centres, so frequencies' gradients may be counted from it, which keeps their digits.
    """

    doubled_centre: Tensor
    sigma: Tensor | None = None
    offset: Tensor | None = None
    anchor: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.doubled_centre.shape
        if len(rows) != 2 or self.doubled_centre.dtype not in (torch.int64, torch.float64):
            raise ValueError(f"doubled centres {tuple(rows)} of {self.doubled_centre.dtype}")
        fitting = {"sigma": (rows, (2, 3)), "offset": (rows, (2,)), "anchor": (rows[1:], (1,))}
        for name, (shape, dims) in fitting.items():
            given = getattr(self, name)
            if given is not None and (given.shape[: len(shape)] != shape or given.dim() not in dims):
                raise ValueError(f"{name} {tuple(given.shape)} for rows {tuple(rows)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryOptions:
    """Pairing of channels (neighbours, or halves of the rotated part), and whether queries are damped like keys."""

    interleaved: bool = False
    damp_query: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class QKNorm:
    """RMS norms of query and key heads before the rotation: weights [hn], centred at 0 where `zero_centred`."""

    query_weight: Tensor
    key_weight: Tensor
    eps: float
    zero_centred: bool = False


def turn_words(omega: Tensor) -> Tensor:
    """Return omega / (4 pi) modulo 1 in units of 2^-96 turn, int32 [3, ...] of 32-bit words, highest first.

    `omega` is fp32 radians per token, taken as exact.  Both factors are split into 24-bit pieces, so that every product
    is exact in float64; what lies below 2^-120 turn is left out.
    """
    turns = torch.stack([omega.double() * piece for piece in _inverse_of_four_pi()])
    words: list[Tensor] = []
    for _ in range(3):
        # Truncated towards 0, because a small negative number is not 1 less than itself to the last bit.
        scaled = (turns - turns.trunc()) * _WORD
        words.append(scaled.trunc().long().sum(0))
        turns = scaled
    for place in (2, 1):
        words[place - 1] = words[place - 1] + (words[place] >> 32)
    return _as_words(torch.stack(words))


@lru_cache(maxsize=1)
def _inverse_of_four_pi() -> tuple[float, ...]:
    """Return 1 / (4 pi) as a sum of numbers of 24 bits each, largest first."""
    pieces = []
    with mpmath.workprec(_PIECE * (_PIECES + 2)):
        rest = 1 / (4 * mpmath.pi)
        for place in range(1, _PIECES + 1):
            piece = mpmath.ldexp(mpmath.floor(mpmath.ldexp(rest, _PIECE * place)), -_PIECE * place)
            pieces.append(float(piece))
            rest -= piece
    return tuple(pieces)


def _as_words(values: Tensor) -> Tensor:
    """Return the low 32 bits of int64 values as int32."""
    low = values & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32)
