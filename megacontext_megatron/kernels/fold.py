"""Linear biases in spare channels on the GPU: heads split and biases written in one launch each.

The same in plain PyTorch, with the meaning of what is written: attention.folded_bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacontext_megatron.encoding_config import SPARE_CHANNELS
from megacontext_megatron.kernels.fold_device import (
    fold_backward,
    fold_forward,
    split_backward,
    split_forward,
    sum_slopes,
)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_HEADS_OF_A_PROGRAM = 512
"""Whose spare channels four warps write or read at once: four of each thread."""

_CHANNELS_OF_A_PROGRAM = 4096
"""That four warps copy at once."""

_LINES = 256
_COLUMNS = 4
"""Of partial sums, added up at once by four warps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldScale:
    """What slopes are divided by, and the place in tokens that centres are counted from."""

    scale: float
    anchor: float


def fold_fits(query: Tensor, key: Tensor, slopes: Tensor, centre: Tensor) -> bool:
    """Return whether `fold` takes heads of one dtype, dense in channels, with fp32 slopes and fixed places."""
    shapes = slopes.shape in (query.shape[2:3], query.shape[:3]) and centre.shape == query.shape[:2]
    heads = query.dtype == key.dtype and query.dtype in _DTYPES and query.stride(-1) == key.stride(-1) == 1
    fixed = not (centre.requires_grad and torch.is_grad_enabled())
    return shapes and heads and fixed and slopes.dtype == torch.float32 and centre.dtype == torch.float64


def fold(query: Tensor, key: Tensor, slopes: Tensor, centre: Tensor, given: FoldScale) -> tuple[Tensor, Tensor]:
    """Return q [s, b, np, hn] and k [s, b, ng, hn] with biases in their spare channels, written where they lie.

    `slopes` are fp32 [np] or [s, b, np], nats per token, and get gradients, deterministic and summed in float64;
    `centre` is float64 [s, b], tokens, and gets none.  Raises ValueError for what `fold_fits` refuses.
    """
    if not fold_fits(query, key, slopes, centre):
        raise ValueError(
            f"biases of slopes {tuple(slopes.shape)} at places {tuple(centre.shape)} of {centre.dtype} do not fit "
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} of {query.dtype} and {key.dtype}"
        )
    return _FusedFold.apply(query, key, slopes, centre, given)  # pyright: ignore[reportReturnType]


def split_fits(mixed: Tensor) -> bool:
    """Return whether `split` takes a projection."""
    return mixed.dtype in _DTYPES and mixed.stride(-1) == 1


def split(mixed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [s, b, np, hn], k and v [s, b, ng, hn] of a projection [s, b, ng, (np / ng + 2) hn].

    q and k are contiguous copies with 0 in the spare channels, v is a view; the backward pass writes the gradient of
    `mixed` whole.  Raises ValueError for what `split_fits` refuses and for projections of other widths.
    """
    if not split_fits(mixed) or mixed.dim() != 4 or mixed.shape[3] % head_dim or mixed.shape[3] < 3 * head_dim:
        raise ValueError(f"a projection {tuple(mixed.shape)} of {mixed.dtype} for heads of {head_dim} channels")
    return _FusedSplit.apply(mixed, head_dim)  # pyright: ignore[reportReturnType]


class _FusedFold(torch.autograd.Function):
    """Called with q, k, slopes, places, and what these are counted in."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        slopes, centre, given = others
        rows, heads, groups = query.shape[0] * query.shape[1], query.shape[2], key.shape[2]
        tile = _rows_of_a_program(heads)
        by_row = slopes.expand(query.shape[:3])
        _launch(
            fold_forward, -(-rows // tile),
            query=query, key=key, slopes=by_row, centre=centre, scale=given.scale, rows=rows, batch=query.shape[1],
            **_strides("query", query), **_strides("key", key), **_strides("slope", by_row),
            centre_s=centre.stride(0), centre_b=centre.stride(1), ANCHOR=given.anchor, NP=heads, NG=groups,
            BLOCK_NP=triton.next_power_of_2(heads), BLOCK_NG=triton.next_power_of_2(groups),
            FIRST=query.shape[3] - SPARE_CHANNELS, SPARE=SPARE_CHANNELS, ROWS=tile, num_warps=4,
        )  # fmt: skip
        # Autograd does not see what a kernel writes: whoever had saved the old values must hear of it all the same.
        torch.autograd.graph.increment_version([each for each in (query, key) if not each.is_inference()])
        ctx.save_for_backward(centre)
        ctx.given, ctx.shape = given, slopes.shape
        return query, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key = gradients
        [centre] = ctx.saved_tensors
        slopes = _slope_gradient(query, centre, ctx.given, ctx.shape) if ctx.needs_input_grad[2] else None
        return query, key, slopes, None, None


def _slope_gradient(query: Tensor, centre: Tensor, given: FoldScale, shape: torch.Size) -> Tensor:
    """Return the gradient, fp32, of slopes of a shape for that of queries."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    rows, heads = query.shape[0] * query.shape[1], query.shape[2]
    tile, by_row = _rows_of_a_program(heads), len(shape) > 1
    programs = -(-rows // tile)
    slopes = query.new_empty(shape, dtype=torch.float32)
    found = slopes if by_row else query.new_empty(programs, heads, dtype=torch.float64)
    _launch(
        fold_backward, programs,
        query_grad=query, centre=centre, slope_grad=found, scale=given.scale, rows=rows, batch=query.shape[1],
        **_strides("query", query), centre_s=centre.stride(0), centre_b=centre.stride(1),
        ANCHOR=given.anchor, NP=heads, BLOCK_NP=triton.next_power_of_2(heads),
        FIRST=query.shape[3] - SPARE_CHANNELS, SPARE=SPARE_CHANNELS, ROWS=tile, BY_ROW=by_row, num_warps=4,
    )  # fmt: skip
    if not by_row:
        _launch(
            sum_slopes, -(-heads // _COLUMNS),
            partials=found, slope_grad=slopes, scale=given.scale, programs=programs,
            NP=heads, STEPS=-(-programs // _LINES), BLOCK=_LINES, COLUMNS=_COLUMNS, num_warps=4,
        )  # fmt: skip
    return slopes


class _FusedSplit(torch.autograd.Function):
    """Called with a mixed projection and the channels of a head."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        s, b, groups, width = mixed.shape
        heads = groups * (width // head_dim - 2)
        query, key = (mixed.new_empty(s, b, count, head_dim) for count in (heads, groups))
        constants = _split_constants(heads, groups, head_dim)
        _launch(
            split_forward, -(-s * b * (heads + groups) // constants["UNITS"]),
            mixed=mixed, query=query, key=key, rows=s * b, batch=b,
            mixed_s=mixed.stride(0), mixed_b=mixed.stride(1), mixed_g=mixed.stride(2), **constants,
        )  # fmt: skip
        return query, key, mixed[..., -head_dim:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in gradients)
        s, b, heads, head_dim = query.shape
        groups = key.shape[2]
        mixed = query.new_empty(s, b, groups, (heads // groups + 2) * head_dim)
        constants = _split_constants(heads, groups, head_dim)
        _launch(
            split_backward, -(-s * b * (heads + 2 * groups) // constants["UNITS"]),
            query_grad=query, key_grad=key, value_grad=value, mixed_grad=mixed, rows=s * b, batch=b,
            **_strides("query", query), **_strides("key", key), **_strides("value", value), **constants,
        )  # fmt: skip
        return mixed, None


def _split_constants(heads: int, groups: int, head_dim: int) -> dict[str, Any]:
    """Return the constants that both passes of the split share."""
    padded: Any = triton.next_power_of_2(head_dim)
    return {
        "NP": heads, "NG": groups, "HN": head_dim, "BLOCK_HN": padded, "SPARE": SPARE_CHANNELS,
        "UNITS": max(1, _CHANNELS_OF_A_PROGRAM // padded), "num_warps": 4,
    }  # fmt: skip


def _rows_of_a_program(heads: int) -> int:
    padded: Any = triton.next_power_of_2(heads)
    return max(1, _HEADS_OF_A_PROGRAM // padded)


def _strides(name: str, heads: Tensor) -> dict[str, int]:
    """Return the strides of rows, sequences and heads as arguments of a kernel."""
    return {f"{name}_{axis}": heads.stride(n) for n, axis in enumerate("sbh")}


def _launch(kernel: Any, blocks: int, **arguments: Any) -> None:
    if blocks:
        kernel[(blocks,)](**arguments)
