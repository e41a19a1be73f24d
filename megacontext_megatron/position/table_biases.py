"""Biases that look the distance up: T5's buckets, and FIRE's perceptron on normalised distances."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, relu

from megacontext_megatron.config import ConfigError
from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.initial_values import InitialValues
from megacontext_megatron.position.parameters import SumOverRanks
from megacontext_megatron.position.score_bias import BiasInputs, ScoreBias

T5_STD = 0.02
"""Standard deviation of a new T5 table: Megatron's of a weight."""

FIRE_CURVATURE = 0.1
FIRE_EPSILON = 1e-6


def t5_buckets(buckets: int, max_distance: int) -> list[int]:
    """Return T5's causal bucket of the distances 0 .. max_distance; all greater ones share the last.

    Half of the buckets hold one distance each, e of them; distance n > e lies in e + floor((buckets - e) ln(n / e) /
    ln(max_distance / e)), at most the last (Raffel et al. 2020, 1910.10683, section 2.1).  The powers are compared as
    integers, so no rounding moves an edge.  Raises ConfigError where no distance is left for the other half.
    """
    exact = buckets // 2
    steps = buckets - exact
    if exact < 1 or max_distance <= exact:
        raise ConfigError(
            f"--t5-max-distance must exceed half of --t5-num-buckets, which must be 2 or more, not {max_distance} "
            f"and {buckets}."
        )
    found = list(range(exact))
    step = 0
    for n in range(exact, max_distance + 1):
        while step < steps - 1 and n**steps * exact ** (step + 1) >= max_distance ** (step + 1) * exact**steps:
            step += 1
        found.append(exact + step)
    return found


class T5Bias(ScoreBias):
    """T5's relative bias, added behind the softmax scale: a learned number for each bucket and head.

    Between whole distances it is linear, so that it is T5's at whole ones and continuous everywhere.  Where its slope
    jumps, the gradient takes that of the greater distances.
    """

    def __init__(
        self, config: BiasConfig, share: HeadShare, sum_over_ranks: SumOverRanks, values: InitialValues
    ) -> None:
        super().__init__(share, sum_over_ranks)
        self.table = self.new_parameter(config.t5_buckets * share.heads)
        self.table.data.copy_(values.normal("t5 table", self.table.numel(), T5_STD))
        self._bucket = torch.tensor(t5_buckets(config.t5_buckets, config.t5_max_distance), device="cpu")

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]; keys behind the query have the distance 0."""
        if self._bucket.device != inputs.scores.device:
            self._bucket = self._bucket.to(inputs.scores.device)
        table = self.shared(self.table).to(inputs.scores.dtype).view(-1, self.share.heads)
        by_distance = table[:, self.share.local_heads].index_select(0, self._bucket)
        longest = self._bucket.numel() - 1
        distance = inputs.distance.clamp(0, longest)
        below = distance.detach().floor()
        part = (distance - below).to(table.dtype).unsqueeze(-1)
        low = embedding(below.long(), by_distance)
        high = embedding((below.long() + 1).clamp(max=longest), by_distance)
        return (low + part * (high - low)).permute(0, 3, 1, 2)


class FireBias(ScoreBias):
    """FIRE: f(psi(mu_q - mu_k) / psi(max(|l L|, mu_q))) with psi(x) = ln(|c x| + 1) (Li et al. 2024, 2310.04418).

    f is a perceptron with ReLU from 1 number through `fire_layers` layers of `fire_hidden` to all heads, and c and l
    are learned from 0.1 and 1; L is `fire_length` tokens.  Its hidden layers hold b sq sk `fire_hidden` numbers each.
    """

    def __init__(
        self, config: BiasConfig, share: HeadShare, sum_over_ranks: SumOverRanks, values: InitialValues
    ) -> None:
        super().__init__(share, sum_over_ranks)
        self.curvature, self.length_scale = self.new_parameter(1), self.new_parameter(1)
        self.curvature.data.fill_(FIRE_CURVATURE)
        self.length_scale.data.fill_(1.0)
        self._length = config.fire_length
        self._sizes = [1, *[config.fire_hidden] * config.fire_layers, share.heads]
        for layer, (before, after) in enumerate(pairwise(self._sizes)):
            for name, size in ((f"weight{layer}", before * after), (f"bias{layer}", after)):
                parameter = self.new_parameter(size)
                # As torch.nn.Linear begins.
                parameter.data.copy_(values.uniform(f"fire {name}", size, 1 / math.sqrt(before)))
                self.register_parameter(name, parameter)

    def forward(self, inputs: BiasInputs) -> Tensor:
        """Return the bias [b, np, sq, sk]."""
        x = self._normalised(inputs).unsqueeze(-1)
        last = len(self._sizes) - 2
        for layer in range(last):
            x = relu(linear(x, *self._layer(layer, x.dtype)))
        weight, bias = (p[self.share.local_heads] for p in self._layer(last, x.dtype))
        return torch.einsum("bqkm,hm->bhqk", x, weight) + bias[:, None, None]

    def _normalised(self, inputs: BiasInputs) -> Tensor:
        """Return the logarithmic distance in units of that of the query's place, [b, sq, sk], from 0 to 1."""
        dtype = inputs.scores.dtype
        curvature = self.shared(self.curvature).to(dtype).abs()
        length = (self.shared(self.length_scale).to(dtype) * self._length).abs()
        place = inputs.centre.t()[:, inputs.rows].to(dtype)
        reach = torch.log1p(curvature * torch.maximum(place, length))
        return torch.log1p(curvature * inputs.distance.to(dtype).abs()) / (reach + FIRE_EPSILON).unsqueeze(-1)

    def _layer(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight [after, before] and the bias [after] of one layer."""
        weight, bias = (cast(torch.nn.Parameter, getattr(self, f"{kind}{layer}")) for kind in ("weight", "bias"))
        return self.shared(weight).to(dtype).view(-1, self._sizes[layer]), self.shared(bias).to(dtype)
