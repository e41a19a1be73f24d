"""Span metadata: where each row's tokens lie, and the one tensor in which that travels through the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megacontext_megatron.config import SigmaRule
from megacontext_megatron.spans.levels import widths


class Modality(IntEnum):
    """What a row's tokens are."""

    TEXT = 0


CARRIER_COLUMNS = ("start", "width", "level", "modality", "doubled_centre", "sigma")
"""Columns of the carrier, all float64: exact for integers up to 2^53.

The last two follow from the others; the kernels read them where they lie, so that no layer derives them again.  Where
gists move their own spans there is one more, the offset, and it and sigma carry gradients.
"""

GREATEST_OFFSET = 0.25
"""A gist moves its centre by at most this share of its width."""

GREATEST_LOG_SCALE = math.log(4.0)
"""A gist changes its spread by at most this factor, either way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanShift:
    """By how much rows [b, s] move their own place: `offset` of the centre in tokens, `log_scale` of sigma; fp32."""

    offset: Tensor
    log_scale: Tensor

    @classmethod
    def bounded(cls, raw: Tensor, width: Tensor) -> SpanShift:
        """Return the shift of unbounded values [b, s, 2] for spans of `width` [b, s] tokens; 0 stays 0."""
        offset, log_scale = raw.float().tanh().unbind(-1)
        return cls(offset=GREATEST_OFFSET * width * offset, log_scale=GREATEST_LOG_SCALE * log_scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanMetadata:
    """Start, width, level and modality of every row, [b, s] in a batch and [s, b] in the model.

    `start` is int64 (tokens), `width` int32 (tokens), `level` and `modality` int8.  Metadata from a carrier also has
    the spread `sigma`, fp32 in tokens, and, where gists move their own spans, the `offset` of the centre.
    """

    start: Tensor
    width: Tensor
    level: Tensor
    modality: Tensor
    sigma: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def of_nodes(cls, start: Tensor, level: Tensor, block_size: int) -> SpanMetadata:
        """Return the metadata of text rows from int64 starts (tokens) and levels of one shape."""
        return cls(
            start=start,
            width=widths(level, block_size).to(torch.int32),
            level=level.to(torch.int8),
            modality=torch.full_like(start, Modality.TEXT, dtype=torch.int8),
        )

    @property
    def end(self) -> Tensor:
        """First token behind each span, int64."""
        return self.start + self.width

    @property
    def doubled_centre(self) -> Tensor:
        """Twice the centre, int64 and exact: 2 mu = 2 start + width - 1."""
        return 2 * self.start + self.width - 1

    def pack(self, rule: SigmaRule, shift: SpanShift | None = None, sigma_factor: float = 1.0) -> Tensor:
        """Return the carrier of [b, s] metadata: float64 [s, b, 1, 6], columns as in CARRIER_COLUMNS.

        `sigma` is the fp32 spread that `rule` gives each width, times `sigma_factor`.  With a `shift` there are seven
        columns, and gradients reach it.
        """
        sigma = base_sigma(self.width, rule) * sigma_factor
        columns = [self.start, self.width, self.level, self.modality, self.doubled_centre, sigma]
        if shift is not None:
            columns[-1:] = [sigma * shift.log_scale.exp(), shift.offset]
        return torch.stack([c.double() for c in columns], dim=-1).transpose(0, 1).unsqueeze(2).contiguous()

    @classmethod
    def unpack(cls, carrier: Tensor) -> SpanMetadata:
        """Return the metadata, [s, b], that a carrier [s, b, 1, 6 or 7] holds.

        Raises RuntimeError for another dtype than float64: a cast carrier would give wrong places.
        """
        start, width, level, modality, _, sigma, *offset = _columns(carrier)
        return cls(
            start=start.long(),
            width=width.to(torch.int32),
            level=level.to(torch.int8),
            modality=modality.to(torch.int8),
            sigma=sigma.float(),
            offset=offset[0].float() if offset else None,
        )


def is_carrier(tensor: object) -> bool:
    """Return whether something is a tensor of a carrier's shape."""
    least = len(CARRIER_COLUMNS)
    return (
        isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.shape[2] == 1 and 0 <= tensor.shape[3] - least < 2
    )


def carried_places(carrier: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return doubled centres, spreads and offsets (None where nothing moves) that a carrier holds, [s, b] each.

    They are float64 views, of which offsets and, beside offsets, spreads carry gradients.  Raises RuntimeError for
    another dtype than float64.
    """
    doubled_centre, sigma, *offset = _columns(carrier)[4:]
    return doubled_centre.detach(), sigma, offset[0] if offset else None


def _columns(carrier: Tensor) -> tuple[Tensor, ...]:
    if carrier.dtype != torch.float64:
        raise RuntimeError(f"the carrier of span metadata must be float64, not {carrier.dtype}")
    return carrier[..., 0, :].unbind(-1)


def base_sigma(width: Tensor, rule: SigmaRule) -> Tensor:
    """Return the spread of spans of `width` tokens, fp32, in tokens; 0 for a single token under every rule.

    `uniform` is the standard deviation of a uniform span of w tokens, sqrt((w^2 - 1) / 12); `width` and
    `half-width` are w and w / 2; `none` is 0.
    """
    w = width.double()
    match rule:
        case "uniform":
            sigma = ((w * w - 1.0) / 12.0).sqrt()
        case "width":
            sigma = torch.where(w > 1, w, 0.0)
        case "half-width":
            sigma = torch.where(w > 1, w / 2.0, 0.0)
        case "none":
            sigma = torch.zeros_like(w)
        case _:
            raise ValueError(f"unknown sigma rule {rule!r}")
    return sigma.float()
