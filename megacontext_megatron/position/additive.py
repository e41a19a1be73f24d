"""Embeddings of places that are added to the rows: sinusoids, and a learned table."""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.config import ConfigError, ContextConfig
from megacontext_megatron.context.gists import summing_dtype
from megacontext_megatron.encoding_config import AdditiveConfig
from megacontext_megatron.position.gaussian import damping
from megacontext_megatron.spans.levels import entry_index
from megacontext_megatron.spans.metadata import SpanMetadata

BASE = 10000.0


class AdditiveEncoding(Protocol):
    """What is added to the assembled rows of the first pipeline stage."""

    def __call__(self, rows: Tensor, spans: SpanMetadata, sigma: Tensor) -> Tensor:
        """Return rows [s, b, h] plus the encoding of their spans [b, s] of spread `sigma` [b, s], in rows' dtype."""
        ...


class Sinusoidal(torch.nn.Module):
    """Adds sin and cos of omega_k mu to channels 2k and 2k + 1, omega_k = 10000^(-2k / h) (1706.03762, section 3.5).

    Of a span it adds the exact expectation for x ~ N(mu, sigma^2): each channel times exp(-(omega_k sigma)^2 / 2).
    Centres may be any real numbers; phases are found in float64.  All is multiplied by the config's `scale`.
    """

    def __init__(self, config: AdditiveConfig, hidden_size: int) -> None:
        super().__init__()
        self._scale, self._hidden = config.scale, hidden_size

    def forward(self, rows: Tensor, spans: SpanMetadata, sigma: Tensor) -> Tensor:
        """Return rows plus their encoding; see AdditiveEncoding.  Gradients reach sigma and the spans' offset."""
        channel = torch.arange(0, self._hidden, 2, device=rows.device, dtype=torch.float64)
        omega = torch.exp(channel * (-math.log(BASE) / self._hidden))
        turns = spans.doubled_centre.t().double().unsqueeze(-1) * (omega / (4 * math.pi))
        angle = ((turns - turns.round()) * (2 * math.pi)).float()
        if spans.offset is not None:
            angle = angle + spans.offset.t().unsqueeze(-1) * omega.float()
        amplitude = damping(sigma.t(), omega.float()) * self._scale
        channels = torch.stack([angle.sin() * amplitude, angle.cos() * amplitude], dim=-1).flatten(-2)
        return (rows + channels[..., : self._hidden]).to(rows.dtype)


class LearnedAbsolute(torch.nn.Module):
    """Adds a row of a learned table [length, h] to each token, and to a gist the mean of the rows it covers.

    Under the config's `interpolate` a gist gets the table's value at its centre, linear between two rows.  `weight`
    [length, h] has the shape and dtype of Megatron's own position embeddings, drawn from N(0, init_std^2) by `seed`
    alone so that ranks agree.  Places beyond the table are an error; `check_places` refuses them by name beforehand.
    """

    def __init__(
        self, config: AdditiveConfig, hidden_size: int, context: ContextConfig, *, init_std: float, seed: int
    ) -> None:
        super().__init__()
        check_places(config, context)
        drawn = torch.empty(config.length, hidden_size, device="cpu")
        drawn.normal_(std=init_std, generator=torch.Generator().manual_seed(seed))
        self.weight = torch.nn.Parameter(drawn)
        self._interpolate = config.interpolate
        self._block_size = context.block_size
        self._max_level = context.max_level if context.source_length > context.window else 0

    def forward(self, rows: Tensor, spans: SpanMetadata, sigma: Tensor) -> Tensor:
        """Return rows plus their encoding; see AdditiveEncoding.  The spread is not read.

        Raises RuntimeError where gists move their own spans and the table is not read at their centres.
        """
        del sigma
        added = self._at_centres(spans) if self._interpolate else self._means(spans)
        return (rows + added.transpose(0, 1)).to(rows.dtype)

    def _means(self, spans: SpanMetadata) -> Tensor:
        """Return the mean of the rows that each span covers: one look-up in the table with its blocks' means behind it.

        Means of a level are made of the one below, so the cost is that of reading the table once.
        """
        if spans.offset is not None:
            raise RuntimeError("the mean of table rows has no moved spans: use --learned-absolute-interpolate")
        length, below = self.weight.shape[0], cast(Tensor, self.weight)
        levels = [below]
        for _ in range(self._max_level):
            blocks = below[: below.shape[0] // self._block_size * self._block_size]
            below = blocks.unflatten(0, (-1, self._block_size)).mean(dim=1, dtype=summing_dtype(self.weight.dtype))
            levels.append(below.to(self.weight.dtype))
        table = torch.cat(levels)
        index = entry_index(spans.start, spans.level.long(), length, self._block_size)
        # What lies behind the table of tokens is another level's.
        return functional.embedding(index.masked_fill(spans.end > length, table.shape[0]), table)

    def _at_centres(self, spans: SpanMetadata) -> Tensor:
        place = spans.doubled_centre.double() / 2
        if spans.offset is not None:
            place = place + spans.offset
        low = place.detach().floor()
        share = (place - low).to(summing_dtype(self.weight.dtype)).unsqueeze(-1)
        first, second = (functional.embedding(x.long(), self.weight) for x in (low, place.detach().ceil()))
        return (first + share * (second - first)).to(self.weight.dtype)


def largest_place(context: ContextConfig) -> int:
    """Return the greatest place, counted from 0, of a token that the rows of a context can cover.

    Places count from the oldest token of the source, of which every plan covers the newest.
    """
    return context.source_length - 1


def check_places(config: AdditiveConfig, context: ContextConfig) -> None:
    """Refuse a learned table that is shorter than what contexts cover; sinusoids have no end.

    Raises ConfigError naming the flags.
    """
    needed = largest_place(context) + 1
    if config.name == "learned_absolute" and config.length < needed:
        raise ConfigError(
            f"--max-position-embeddings {config.length} is too short a table for contexts that cover {needed} tokens: "
            f"raise it to at least {needed}, or lower --seq-length and --mc-source-length."
        )
