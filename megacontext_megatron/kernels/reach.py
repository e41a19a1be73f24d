"""How far back attention with a linear bias matters: which key rows a tile of queries can leave unread.

Let every |score| of a head be at most L nats, its slope be m, and S keys be visible to a query, itself among them, at
distance 0.  A query's sum of weights is then at least exp(-L), and a key at distance D adds at most exp(L - m D) to it.
So all keys with m D > 2 L + ln(S / eps) have together less than eps of the weight.  Leaving them out moves an output
from (1 - w) a + w r to a, w < eps, where a and r are means of values: by less than 2 eps times the largest value.  With
eps = 2^-10 that is at most half a unit in the last place of a bf16 number as large as the row's values, and the rounded
output differs by at most one.  Their share of every gradient is bounded in the same way, because a score's gradient is
its weight times a difference of products with values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megacontext_megatron.kernels.linear_bias_device import first_visited

_ROUNDING = 1.0 + 2.0**-7
"""What rounding a normed query and key to bf16, after their norm and after a rotation, can add to their product."""

_TILES = {1: 512, 2: 32}
"""Of queries, searched for at once by a program: many, because a search waits for memory at each step; few where each
tile's slopes are read row by row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Leave to skip keys too far away to matter; raises ValueError where a field is not as follows.

    `score_bound`: fp32 [np] on the device, contiguous, the largest |score| in nats that a head can have.
    `tolerance`: the share of a row's weight that may be left out, 2^-10 for results exact to bf16.
    """

    score_bound: Tensor
    tolerance: float = 2.0**-10

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"a reach leaves out a share of {self.tolerance}, which is not between 0 and 1")
        bound = self.score_bound
        if bound.dtype != torch.float32 or not bound.is_contiguous():
            raise ValueError(f"bounds of {bound.dtype} with strides {bound.stride()}: contiguous fp32 is read")


class Visits(NamedTuple):
    """What is visited, made on the device.

    `first`: int32 [b, np, tiles], the first key row that matters to a tile of `rows` queries.
    `heads`, `groups`: int64 [b np] and [b ng], heads and groups of all sequences, those with most to visit first.
    """

    first: Tensor
    heads: Tensor
    groups: Tensor


def score_bound(query_weight: Tensor, key_weight: Tensor, scale: float, *, rotated: bool, zero_centred: bool) -> Tensor:
    """Return the largest |scale q.k| in nats, fp32 [], of queries and keys that were RMS-normed with weights [hn].

    A normed head has a length of at most sqrt(hn), so by Cauchy and Schwarz the product of two is at most hn times the
    largest product of weights: of one channel, or, where a rotation has mixed channels, of any two.  Weights centred at
    0 stand for one more.  Adds 2^-7 for rounding to bf16.  No host sync.
    """
    query_size, key_size = (
        (weight.detach().float() + float(zero_centred)).abs() for weight in (query_weight, key_weight)
    )
    largest = query_size.amax() * key_size.amax() if rotated else (query_size * key_size).amax()
    return largest * (abs(scale) * query_weight.shape[-1] * _ROUNDING)


def visits(reach: Reach, slopes: Tensor, doubled_centre: Tensor, shape: tuple[int, int, int], rows: int) -> Visits:
    """Return what tiles of `rows` queries visit, for slopes [np] or [sq, b, np] and doubled centres int64 [sk, b].

    `shape` is (sq, np, ng).  Nothing waits for the device.  The most laborious heads come first, because what they
    visit differs a hundredfold between heads, and what starts last should be short.
    """
    sq, heads, groups = shape
    sk, batch = doubled_centre.shape
    tiles = -(-sq // rows)
    device = doubled_centre.device
    first = torch.empty(batch, heads, tiles, dtype=torch.int32, device=device)
    work = torch.empty(batch * heads, dtype=torch.int64, device=device)
    bias = 1 if slopes.dim() == 1 else 2
    strides = (0, 0, *slopes.stride())[-3:]
    kernel: Any = first_visited
    kernel[(batch * heads,)](
        doubled_centre, slopes, reach.score_bound, first, work, math.log(sk / reach.tolerance), sq, sk,
        *doubled_centre.stride(), *strides,
        NP=heads, TILES=min(_TILES[bias], triton.next_power_of_2(tiles)), ROWS=rows, STEPS=sk.bit_length(), BIAS=bias,
    )  # fmt: skip
    of_groups = work.view(batch * groups, heads // groups).sum(1)
    order = (x.argsort(descending=True, stable=True) for x in (work, of_groups))
    return Visits(first, *order)
