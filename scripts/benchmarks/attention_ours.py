"""The plugin's attention as benchmarks call it; the one place that knows the kernels' arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.encoding_config import SPARE_CHANNELS
from scripts.benchmarks.attention_inputs import LOOK_BACK, AttentionInputs
from scripts.benchmarks.attention_peers import Attend
from scripts.benchmarks.ours import Rotary, places
from scripts.benchmarks.peers import split

TILE = 128
"""Queries of a tile, in what is reported of visits."""

SPARE = SPARE_CHANNELS
"""Last channels of q and k that a folded bias takes."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An implementation of attention in windows and with linear biases: modules with the kernels' functions."""

    windows: Any
    biased: Any
    rotary: Rotary

    @classmethod
    def kernel(cls) -> Attention:
        """Return the Triton kernels."""
        from megacontext_megatron.kernels import linear_bias_attention, window_attention

        return cls(windows=window_attention, biased=linear_bias_attention, rotary=Rotary.kernel())

    @classmethod
    def reference(cls) -> Attention:
        """Return the same functions in plain PyTorch."""
        rotary = Rotary.reference()
        return cls(windows=_reference_windows(rotary), biased=_reference_biased(), rotary=rotary)

    def window(self, scale: float, rotation: Any = None) -> Attend:
        """Return attention in a window of q, k and v, rotated inside where a `rotation` is given."""
        return lambda q, k, v: self.windows.window_attention(q, k, v, LOOK_BACK, scale, rotation=rotation)

    def window_of_mixed(self, head_dim: int, scale: float, rotation: Any) -> Callable[[Tensor], Tensor]:
        """Return attention in a window of Megatron's mixed projection, rotated inside."""
        split = self.windows.split_window_attention
        return lambda mixed: split(mixed, head_dim, LOOK_BACK, scale, rotation=rotation)

    def rotation(self, inputs: AttentionInputs) -> Any:
        """Return the rotation that happens inside: Megatron's frequencies at the rows' centres, with spreads."""
        from megacontext_megatron.kernels.rotary_arguments import RotaryOptions
        from megacontext_megatron.kernels.row_rotation import RowRotation

        return RowRotation(
            places=places(rotary_places(inputs)), table=self.rotary.fixed_table(inputs), options=RotaryOptions()
        )

    def linear(self, slopes: Tensor, doubled_centre: Tensor, scale: float, reach: Any = None) -> Attend:
        """Return causal attention with a linear bias in the kernel, and with `reach` only as far as it matters."""
        from megacontext_megatron.kernels.linear_bias_attention import LinearBias

        bias = LinearBias(slopes=slopes, doubled_centre=doubled_centre)
        return lambda q, k, v: self.biased.linear_bias_attention(q, k, v, scale, bias, reach=reach)


def rotary_places(inputs: AttentionInputs) -> dict[str, Tensor]:
    """Return where rows lie, by the names that `ours.places` reads."""
    return {"doubled_centre": inputs.doubled_centre, "sigma": inputs.sigma, "anchor": inputs.anchor}


def reach_of(inputs: AttentionInputs) -> Any:
    """Return the reach of heads whose q and k were RMS-normed with weights 1."""
    from megacontext_megatron.kernels.linear_bias_attention import Reach, score_bound

    ones = torch.ones(inputs.shape.head_dim, dtype=inputs.dtype, device=inputs.device)
    bound = score_bound(ones, ones, inputs.scale, rotated=False, zero_centred=False)
    return Reach(score_bound=bound.repeat(inputs.shape.query_heads))


def visited_share(inputs: AttentionInputs, slopes: Tensor, reach: Any) -> float:
    """Return the share of all pairs of a query and a key before it that a reach leaves to tiles of TILE queries."""
    centre = inputs.doubled_centre[:, 0].double() / 2
    start = torch.arange(0, inputs.shape.rows, TILE, device=centre.device)
    end = (start + TILE).clamp_max(inputs.shape.rows)
    limit = 2 * reach.score_bound.double() + math.log(inputs.shape.rows / reach.tolerance)
    farthest = centre[start] - (limit / slopes.detach().double())[:, None]
    first = torch.searchsorted(centre, farthest)
    return float((end - first).sum() / (len(slopes) * end.sum()))


def folded(backend: Attend, slopes: Tensor, doubled_centre: Tensor, scale: float) -> Attend:
    """Return a backend's attention with a linear bias in the last channels of q and k, which it overwrites."""
    from megacontext_megatron.attention.folded_bias import BiasFold

    centre = doubled_centre.double() / 2
    fold = BiasFold(scale=scale, anchor=float(centre.min() + centre.max()) / 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = fold(query, key, slopes, centre)
        return backend(query, key, value)

    return attend


def as_folded(given: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the heads and slopes that a fold stands for: no content in the spare channels, slopes of few digits."""
    changed = dict(given)
    for name in ("query", "key"):
        changed[name] = given[name].detach().clone()
        changed[name][..., -SPARE:] = 0
    changed["slopes"] = (given["slopes"].detach() / scale).to(given["query"].dtype).float() * scale
    return changed


def _reference_windows(rotary: Rotary) -> Any:
    from megacontext_megatron.kernels.attention_reference import reference_attention

    def window_attention(
        query: Tensor, key: Tensor, value: Tensor, look_back: int, scale: float, *, rotation: Any = None
    ) -> Tensor:
        if rotation is not None:
            turn = rotary.module.span_rotary
            query, key = turn(query, key, rotation.places, rotation.table, rotation.options)
        return reference_attention(query, key, value, scale, look_back=look_back)

    def split_window_attention(
        mixed: Tensor, head_dim: int, look_back: int, scale: float, *, rotation: Any = None
    ) -> Tensor:
        return window_attention(*split(mixed, head_dim), look_back, scale, rotation=rotation)

    return SimpleNamespace(window_attention=window_attention, split_window_attention=split_window_attention)


def _reference_biased() -> Any:
    from megacontext_megatron.kernels.attention_reference import reference_attention

    def linear_bias_attention(
        query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Any, *, reach: Any = None
    ) -> Tensor:
        del reach
        # counted from one of them, so that half precision of the distance is never asked for
        centre = (bias.doubled_centre - bias.doubled_centre[:1]).double() / 2
        return reference_attention(query, key, value, scale, slopes=bias.slopes, centre=centre)

    return SimpleNamespace(linear_bias_attention=linear_bias_attention)
