"""Biases that count or weigh the rows between query and key by their content: CoPE, GRAPE-AP and FoX."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, pad, rms_norm

from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.position.gaussian import rotate
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.initial_values import InitialValues
from megacontext_megatron.position.linear_biases import SlopedBias
from megacontext_megatron.position.parameters import SumOverRanks
from megacontext_megatron.position.score_bias import BiasInputs, ScoreBias

GRAPE_AP_WIDTH = 8
GRAPE_AP_EPSILON = 1e-6
FOX_STD = 0.02
"""Standard deviation of new weights of forget gates: Megatron's of a weight."""


def _seen(inputs: BiasInputs) -> Tensor:
    """Return whether a key's row is not behind the query's, [sq, sk]."""
    return torch.arange(inputs.scores.size(-1), device=inputs.rows.device) <= inputs.rows[:, None]


def _sum_to_the_end(x: Tensor) -> Tensor:
    """Return the sums of x from each place of the last dimension to its end, added from the end."""
    return x.flip(-1).cumsum(-1).flip(-1)


class CopeBias(ScoreBias):
    """CoPE (Golovneva et al. 2024, 2405.18719, section 4 and appendix B): places counted by gates.

    The gate of query i and key t is the sigmoid of their score, the place of key j the sum of gates over t = j .. i,
    at most `cope_positions` - 1, and the bias is q_i e[place], linear between whole places.  e is learned from 0 and
    common to the heads.  A gist counts as one entry, or by its width (`cope_count`).
    """

    def __init__(self, config: BiasConfig, share: HeadShare, sum_over_ranks: SumOverRanks) -> None:
        super().__init__(share, sum_over_ranks)
        self.embedding = self.new_parameter(share.width * config.cope_positions)
        self._by_width = config.cope_count == "width"

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]."""
        dtype = inputs.scores.dtype
        table = self.shared(self.embedding).to(dtype).view(self.share.width, -1)
        place = self._places(inputs).clamp(max=table.size(1) - 1)
        below, above = place.detach().floor(), place.detach().ceil()
        at_whole = torch.einsum("sbhd,dn->bhsn", inputs.query.to(dtype), table)
        low, high = at_whole.gather(-1, below.long()), at_whole.gather(-1, above.long())
        part = place - below
        return high * part + low * (1 - part)

    def _places(self, inputs: BiasInputs) -> Tensor:
        """Return the sums of gates from each key to the query, [b, np, sq, sk]."""
        gates = inputs.scores.sigmoid()
        if self._by_width:
            gates = gates * inputs.width.t()[:, None, None, :]
        return _sum_to_the_end(gates.masked_fill(~_seen(inputs), 0.0))


class GrapeAPBias(SlopedBias):
    """GRAPE-AP (2512.07805, section 5): the sum of m_h ln sigmoid(p_t R(mu_l) p_l / 8) over rows l = j + 1 .. t.

    p is a projection of a row's hidden state to 8 channels for each head, RMS-normed (equations 5.1 and 5.2), R(mu) the
    rotation of each pair of neighbouring channels by mu radians, m_h ALiBi's slope.  A gist is one row.  The rotation
    is by absolute place, so the bias changes when all rows move.
    """

    def __init__(
        self,
        config: BiasConfig,
        share: HeadShare,
        sum_over_ranks: SumOverRanks,
        hidden_size: int,
        values: InitialValues,
    ) -> None:
        super().__init__(config, share, sum_over_ranks)
        size = share.heads * GRAPE_AP_WIDTH * hidden_size
        self.projection = self.new_parameter(size)
        # The authors' scale of hidden weights.
        self.projection.data.copy_(values.normal("grape-ap projection", size, 0.5 / math.sqrt(hidden_size)))

    def features(self, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return p of this rank's heads, [s, b, 8 np]."""
        del query, key
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weight = self.shared(self.projection).to(hidden.dtype).view(self.share.heads, -1, hidden.size(-1))
        p = linear(hidden, weight[self.share.local_heads].flatten(0, 1))
        return rms_norm(p.unflatten(-1, (-1, GRAPE_AP_WIDTH)), (GRAPE_AP_WIDTH,), eps=GRAPE_AP_EPSILON).flatten(-2)

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]."""
        assert inputs.features is not None
        p = inputs.features.to(inputs.scores.dtype).unflatten(-1, (-1, GRAPE_AP_WIDTH))
        angle = inputs.centre[:, :, None, None].expand(-1, -1, -1, GRAPE_AP_WIDTH // 2)
        turned = rotate(p, angle.cos().to(p.dtype), angle.sin().to(p.dtype), interleaved=True)
        alike = torch.einsum("qbhd,kbhd->bhqk", p[inputs.rows], turned) / GRAPE_AP_WIDTH
        steps = (self.slopes(alike) * logsigmoid(alike)).masked_fill(~_seen(inputs), 0.0)
        return _sum_to_the_end(pad(steps[..., 1:], (0, 1)))


class FoxBias(ScoreBias):
    """The forgetting transformer (Lin et al. 2025, 2503.02130): the sum of ln f_l over the rows l = j + 1 .. i.

    f is the sigmoid of w_h x + b_h of a row's hidden state, one for each query head.  A gist is one row.
    """

    def __init__(self, share: HeadShare, sum_over_ranks: SumOverRanks, hidden_size: int, values: InitialValues) -> None:
        super().__init__(share, sum_over_ranks)
        self.weight, self.bias = self.new_parameter(share.heads * hidden_size), self.new_parameter(share.heads)
        self.weight.data.copy_(values.normal("fox weight", self.weight.numel(), FOX_STD))

    def features(self, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return the logarithms of the forget gates, [s, b, np]."""
        del query, key
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weight, bias = (self.shared(p).to(hidden.dtype) for p in (self.weight, self.bias))
        local = self.share.local_heads
        return logsigmoid(linear(hidden, weight.view(self.share.heads, -1)[local], bias[local]))

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]."""
        assert inputs.features is not None
        # The sums grow with the row, their differences do not: fp32 would lose the last digits of near keys.
        total = inputs.features.double().cumsum(0).permute(1, 2, 0)
        return (total[:, :, inputs.rows, None] - total[:, :, None, :]).to(inputs.scores.dtype)
