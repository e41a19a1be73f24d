"""Biases linear in the distance: ALiBi, and GRAPE-A with learned slopes and with gates of queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.initial_values import InitialValues
from megacontext_megatron.position.parameters import SumOverRanks
from megacontext_megatron.position.score_bias import BiasInputs, ScoreBias


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return ALiBi's slopes (Press et al. 2022, 2108.12409, section 3), per token.

    2^(-8h / H) for h = 1 .. H where H is a power of two.  Otherwise those of the next lower power, and then every other
    one, from the first, of the next higher.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * h / lower) for h in range(1, lower + 1)]
    between = [2.0 ** (-8 * h / (2 * lower)) for h in range(1, 2 * lower, 2)]
    return tuple((slopes + between)[:heads])


class SlopedBias(ScoreBias):
    """A bias that has ALiBi's slopes times `slope_scale`, which do not train."""

    def __init__(self, config: BiasConfig, share: HeadShare, sum_over_ranks: SumOverRanks) -> None:
        super().__init__(share, sum_over_ranks)
        local = alibi_slopes(share.heads)[share.local_heads]
        # Not a buffer, which a model's cast to half precision would round.
        self._slopes = torch.tensor([config.slope_scale * s for s in local], dtype=torch.float64, device="cpu")

    def slopes(self, like: Tensor) -> Tensor:
        """Return the slopes of this rank's heads, [np, 1, 1], in the dtype and on the device of `like`."""
        if self._slopes.device != like.device:
            self._slopes = self._slopes.to(like.device)
        return self._slopes.to(like.dtype)[:, None, None]


class Alibi(SlopedBias):
    """ALiBi: -m_h (mu_q - mu_k), where m_h is the slope of head h (2108.12409, section 3).

    For a key's span wholly before the query's it is the mean over the spans' tokens, whatever their widths.
    """

    def linear_slopes(self, like: Tensor, features: Tensor | None) -> Tensor | None:
        """Return the slopes [np]; see ScoreBias."""
        del features
        wide = torch.promote_types(like.dtype, torch.float32)
        return self.slopes(like.new_empty((), dtype=wide)).flatten()

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]."""
        distance = inputs.distance.to(inputs.scores.dtype).unsqueeze(1)
        return -self.slopes(distance) * distance


class GrapeA(Alibi):
    """GRAPE-A (2512.07805, section 4): ALiBi, whose slopes may be learned, and gated by queries, keys or both.

    The bias is -w_h (mu_q - mu_k) (softplus(v_h q / sqrt(d)) + softplus(u_h k / sqrt(d))), equation 4.6, one term for
    each gate, and 1 in place of their sum without gates.  As in the authors' code u and v have length 1 when they are
    used, and the gates read queries and keys normed and not rotated.  w_h is ALiBi's slope m_h, or m_h exp(l_h) with
    l_h learned from 0.
    """

    def __init__(
        self, config: BiasConfig, share: HeadShare, sum_over_ranks: SumOverRanks, values: InitialValues
    ) -> None:
        super().__init__(config, share, sum_over_ranks)
        self.log_slope_scale = self.new_parameter(share.heads) if config.learnable_slopes else None
        self.query_direction = self._direction("query", values) if config.gate in ("q", "qk") else None
        self.key_direction = self._direction("key", values) if config.gate in ("k", "qk") else None

    def _direction(self, side: str, values: InitialValues) -> torch.nn.Parameter:
        size = self.share.heads * self.share.width
        parameter = self.new_parameter(size)
        drawn = values.normal(f"grape-a {side} direction", size, self.share.width**-0.5)
        parameter.data.copy_(drawn)
        return parameter

    @property
    def has_features(self) -> bool:
        """Whether slopes are gated."""
        return self.query_direction is not None or self.key_direction is not None

    def linear_slopes(self, like: Tensor, features: Tensor | None) -> Tensor | None:
        """Return the slopes, [np] or with the gates of queries [s, b, np], None with gates of keys; see ScoreBias.

        Raises RuntimeError where queries gate and `features` are missing.
        """
        slopes = super().linear_slopes(like, None)
        if self.key_direction is not None or slopes is None:
            return None
        if self.query_direction is None:
            return slopes
        if features is None:
            raise RuntimeError("slopes gated by queries were not given the rows' features")
        return slopes * features.to(slopes.dtype)

    def features(self, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        """Return the gates [s, b, np], of queries before those of keys: [s, b, 2 np] where there are both."""
        del hidden
        gates = []
        if self.query_direction is not None:
            gates.append(self._gate(self.query_direction, query))
        if self.key_direction is not None:
            gates.append(self._gate(self.key_direction, key.repeat_interleave(query.size(2) // key.size(2), dim=2)))
        return torch.cat(gates, dim=-1) if gates else None

    def _gate(self, direction: torch.nn.Parameter, heads: Tensor) -> Tensor:
        """Return the gate of heads [s, b, np, hn]: [s, b, np], at least 0."""
        heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
        unit = normalize(self.shared(direction).to(heads.dtype).view(-1, self.share.width)[self.share.local_heads])
        return softplus((heads * unit).sum(-1) / math.sqrt(self.share.width))

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]."""
        bias = super().forward(inputs)
        if inputs.features is None:
            return bias
        gates = inputs.features.to(bias.dtype).permute(1, 2, 0)
        heads = inputs.query.size(2)
        of_query, of_key = gates[:, :heads, inputs.rows, None], gates[:, -heads:, None, :]
        if self.key_direction is None:
            return bias * of_query
        return bias * (of_key if self.query_direction is None else of_query + of_key)

    def slopes(self, like: Tensor) -> Tensor:
        """Return the slopes of this rank's heads, [np, 1, 1], with gradients where they are learned."""
        fixed = super().slopes(like)
        if self.log_slope_scale is None:
            return fixed
        learned = self.shared(self.log_slope_scale).to(like.dtype)[self.share.local_heads]
        return fixed * learned.exp()[:, None, None]
