"""Queries and keys of sliding-window attention rotated before it, and by what their gradients are turned back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megacontext_megatron.kernels.rotary_arguments import RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.kernels.window_layout import WindowLayout
from megacontext_megatron.kernels.window_rotation import rotate_rows

__all__ = ["RowRotation", "Turned", "turned_rows", "why_rotation_unsupported"]

_ROTATED_ROWS = 4
"""Handled at once by a program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRotation:
    """A rotary inside the attention: places of the key rows [sk, b], frequencies, and options."""

    places: RowPlaces
    table: RotaryTable
    options: RotaryOptions


class Turned(NamedTuple):
    """What a rotation leaves behind: queries, keys, both dense, and a table [2 or 4, sk b, groups, r]."""

    query: Tensor
    key: Tensor
    table: Tensor

    @property
    def table_of_queries(self) -> Tensor:
        """The cosines and sines of queries [2, sk b, groups, r]."""
        return self.table[-2:]


def why_rotation_unsupported(rotation: RowRotation, head_dim: int, groups: int) -> str | None:
    """Return why a rotation cannot be done inside, in a sentence, or None."""
    places, table = rotation.places, rotation.table
    pairs = table.omega.shape[-1]
    learnt = {"frequencies": table.omega, "widths": places.sigma, "offsets": places.offset}
    for name, given in learnt.items():
        if given is not None and given.requires_grad:
            return f"rotary inside the window's kernel gives {name} no gradient"
    if not 0 < 2 * pairs <= head_dim:
        return f"heads of {head_dim} channels do not hold {pairs} rotary pairs"
    if not rotation.options.interleaved and head_dim % (2 * pairs):
        return f"{pairs} rotary pairs of opposite channels do not divide half a head of {head_dim} channels"
    widths = 1 if places.sigma is None or places.sigma.dim() == 2 else places.sigma.shape[2]
    if not {len(table.omega), widths} <= {1, groups}:
        return f"{len(table.omega)} sets of frequencies and {widths} widths do not fit {groups} query groups"
    return None


def turned_rows(layout: WindowLayout, rotation: RowRotation, query: Tensor, key: Tensor) -> Turned:
    """Return queries and keys that begin where `layout` says, rotated and damped, and the table of their angles."""
    places, words, omega = rotation.places, rotation.table.words.contiguous(), rotation.table.omega.contiguous()
    sigma, offset, pairs = places.sigma, places.offset, omega.shape[1]
    sigma_groups = 0 if sigma is None else sigma.shape[2] if sigma.dim() == 3 else 1
    groups = max(len(omega), sigma_groups)
    plain = sigma is not None and not rotation.options.damp_query
    rows = layout.sk * layout.b
    finished = Turned(
        query.new_empty(layout.sq, layout.b, layout.np, layout.hn),
        key.new_empty(layout.sk, layout.b, layout.ng, layout.hn),
        key.new_empty(4 if plain else 2, rows, groups, pairs, dtype=torch.float32),
    )
    block_r, heads = triton.next_power_of_2(pairs), min(triton.next_power_of_2(layout.ng // groups), 8)
    sigma_strides = (0, 0, 0) if sigma is None else (*sigma.stride(), 0)[:3]
    offset_strides = (0, 0) if offset is None else offset.stride()
    if not rows:
        return finished
    rotate_rows[(-(-rows // _ROTATED_ROWS),)](
        query=query, key=key, query_out=finished.query, key_out=finished.key, table=finished.table,
        doubled_centre=places.doubled_centre, sigma=sigma, offset=offset, words=words, omega=omega,
        rows=rows, before=layout.sk - layout.sq, batch=layout.b, planes=finished.table.stride(0),
        query_s=layout.query[0], query_b=layout.query[1], query_g=layout.query[2], query_h=layout.query[3],
        key_s=layout.key[0], key_b=layout.key[1], key_g=layout.key[2],
        centre_s=places.doubled_centre.stride(0), centre_b=places.doubled_centre.stride(1),
        sigma_s=sigma_strides[0], sigma_b=sigma_strides[1], sigma_g=sigma_strides[2],
        offset_s=offset_strides[0], offset_b=offset_strides[1],
        NP=layout.np, NG=layout.ng, HN=layout.hn, R=pairs, BLOCK_R=block_r,
        BLOCK_REST=triton.next_power_of_2(max(1, layout.hn - 2 * pairs)),
        ROWS=_ROTATED_ROWS, HEADS=heads, GROUPS=groups,
        FREQUENCY_GROUPS=len(omega), SIGMA_GROUPS=sigma_groups, HAS_OFFSET=offset is not None,
        PLAIN=plain, INTERLEAVED=rotation.options.interleaved,
        num_warps=max(1, min(8, _ROTATED_ROWS * heads * block_r // 256)),
    )  # fmt: skip
    return finished
