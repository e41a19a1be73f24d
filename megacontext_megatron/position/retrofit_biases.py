"""Score biases that can be added to a trained model: both are exactly 0 until something has been learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megacontext_megatron.encoding_config import BiasConfig, RetrofitConfig
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.parameters import SumOverRanks
from megacontext_megatron.position.score_bias import BiasInputs, ScoreBias


class SlowBands(ScoreBias):
    """Ultra-slow bands: sum_j a_hj cos(2 pi (mu_q - mu_k) / period_j) for the config's `periods`, in tokens.

    `amplitude` holds a of all heads, [heads * periods] in that order, and starts at 0.  Phases are found in float64.
    """

    def __init__(self, config: BiasConfig, share: HeadShare, sum_over_ranks: SumOverRanks) -> None:
        super().__init__(share, sum_over_ranks)
        self._periods = torch.tensor(config.periods, dtype=torch.float64, device="cpu")
        self.amplitude = self.new_parameter(share.heads * len(config.periods))

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]; see ScoreBias."""
        dtype, centre = inputs.scores.dtype, inputs.centre.t()
        # Moved once: a copy to the device in every step would wait for it.
        period = self._periods = self._periods.to(centre.device)
        turns = centre.unsqueeze(-1) / period
        angle = 2 * math.pi * (turns - turns.round())
        amplitude = self.shared(self.amplitude).view(self.share.heads, -1)[self.share.local_heads].to(dtype)
        # cos(x - y) = cos x cos y + sin x sin y: one product of [sq, 2 j] and [2 j, sk] for each head.
        key = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        query = key[:, inputs.rows].unsqueeze(1) * amplitude.repeat(1, 2)[:, None, :]
        return query @ key.unsqueeze(1).transpose(-1, -2)


class AlibiLora(ScoreBias):
    """ALiBi whose slopes a low-rank map of the query's row decides: -m_h(x_q) (mu_q - mu_k) / lora_length.

    m_h(x) = B_h (A x) with A [rank, h] drawn from N(0, 1 / h) by `seed` alone, and B [heads, rank] of 0 at the start;
    `down` and `up` hold them as one dimension.  Of disjoint spans mu_q - mu_k is the exact mean distance.
    """

    def __init__(
        self, config: RetrofitConfig, share: HeadShare, sum_over_ranks: SumOverRanks, hidden_size: int, seed: int
    ) -> None:
        super().__init__(share, sum_over_ranks)
        self._rank, self._length = config.lora_rank, config.lora_length
        self.down = self.new_parameter(config.lora_rank * hidden_size)
        self.up = self.new_parameter(share.heads * config.lora_rank)
        drawn = torch.empty(self.down.shape, device="cpu")
        drawn.normal_(std=hidden_size**-0.5, generator=torch.Generator().manual_seed(seed))
        self.down.data.copy_(drawn)

    def features(self, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return m_h of each row, [s, b, np], in at least fp32; see ScoreBias."""
        del query, key
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        down = self.shared(self.down).view(self._rank, -1).to(dtype)
        up = self.shared(self.up).view(-1, self._rank)[self.share.local_heads].to(dtype)
        return hidden.to(dtype) @ down.t() @ up.t()

    def linear_slopes(self, like: Tensor, features: Tensor | None) -> Tensor | None:
        """Return the slopes of each row, [s, b, np]; see ScoreBias.  Raises RuntimeError without features."""
        if features is None:
            raise RuntimeError("query-conditioned slopes were not given the rows' features")
        return features.to(torch.promote_types(like.dtype, torch.float32)) / self._length

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]; see ScoreBias.  Raises RuntimeError without features."""
        if inputs.features is None:
            raise RuntimeError("query-conditioned slopes were not given the rows' features")
        dtype = inputs.scores.dtype
        slope = inputs.features[inputs.rows].permute(1, 2, 0).unsqueeze(-1).to(dtype)
        distance = (inputs.distance / self._length).to(dtype)
        return -slope * distance.unsqueeze(1)
