"""Sliding-window attention with few bytes moved, forward and backward, on request with rotary inside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from megacontext_megatron.kernels.row_rotation import RowRotation, Turned, turned_rows, why_rotation_unsupported
from megacontext_megatron.kernels.window_backward import key_kernel, query_kernel
from megacontext_megatron.kernels.window_forward import forward_kernel
from megacontext_megatron.kernels.window_layout import WindowLayout, dense_channels
from megacontext_megatron.kernels.window_strips import (
    TurnedBack,
    aligned,
    strip_forward,
    strip_query_gradient,
    turns_back,
    why_no_strips,
)

__all__ = [
    "Tile",
    "Tiles",
    "attend_rows",
    "choose_tiles",
    "gradients_of_rows",
    "split_window_attention",
    "why_unsupported",
    "window_attention",
]

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, or as many other tensors that belong to them."""

_LOG2_E = 1.4426950408889634
_MOST_PACKED = 128


class Tile(NamedTuple):
    """How a kernel runs: lanes (a query head of a row each) and keys of a tile, warps, stages of its pipeline.

    `mask_all` is whether every tile is masked, or only those at an edge, which costs a branch.
    """

    lanes: int
    keys: int
    warps: int
    stages: int
    mask_all: bool = False


class Tiles(NamedTuple):
    """How the three kernels run: forward, gradients of queries, gradients of keys and values."""

    forward: Tile
    query: Tile
    key: Tile


def choose_tiles(head_dim: int, per_group: int, look_back: int) -> Tiles:
    """Return how the kernels run for heads of 64 or 128 channels, `per_group` queries to a key, and a window."""
    # A tile of lanes sees its own rows besides the window, so few rows waste little, and small programs wait together.
    narrow = look_back < 256 and per_group > 1
    forward = Tile(64, 32, 4, 3) if narrow else Tile(128, 64, 4, 3)
    query = Tile(64, 32, 4, 2) if narrow else Tile(128, 64, 8, 2)
    key = Tile(64, 64, 4, 2, True)
    if head_dim <= 64:
        key = Tile(128, 64, 4, 2)
    return Tiles(forward, query, key)


def why_unsupported(heads: int, groups: int, head_dim: int, dtype: torch.dtype, *, interpreted: bool) -> str | None:
    """Return why heads cannot be served, in a sentence, or None; `interpreted` kernels also serve float32."""
    kinds = (torch.bfloat16, torch.float16, *((torch.float32,) if interpreted else ()))
    if dtype not in kinds:
        return f"the kernel computes from bfloat16 or float16, not from {dtype}"
    if head_dim not in (64, 128) and not (interpreted and head_dim in (16, 32)):
        return f"the kernel serves heads of 64 or 128 channels, not of {head_dim}"
    if groups < 1 or heads < 1 or heads % groups:
        return f"{heads} query heads are not a multiple of {groups} query groups"
    if heads // groups > _MOST_PACKED:
        return f"the kernel serves up to {_MOST_PACKED} query heads of a group, not {heads // groups}"
    return None


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    look_back: int,
    scale: float,
    *,
    rotation: RowRotation | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return attention [sq, b, np, hn], contiguous, of queries that are the last sq of sk rows and see a window.

    Queries are [sq, b, np, hn], keys and values [sk, b, ng, hn], bfloat16 or float16; a query sees its own row and the
    `look_back` before it; softmax and sums are fp32.  With `rotation`, queries and keys come unrotated, are rotated and
    damped in fp32 and rounded to their own dtype, as kernels.rotary does in launches of its own; gradients are those of
    what came in.  Gradients are deterministic.  `tiles` overrides choose_tiles.  Raises ValueError for tensors that do
    not fit, and for what why_unsupported and why_rotation_unsupported name.
    """
    query, key, value = map(dense_channels, (query, key, value))
    layout = WindowLayout.of_heads(query, key, value)
    return _attention(layout, (query, key, value), look_back, scale, rotation=rotation, tiles=tiles)


def split_window_attention(
    mixed: Tensor,
    head_dim: int,
    look_back: int,
    scale: float,
    *,
    rotation: RowRotation | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return attention [s, b, np, hn], contiguous, of Megatron's mixed projection, read where it lies.

    `mixed` is [s, b, ng, (np / ng + 2) hn]: each query group's queries, then its key, then its value; its gradient is
    written whole.  Otherwise as window_attention.
    """
    mixed = dense_channels(mixed)
    layout = WindowLayout.of_mixed(mixed, head_dim)
    return _attention(layout, (mixed, None, None), look_back, scale, rotation=rotation, tiles=tiles)


def _attention(
    layout: WindowLayout,
    sources: tuple[Tensor, Tensor | None, Tensor | None],
    look_back: int,
    scale: float,
    *,
    rotation: RowRotation | None,
    tiles: Tiles | None,
) -> Tensor:
    spec = _spec_of(layout, look_back, scale, sources[0].dtype, rotation=rotation, tiles=tiles)
    return _WindowAttention.apply(spec, *sources)


def attend_rows(heads: Heads, out: Tensor, *, look_back: int, scale: float) -> Tensor:
    """Write attention of queries, keys and values to `out`, as window_attention finds it, and return normalisers.

    For autograd functions: nothing is recorded.  The heads of a row of `out` are dense; normalisers are fp32
    [b, ng, sq, np / ng].
    """
    read = _read_of(heads)
    spec = _spec_of(read.layout, look_back, scale, out.dtype)
    normaliser = _normaliser(read.layout, out)
    _attend(spec, read, out, normaliser)
    return normaliser


def gradients_of_rows(heads: Heads, given: Heads, into: Heads, *, look_back: int, scale: float) -> None:
    """Write gradients of queries, keys and values to `into`; `given` are output, its gradient, and normalisers.

    Output and its gradient have the same strides, a row's heads of theirs are dense and begin at multiples of 16 bytes,
    and so do those of `into`, where keys and values have the same strides.
    """
    read = _read_of(heads)
    spec = _spec_of(read.layout, look_back, scale, given[0].dtype)
    _turn_back(spec, read, None, given, (WindowLayout.of_heads(*into), *into))


def _read_of(heads: Heads) -> _Read:
    query, key, value = map(dense_channels, heads)
    return _Read(WindowLayout.of_heads(query, key, value), (query, key, value))


def _spec_of(
    layout: WindowLayout,
    look_back: int,
    scale: float,
    dtype: torch.dtype,
    *,
    rotation: RowRotation | None = None,
    tiles: Tiles | None = None,
) -> _Spec:
    """Return what a call is made of; raises ValueError where a tensor or number does not fit."""
    heads, groups, head_dim = layout.np, layout.ng, layout.hn
    why = why_unsupported(heads, groups, head_dim, dtype, interpreted=knobs.runtime.interpret)
    if why is None and rotation is not None:
        why = why_rotation_unsupported(rotation, head_dim, groups)
    if why is None and rotation is not None and rotation.places.doubled_centre.shape != (layout.sk, layout.b):
        places = tuple(rotation.places.doubled_centre.shape)
        why = f"places of {places} rows do not fit {layout.sk} rows of {layout.b} sequences"
    if why is None and look_back < 0:
        why = f"a query looks {look_back} rows back"
    if why is None and not scale > 0:
        why = f"scores are scaled by {scale}, which is not positive"
    if why is not None:
        raise ValueError(why)
    reach = min(look_back, max(layout.sk - 1, 0))
    return _Spec(layout=layout, look_back=reach, scale=scale, rotation=rotation, tiles=tiles)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spec:
    """What a call is made of besides the tensors that may get gradients."""

    layout: WindowLayout
    look_back: int
    scale: float
    rotation: RowRotation | None
    tiles: Tiles | None


class _Read(NamedTuple):
    """Queries, keys and values as the kernels read them, and where they lie."""

    layout: WindowLayout
    heads: Heads


def _read(spec: _Spec, sources: tuple[Tensor, Tensor | None, Tensor | None], turned: Turned | None) -> _Read:
    layout, heads = spec.layout, spec.layout.parts(*sources)
    if turned is None:
        return _Read(layout, heads)
    dense = layout.gradient_of_heads
    return _Read(replace(layout, query=dense.query, key=dense.key, mixed=False), (turned.query, turned.key, heads[2]))


def _common(spec: _Spec, layout: WindowLayout, out: Tensor, tile: Tile) -> dict[str, Any]:
    """Return the arguments that all three kernels share."""
    return {
        "sq": layout.sq, "sk": layout.sk, "batch": layout.b, "look_back": spec.look_back,
        "query_s": layout.query[0], "query_b": layout.query[1],
        "query_g": layout.query[2], "query_h": layout.query[3],
        "key_s": layout.key[0], "key_b": layout.key[1], "key_g": layout.key[2],
        "value_s": layout.value[0], "value_b": layout.value[1], "value_g": layout.value[2],
        "out_s": out.stride(0), "out_b": out.stride(1),
        "NG": layout.ng, "GROUP": layout.per_group, "PACK": layout.packed, "HN": layout.hn,
        "LANES": max(tile.lanes, layout.packed), "KEYS": tile.keys, "MASK_ALL": tile.mask_all,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _turning_back(spec: _Spec, table: Tensor | None) -> dict[str, Any]:
    """Return the arguments by which gradients are turned back."""
    return {
        "table": table, "planes": 0 if table is None else table.stride(0), "ROTATE": table is not None,
        "TABLE_GROUPS": 1 if table is None else table.shape[2], "R": 1 if table is None else table.shape[3],
        "INTERLEAVED": spec.rotation is not None and spec.rotation.options.interleaved,
    }  # fmt: skip


def _launch(kernel: Any, blocks: int, **arguments: Any) -> None:
    if blocks:
        kernel[(blocks,)](**arguments)


def _strips(spec: _Spec, read: _Read) -> bool:
    """Return whether the kernels of window_strips serve, unless tiles were asked for."""
    turn = spec.rotation
    turnable = turn is None or turns_back(turn.table.omega.shape[1], interleaved=turn.options.interleaved)
    return spec.tiles is None and turnable and why_no_strips(read.layout, spec.look_back, read.heads) is None


def _tiles(spec: _Spec) -> Tiles:
    layout = spec.layout
    return spec.tiles or choose_tiles(layout.hn, layout.per_group, spec.look_back)


def _normaliser(layout: WindowLayout, out: Tensor) -> Tensor:
    return out.new_empty(layout.b, layout.ng, layout.sq, layout.per_group, dtype=torch.float32)


def _attend(spec: _Spec, read: _Read, out: Tensor, normaliser: Tensor) -> None:
    layout, scale = read.layout, spec.scale * _LOG2_E
    if _strips(spec, read):
        strip_forward(layout, read.heads, scale, out, normaliser)
        return
    tile = _tiles(spec).forward
    query, key, value = read.heads
    _launch(
        forward_kernel, layout.query_blocks(tile.lanes), query=query, key=key, value=value,
        out=out, normaliser=normaliser, scale=scale, **_common(spec, layout, out, tile),
    )  # fmt: skip


def _turn_back(
    spec: _Spec,
    read: _Read,
    turned: Turned | None,
    given: Heads,
    into: tuple[WindowLayout, Tensor, Tensor, Tensor],
) -> None:
    """Write gradients; `given` are output, its gradient, and normalisers, and `into` says where gradients lie."""
    (query, key, value), layout = read.heads, read.layout
    (out, grad, normaliser), (to, query_grad, key_grad, value_grad) = given, into
    delta = torch.empty_like(normaliser)
    query_table, key_table = (None, None) if turned is None else (turned.table_of_queries, turned.table)
    if _strips(spec, read):
        back = None
        if query_table is not None and spec.rotation is not None:
            back = TurnedBack(query_table, spec.rotation.options.interleaved)
        strip_query_gradient(
            layout, read.heads, spec.scale, (grad, normaliser), into=(to, query_grad, delta), turned=back
        )
    else:
        tile = _tiles(spec).query
        _launch(
            query_kernel, layout.query_blocks(tile.lanes), query=query, key=key, value=value, out=out, out_grad=grad,
            normaliser=normaliser, delta=delta, query_grad=query_grad, scale=spec.scale,
            query_grad_s=to.query[0], query_grad_b=to.query[1], query_grad_g=to.query[2], query_grad_h=to.query[3],
            **_common(spec, layout, grad, tile), **_turning_back(spec, query_table),
        )  # fmt: skip
    tile = _tiles(spec).key
    _launch(
        key_kernel, layout.key_blocks(tile.keys), query=query, key=key, value=value, out_grad=grad,
        normaliser=normaliser, delta=delta, key_grad=key_grad, value_grad=value_grad, scale=spec.scale,
        key_grad_s=to.key[0], key_grad_b=to.key[1], key_grad_g=to.key[2],
        **_common(spec, layout, grad, tile), **_turning_back(spec, key_table),
    )  # fmt: skip


class _WindowAttention(torch.autograd.Function):
    """Called with a spec and either a mixed projection, or queries, keys and values."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, source: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        turned = None
        if spec.rotation is not None:
            turned = turned_rows(spec.layout, spec.rotation, *spec.layout.parts(source, key, value)[:2])
        read = _read(spec, (source, key, value), turned)
        out = source.new_empty(spec.layout.sq, spec.layout.b, spec.layout.np, spec.layout.hn)
        normaliser = _normaliser(spec.layout, out)
        _attend(spec, read, out, normaliser)
        ctx.spec, ctx.turned = spec, turned is not None
        ctx.save_for_backward(source, key, value, out, normaliser, *(turned or ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        source, key, value, out, normaliser, *rest = ctx.saved_tensors
        # What was kept on the host comes back with other strides.
        layout = ctx.spec.layout.again(source, key, value)
        spec: _Spec = replace(ctx.spec, layout=layout)
        turned = Turned(*rest) if ctx.turned else None
        wanted: tuple[Tensor | None, ...]
        if key is None or value is None:
            wanted = source.new_empty(source.shape), None, None
        else:
            wanted = source.new_empty(source.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        to = spec.layout.gradient
        read = _read(spec, (source, key, value), turned)
        _turn_back(spec, read, turned, (out, aligned(gradients[0]), normaliser), (to, *to.parts(*wanted)))
        return None, *wanted
