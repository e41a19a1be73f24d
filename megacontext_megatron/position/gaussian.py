"""Gaussian RoPE: the expectation of a rotation when a row's place is known only as a centre and a spread.

For x ~ N(mu, sigma^2), E[exp(i w x)] = exp(i w mu) exp(-(w sigma)^2 / 2), the characteristic function of the normal
distribution: ordinary rotation by mu, and damping of each rotary pair.  With independent rows the damping of q and k
multiply, so both are finished before core attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.config import GaussianRopeConfig
from megacontext_megatron.position.frequencies import RotaryFrequencies
from megacontext_megatron.position.parameters import PositionalParameters, SumOverRanks
from megacontext_megatron.position.phase import exact_angles, megatron_angles
from megacontext_megatron.spans.metadata import SpanMetadata, base_sigma

LOG_SCALE_LIMIT = math.log(8.0)
"""A learned scale stays within a factor of 8 of the rule's sigma."""

GREATEST_GAIN = 2.0**15
"""Renormalisation gives back at most this factor, which every half-precision type holds: a row of which damping leaves
nothing stays at nothing."""


def damping(sigma: Tensor, omega: Tensor) -> Tensor:
    """Return exp(-(omega sigma)^2 / 2), fp32 [..., r], for sigma fp32 [...] in tokens; exactly 1 where sigma is 0."""
    return torch.exp(-0.5 * (sigma.unsqueeze(-1) * omega).square())


class _Limited(torch.autograd.Function):
    """Clamps log-scales to their limit, and lets a gradient through that points back inside it."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        """Return the clamped log-scales."""
        ctx.save_for_backward(log_scale)
        return log_scale.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Return the gradient, 0 where descending it would lead further outside."""
        (log_scale,) = ctx.saved_tensors
        outward = (log_scale.abs() > LOG_SCALE_LIMIT) & (log_scale.sign() == -gradient.sign())
        return gradient.masked_fill(outward, 0.0)


class LearnableSigma(PositionalParameters):
    """Log-scales of sigma for levels 1 and up of one layer.

    `kind` is `level` (one per level), `layer` (one for all levels) or `head` (one per level and query group).
    Initialised to 0, the rule's own sigma.
    """

    def __init__(
        self, kind: str, levels: int, query_groups: int, local_groups: slice, sum_over_ranks: SumOverRanks
    ) -> None:
        super().__init__(sum_over_ranks)
        self.log_scale = self.new_parameter({"level": levels, "layer": 1, "head": levels * query_groups}[kind])
        self._kind, self._levels, self._query_groups, self._local = kind, levels, query_groups, local_groups

    def forward(self) -> Tensor:
        """Return the factors by level 0..max, fp32 [levels + 1, groups]; groups is 1 or the local query groups.

        Called as a module, because Megatron gathers parameters that a distributed optimizer has updated when the module
        that holds them is called.
        """
        table = self._table(self.shared(self.log_scale))
        return table[:, self._local] if self._kind == "head" else table

    def all_scales(self) -> Tensor:
        """Return the factors of all query groups, whichever rank holds them: fp32 [levels + 1, groups]."""
        return self._table(self.log_scale.detach())

    def _table(self, log_scale: Tensor) -> Tensor:
        limited = _Limited.apply(log_scale)
        if self._kind == "head":
            table = limited.view(self._levels, self._query_groups)
        else:
            table = limited.view(-1, 1).expand(self._levels, 1)
        return torch.cat([torch.ones_like(table[:1]), table.exp()])


class GaussianRotary(torch.nn.Module):
    """Rotates and damps queries and keys by their rows' spans (`--position-embedding-type gaussian_rope`)."""

    def __init__(
        self,
        config: GaussianRopeConfig,
        frequencies: RotaryFrequencies,
        interleaved: bool,
        learnable: LearnableSigma | None = None,
    ) -> None:
        super().__init__()
        self._config, self._frequencies, self._interleaved = config, frequencies, interleaved
        self.sigma_scale = learnable

    @property
    def score_gain(self) -> float:
        """What the factors of cosines, sines and queries can multiply scores by; channels left unrotated keep 1."""
        frequencies = self._frequencies
        return max(1.0, frequencies.attention_factor) ** 2 * max(1.0, frequencies.query_factor)

    def sigma(self, spans: SpanMetadata) -> Tensor:
        """Return the spread of each row, fp32 [s, b, groups] in tokens; groups is 1 unless it is learned per head.

        It is the carried spread where the spans come from a carrier, else that of the rule.
        """
        carried = spans.sigma
        sigma = (base_sigma(spans.width, self._config.sigma) if carried is None else carried).unsqueeze(-1)
        if self.sigma_scale is None:
            return sigma
        # Chosen level by level: an indexed lookup would sort thousands of equal indices for its gradient.  A level
        # beyond the table makes the loss not a number.
        scales, level = self.sigma_scale(), spans.level.unsqueeze(-1)
        factor = torch.full_like(scales[0], torch.nan)
        for number, scale in enumerate(scales):
            factor = torch.where(level == number, scale, factor)
        return sigma * factor

    def forward(self, query: Tensor, key: Tensor, spans: SpanMetadata) -> tuple[Tensor, Tensor]:
        """Return finished query [s, b, np, hn] and key [s, b, ng, hn]; spans are [s, b]."""
        frequencies = self._frequencies = self._frequencies.to(query.device)
        angle, omega = self._angles(spans)
        cos, sin = angle.cos(), angle.sin()
        if frequencies.attention_factor != 1.0:
            cos, sin = cos * frequencies.attention_factor, sin * frequencies.attention_factor
        damp = damping(self.sigma(spans), omega)
        q_damp = damp if self._config.sides == "qk" else torch.ones_like(damp[..., :1, :])
        if frequencies.query_factor != 1.0:
            query = query * frequencies.query_factor
        return self._turn(query, cos, sin, q_damp), self._turn(key, cos, sin, damp)

    def _angles(self, spans: SpanMetadata) -> tuple[Tensor, Tensor]:
        """Return the angles of rows, fp32 [s, b, 1, r], and their frequencies, [r] or [s, b, 1, r]."""
        frequencies, start = self._frequencies, self._frequencies.start
        angles = exact_angles if self._config.phase == "exact" else megatron_angles
        angle, omega = angles(spans.doubled_centre, frequencies), frequencies.omega
        if start is not None:
            early = (spans.doubled_centre < 2 * frequencies.start_tokens).unsqueeze(-1)
            angle = torch.where(early, angles(spans.doubled_centre, start), angle)
            omega = torch.where(early, start.omega, omega)
        if spans.offset is not None:
            angle = angle + spans.offset.unsqueeze(-1) * omega
        return angle.unsqueeze(2), omega if start is None else omega.unsqueeze(2)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, damp: Tensor) -> Tensor:
        if 1 < damp.shape[2] < x.shape[2]:
            damp = damp.repeat_interleave(x.shape[2] // damp.shape[2], dim=2)
        cos, sin = cos * damp, sin * damp
        if self._config.phase == "megatron":
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        turned = rotate(x, cos, sin, interleaved=self._interleaved)
        if self._config.renorm == "rms":
            turned = turned * self._restored_norm(x, damp).to(x.dtype)
        return turned

    def _restored_norm(self, x: Tensor, damp: Tensor) -> Tensor:
        """Return what gives each damped row its norm back, [s, b, n, 1]; exactly 1 where nothing was damped."""
        first, second = pairs(x.float(), damp.shape[-1], interleaved=self._interleaved)
        energy = first.square() + second.square()
        passed = x[..., 2 * damp.shape[-1] :].float().square().sum(-1, keepdim=True)
        kept = (energy * damp.square()).sum(-1, keepdim=True) + passed
        tiny = torch.finfo(torch.float32).tiny
        total = (energy.sum(-1, keepdim=True) + passed).clamp_min(tiny)
        return (total / torch.maximum(kept.clamp_min(tiny), total * GREATEST_GAIN**-2)).sqrt()


def pairs(x: Tensor, count: int, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return both members of the first `count` rotary pairs of x [..., hn]: [..., count] each."""
    turned = x[..., : 2 * count]
    if interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    return turned[..., :count], turned[..., count:]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate x [s, b, n, hn] by angles given as cos and sin [s, b, 1 or n, r]; channels beyond 2 r pass through.

    The arithmetic runs in the wider of both dtypes and the result has x's.  For one and the same cos and sin it is
    Megatron's, term by term, so a rotation by equal angles is bit-equal to the stock one.
    """
    first, second = pairs(x, cos.shape[-1], interleaved=interleaved)
    turned = first * cos - second * sin, second * cos + first * sin
    together = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([together.to(x.dtype), x[..., 2 * cos.shape[-1] :]], dim=-1)


class LogWidthBias(PositionalParameters):
    """Lets a gist of w tokens count as w^beta tokens in the softmax: one more channel holding beta and ln w.

    The factor is learned per layer from 0 (`--gaussian-rope-log-width-bias`).
    """

    def __init__(self, softmax_scale: float, sum_over_ranks: SumOverRanks) -> None:
        super().__init__(sum_over_ranks)
        self.factor = self.new_parameter(1)
        self._softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, spans: SpanMetadata) -> tuple[Tensor, Tensor]:
        """Return query [s, b, np, hn + 1] and key [s, b, ng, hn + 1] whose product adds beta ln w of the key's row."""
        beta = self.shared(self.factor) / self._softmax_scale
        log_width = spans.width.float().log()[:, :, None, None].expand(*key.shape[:3], 1)
        query = torch.cat([query, beta.expand(*query.shape[:3], 1).to(query.dtype)], dim=-1)
        return query, torch.cat([key, log_width.to(key.dtype)], dim=-1)
