"""The span rotary in plain PyTorch: what the kernels must equal, differentiable, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext_megatron.kernels.rotary_arguments import QKNorm, RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.position.gaussian import damping, rotate
from megacontext_megatron.position.phase import integer_angles


def span_rotary(
    query: Tensor, key: Tensor, places: RowPlaces, table: RotaryTable, options: RotaryOptions
) -> tuple[Tensor, Tensor]:
    """Return finished queries [s, b, np, hn] and keys [s, b, ng, hn]; arguments as in kernels.rotary.

    Computed in fp32, or in float64 where queries are.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    angle = _angles(places, table, wide)
    cos, sin = angle.cos(), angle.sin()
    damp = torch.ones_like(cos)
    if places.sigma is not None:
        sigma = places.sigma if places.sigma.dim() == 3 else places.sigma.unsqueeze(2)
        damp = damping(sigma.to(wide), table.omega.to(wide))
    keys = cos * damp, sin * damp
    queries = keys if options.damp_query else (cos, sin)
    return _turned(query, queries, options), _turned(key, keys, options)


def split_span_rotary(
    mixed: Tensor,
    head_dim: int,
    places: RowPlaces,
    table: RotaryTable,
    options: RotaryOptions,
    *,
    norm: QKNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return finished q [s, b, np, hn], k and v [s, b, ng, hn] of a mixed projection, as kernels.rotary does."""
    s, b = mixed.shape[:2]
    queries, key, value = mixed.split((mixed.shape[3] - 2 * head_dim, head_dim, head_dim), dim=3)
    query = queries.reshape(s, b, -1, head_dim)
    if norm is not None:
        query, key = _normed(query, norm.query_weight, norm), _normed(key, norm.key_weight, norm)
    query, key = span_rotary(query, key, places, table, options)
    return query.to(mixed.dtype), key.to(mixed.dtype), value.contiguous()


def _normed(x: Tensor, weight: Tensor, norm: QKNorm) -> Tensor:
    """Return heads normalised in fp32 at least, not rounded to their own dtype before they are rotated."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (x.to(wide).square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    return x.to(wide) * scale * (weight.to(wide) + 1.0 if norm.zero_centred else weight.to(wide))


def _angles(places: RowPlaces, table: RotaryTable, wide: torch.dtype) -> Tensor:
    """Return angles [s, b, 1 or ng, r]: exact at the centre, plus the offset's; with the gradient of omega."""
    words = table.words.long()
    high = (words[0] << 32) | (words[1] & 0xFFFFFFFF)
    low = (words[2] & 0xFFFFFFFF).double() / 2.0**32
    centre = places.doubled_centre.long()
    angle = integer_angles(centre[..., None, None], high, low).to(wide)
    omega = table.omega.to(wide)
    if places.offset is not None:
        angle = angle + places.offset.to(wide)[..., None, None] * omega
    if omega.requires_grad:
        near = centre if places.anchor is None else centre - places.anchor
        angle = angle + (near.to(wide) / 2)[..., None, None] * (omega - omega.detach())
    return angle


def _turned(x: Tensor, turn: tuple[Tensor, Tensor], options: RotaryOptions) -> Tensor:
    cos, sin = (t if t.shape[2] == 1 else t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in turn)
    return rotate(x, cos, sin, interleaved=options.interleaved)
