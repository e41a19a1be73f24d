"""Attention as others offer it; each peer is a function of q, k and v, or an absence with its reason.

All take q [s, b, np, hn], k and v [s, b, ng, hn] and return [s, b, np, hn]; some want memory ordered (b, s, n, hn).
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scripts.benchmarks.cudnn_band import Band
from scripts.benchmarks.inputs import Shape
from scripts.benchmarks.peers import Absent, compiled, found

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Layout = Literal["rows first", "sequences first"]

BAND = "cuDNN band (frontend)"
CUDNN = "cuDNN (PyTorch SDPA)"
FLASH4 = "FlashAttention-4"
VARLEN = "FlashAttention-2 (torch varlen)"
ENGINE = "Transformer Engine"
FLEX = "FlexAttention"
FLEX_BLOCK = 128
"""Rows of a tile of FlexAttention's block masks."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A function of q, k and v with the order of memory it likes, or the reason of its absence."""

    attend: Attend | None = None
    layout: Layout = "rows first"
    absent: str = ""


def present(loads: Mapping[str, tuple[Callable[[], Attend], Layout]]) -> dict[str, Peer]:
    """Load every peer that this machine has; the others are absent for the reason they give."""
    peers = {}
    for name, (load, layout) in loads.items():
        try:
            peers[name] = Peer(attend=load(), layout=layout)
        except Absent as absent:
            peers[name] = Peer(absent=str(absent))
    return peers


def cudnn(scale: float) -> Attend:
    """Return PyTorch's scaled dot product attention, causal, by cuDNN alone."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3)

    return attend


def band(scale: float, look_back: int) -> Attend:
    """Return cuDNN's attention in a band."""
    return Band(look_back, scale)


def flash4(scale: float, look_back: int | None = None) -> Attend:
    """Return FlashAttention-4, causal; memory ordered (b, s, n, hn) needs no other strides."""
    function = found(lambda: importlib.import_module("flash_attn.cute").flash_attn_func)
    window = (look_back, None if look_back is None else 0)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (x.transpose(0, 1) for x in (query, key, value))
        out, _ = function(*heads, softmax_scale=scale, causal=True, window_size=window)
        return out.transpose(0, 1)

    return attend


def varlen(scale: float, look_back: int) -> Attend:
    """Return PyTorch's FlashAttention-2 in a window, sequences of one length packed after one another."""
    function = found(lambda: importlib.import_module("torch.nn.attention.varlen").varlen_attn)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, batch = query.shape[:2]
        ends = sequence_ends(rows, batch, query.device)
        heads = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out = function(*heads, ends, ends, rows, rows, scale=scale, window_size=(look_back, 0))
        return out.unflatten(0, (batch, rows)).transpose(0, 1)

    return attend


@functools.lru_cache(maxsize=8)
def sequence_ends(rows: int, batch: int, device: torch.device) -> Tensor:
    """Return where packed sequences of `rows` rows begin and end, int32 [b + 1]."""
    return torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=device)


def engine(shape: Shape, scale: float, look_back: int | None = None, bias: Tensor | None = None) -> Attend:
    """Return Transformer Engine's attention, causal; with a dense `bias` [1, np, s, s] that needs no gradient."""
    module = found(lambda: importlib.import_module("transformer_engine.pytorch"))
    core = module.DotProductAttention(
        num_attention_heads=shape.query_heads,
        kv_channels=shape.head_dim,
        num_gqa_groups=shape.groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None if look_back is None else (look_back, 0),
        softmax_scale=scale,
    )
    extra = {}
    if bias is not None:
        extra = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return core(query, key, value, **extra).unflatten(-1, (shape.query_heads, shape.head_dim))

    return attend


def flex(scale: float, mask: Any, change: Callable[..., Tensor] | None = None) -> Attend:
    """Return FlexAttention under torch.compile with a block mask and, where given, a change of scores."""
    function = found(_compiled_flex)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = function(*heads, score_mod=change, block_mask=mask, scale=scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3)

    return attend


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return compiled(importlib.import_module("torch.nn.attention.flex_attention").flex_attention)


def block_mask(first: Tensor, partial: Tensor, seen: Callable[..., Tensor]) -> Any:
    """Return FlexAttention's mask of tiles: those from `first` on, up to the diagonal, are visited.

    `first` and `partial` are int [h, tiles]: the first tile that a row of tiles visits, and the first in which `seen`
    (b, h, q, kv) decides about every pair; those between are seen whole.
    """
    module = importlib.import_module("torch.nn.attention.flex_attention")
    tiles = first.shape[1]
    column = torch.arange(tiles, device=first.device)

    def listed(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        places = (start[..., None] + column).clamp_max(tiles - 1)
        return count.int().unsqueeze(0), places.int().unsqueeze(0)

    return module.BlockMask.from_kv_blocks(
        *listed(partial, column + 1 - partial), *listed(first, partial - first), BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen
    )


def window_mask(rows: int, look_back: int, device: torch.device) -> Any:
    """Return FlexAttention's mask of a window that reaches over `look_back` rows before the row itself."""
    tile = torch.arange(rows // FLEX_BLOCK, device=device)
    first = ((tile * FLEX_BLOCK - look_back).clamp_min(0) // FLEX_BLOCK).unsqueeze(0)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return (key <= query) & (query - key <= look_back)

    return block_mask(first, first, seen)


def causal_mask(first: Tensor) -> Any:
    """Return FlexAttention's causal mask of tiles [h, tiles] that leaves out those before `first`."""
    diagonal = torch.arange(first.shape[1], device=first.device).expand(first.shape)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        return key <= query

    return block_mask(first, diagonal, seen)


def linear_change(slopes: Tensor, places: Tensor) -> Callable[..., Tensor]:
    """Return the change of scores of a linear bias: slopes fp32 [np], places fp32 [b, s] in tokens from any origin."""

    def change(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (places[batch, key] - places[batch, query])

    return change


def repeatable(out: Tensor) -> Callable[[], None]:
    """Return a call that makes Transformer Engine's nodes before `out` ready for one more backward pass.

    They drop what they keep in a first one, also where the graph is retained.
    """
    kept, seen, todo = [], set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
        names = [n for n in ("tensor_objects", "backward_objects") if getattr(node, n, None) is not None]
        kept += [(node, name, copy.copy(getattr(node, name))) for name in names]

    def again() -> None:
        for node, name, value in kept:
            setattr(node, name, copy.copy(value))

    return again
