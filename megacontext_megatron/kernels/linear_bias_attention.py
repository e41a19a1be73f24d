"""Causal attention with a linear bias on the distance of rows, forward and backward, skipping what is out of reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from megacontext_megatron.kernels.linear_bias_backward import query_kernel, row_products
from megacontext_megatron.kernels.linear_bias_backward_keys import key_kernel
from megacontext_megatron.kernels.linear_bias_device import write_places
from megacontext_megatron.kernels.linear_bias_forward import forward_kernel
from megacontext_megatron.kernels.reach import Reach, score_bound, visits

__all__ = ["LinearBias", "Reach", "linear_bias_attention", "score_bound", "why_unsupported"]

_PRODUCTS = 32
"""Of rows, whose outputs a program multiplies with their gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearBias:
    """A penalty on the distance of rows; raises ValueError where a shape or type differs from these:

    `slopes`: fp32 [np] or [sq, b, np], nats per token; gets a gradient where it requires one.
    `doubled_centre`: int64, or float64 of whole numbers, [sk, b], twice the centre in tokens; never falling over rows.
    """

    slopes: Tensor
    doubled_centre: Tensor

    def __post_init__(self) -> None:
        if self.slopes.dtype != torch.float32 or self.slopes.dim() not in (1, 3):
            raise ValueError(f"slopes {tuple(self.slopes.shape)} of {self.slopes.dtype}")
        if self.doubled_centre.dim() != 2 or self.doubled_centre.dtype not in (torch.int64, torch.float64):
            raise ValueError(f"doubled centres {tuple(self.doubled_centre.shape)} of {self.doubled_centre.dtype}")


class Launch(NamedTuple):
    """How one kernel runs: queries and keys of a tile, warps of a program, and stages of its software pipeline.

    `bulk` is whether tiles are brought by bulk copies (TMA) instead of by copies of each thread.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    bulk: bool = True


class Tiles(NamedTuple):
    """How the three kernels run: forward, gradients of queries, gradients of keys and values."""

    forward: Launch
    query: Launch
    key: Launch

    @property
    def frame(self) -> int:
        """Return the rows that share an anchor, and an entry of the table of what is visited: all tiles divide it."""
        return max(max(launch.queries, launch.keys) for launch in self)


def choose_tiles(head_dim: int) -> Tiles:
    """Return how the kernels run for heads of 64 or 128 channels; rows of queries divide one another."""
    if head_dim <= 64:
        return Tiles(Launch(128, 128, 8, 3), Launch(128, 64, 8, 3), Launch(64, 128, 8, 3))
    return Tiles(Launch(128, 128, 8, 3), Launch(128, 64, 8, 2), Launch(64, 64, 4, 2))


def why_unsupported(heads: int, groups: int, head_dim: int, dtype: torch.dtype, *, interpreted: bool) -> str | None:
    """Return why heads cannot be served, in a sentence, or None; `interpreted` kernels also serve float32."""
    kinds = (torch.bfloat16, torch.float16, *((torch.float32,) if interpreted else ()))
    if dtype not in kinds:
        return f"the kernel computes from bfloat16 or float16, not from {dtype}"
    if head_dim not in (64, 128) and not (interpreted and head_dim in (16, 32)):
        return f"the kernel serves heads of 64 or 128 channels, not of {head_dim}"
    if groups < 1 or heads % groups:
        return f"{heads} query heads are not a multiple of {groups} query groups"
    return None


def linear_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: LinearBias | None = None,
    *,
    look_back: int | None = None,
    reach: Reach | None = None,
) -> Tensor:
    """Return causal attention [sq, b, np, hn], contiguous, of queries that are the last sq of sk rows.

    Queries are [sq, b, np, hn], keys and values [sk, b, ng, hn]; scores are scale q.k + slope (mu_k - mu_q); a query
    sees its own row and the `look_back` before it, or all before it.  Softmax and sums are fp32.  Distances are found
    exactly and then rounded to fp32, so precision does not depend on where in a billion tokens the rows are.  With
    `reach` keys are left unread whose weight cannot be seen in bf16 (kernels.reach), which needs `bias` and rising
    slopes to have an effect.  Gradients are deterministic; those of slopes come from distances to the row itself.
    Raises ValueError for tensors that do not fit.  The same in plain PyTorch: kernels.attention_reference.
    """
    _check_heads(query, key, value)
    _check_rows(query, key, bias, reach)
    if look_back is not None and look_back < 0:
        raise ValueError(f"a query looks {look_back} rows back")
    sq, batch, heads, head_dim = query.shape
    spec = _Spec(
        sq=sq, sk=len(key), batch=batch, heads=heads, groups=key.shape[2], head_dim=head_dim, scale=scale,
        # No further than there are rows, so that no row plus it overflows.
        look_back=None if look_back is None else min(look_back, len(key)),
        reach=None if bias is None else reach, tiles=choose_tiles(head_dim),
    )  # fmt: skip
    slopes, centre = (None, None) if bias is None else (bias.slopes, bias.doubled_centre)
    return _LinearBiasAttention.apply(spec, *map(_dense, (query, key, value)), slopes, centre)


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    (sq, batch, heads, head_dim), (sk, _, groups, _) = query.shape, key.shape
    if key.shape != (sk, batch, groups, head_dim) or value.shape != key.shape or not 0 < sq <= sk:
        raise ValueError(f"queries {tuple(query.shape)}, keys {tuple(key.shape)}, values {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"queries are {query.dtype}, keys {key.dtype}, values {value.dtype}")
    reason = why_unsupported(heads, groups, head_dim, query.dtype, interpreted=not query.is_cuda)
    if reason is not None:
        raise ValueError(reason)


def _check_rows(query: Tensor, key: Tensor, bias: LinearBias | None, reach: Reach | None) -> None:
    rows, heads = tuple(query.shape[:2]), query.shape[2]
    if bias is not None and bias.slopes.shape not in ((heads,), (*rows, heads)):
        raise ValueError(f"slopes {tuple(bias.slopes.shape)} for queries {tuple(query.shape)}")
    if bias is not None and bias.doubled_centre.shape != key.shape[:2]:
        raise ValueError(f"centres {tuple(bias.doubled_centre.shape)} for keys {tuple(key.shape)}")
    if reach is not None and reach.score_bound.shape != (heads,):
        raise ValueError(f"bounds {tuple(reach.score_bound.shape)} for {heads} heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spec:
    """What a call is made of besides its tensors."""

    sq: int
    sk: int
    batch: int
    heads: int
    groups: int
    head_dim: int
    scale: float
    look_back: int | None
    reach: Reach | None
    tiles: Tiles

    @property
    def lines(self) -> int:
        """Return the rows of what is kept per query, whole tiles of every kernel."""
        return _blocks(self.sq, self.tiles.frame) * self.tiles.frame


class _Operands(NamedTuple):
    """What all kernels read besides heads: the bias, and what is visited."""

    slopes: Tensor | None
    places: Tensor | None
    first: Tensor | None
    head_order: Tensor | None
    group_order: Tensor | None


def _dense(x: Tensor) -> Tensor:
    """Return heads as bulk copies can read them: channels dense, all else at multiples of 16 bytes, heads near."""
    places = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))
    near = x.shape[1] * x.stride(1) + x.shape[2] * x.stride(2) < 2**31
    return x if near and x.stride(3) == 1 and not any(place % 16 for place in places) else x.contiguous()


def _launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    kernel[grid](**arguments)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _operands(spec: _Spec, slopes: Tensor | None, doubled_centre: Tensor | None) -> _Operands:
    """Return centres as the kernels read them, and what is visited where there is a reach."""
    if slopes is None or doubled_centre is None:
        return _Operands(None, None, None, None, None)
    centre = doubled_centre.long()
    frame = spec.tiles.frame
    frames = _blocks(spec.sk, frame)
    places = torch.empty(spec.batch, 3, frames * frame, dtype=torch.float32, device=centre.device)
    _launch(
        write_places, (frames, spec.batch), doubled=centre, places=places, sk=spec.sk,
        centre_s=centre.stride(0), centre_b=centre.stride(1), FRAME=frame,
    )  # fmt: skip
    if spec.reach is None:
        return _Operands(slopes, places, None, None, None)
    seen = visits(spec.reach, slopes, centre, (spec.sq, spec.heads, spec.groups), frame)
    return _Operands(slopes, places, *seen)


def _common(spec: _Spec, given: _Operands, launch: Launch, **heads: Tensor) -> dict[str, Any]:
    """Return the arguments that all kernels share; `heads` are tensors [rows, b, heads, hn] by their names."""
    slopes = given.slopes
    strides = {axis: size for name, x in heads.items() for axis, size in _strides(name, x).items()}
    slope = (0, 0, 0) if slopes is None else (0, 0, *slopes.stride())[-3:]
    rows = {name: launch.keys if name in ("key", "value") else launch.queries for name in heads}
    read = {name: _bulk(x, rows[name]) if launch.bulk else x for name, x in heads.items()}
    return {
        **read, **strides,
        "slopes": slopes, "places": given.places, "first": given.first,
        "slope_s": slope[0], "slope_b": slope[1], "slope_h": slope[2],
        "scale": spec.scale * math.log2(math.e),
        "sq": spec.sq, "sk": spec.sk, "look_back": spec.look_back or 0, "lines": spec.lines,
        "NP": spec.heads, "GROUP": spec.heads // spec.groups, "HN": spec.head_dim,
        "BLOCK_M": launch.queries, "BLOCK_N": launch.keys, "FRAME": spec.tiles.frame, "BULK": launch.bulk,
        "BIAS": 0 if slopes is None else 1 if slopes.dim() == 1 else 2,
        "REACH": given.first is not None, "WINDOW": spec.look_back is not None,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip


def _line(numbers: Tensor | None, rows: int, launch: Launch) -> Tensor | TensorDescriptor | None:
    """Return numbers as one line, of which a tile is `rows`."""
    if numbers is None or not launch.bulk:
        return numbers
    return TensorDescriptor(numbers, [numbers.numel()], [1], [rows])


def _bulk(heads: Tensor, rows: int) -> TensorDescriptor:
    """Return heads as rows by elements, of which a tile is `rows` by the channels of one head."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(heads.shape[1:], heads.stride()[1:], strict=True))
    return TensorDescriptor(heads, [len(heads), extent], [heads.stride(0), 1], [rows, heads.shape[3]])


def _strides(name: str, heads: Tensor) -> dict[str, int]:
    """Return how far apart in elements rows, sequences and heads or query groups are."""
    return {f"{name}_{axis}": heads.stride(at) for at, axis in enumerate("sbh")}


class _LinearBiasAttention(torch.autograd.Function):
    """Called with a spec, queries, keys, values, slopes and doubled centres."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, query: Tensor, key: Tensor, value: Tensor, *bias: Tensor | None) -> Tensor:
        given = _operands(spec, *bias)
        out = query.new_empty(query.shape)
        # Rows that fill up a tile keep an infinite normaliser, which gives them no weight in the backward.
        normaliser = query.new_full((spec.batch, spec.heads, spec.lines), math.inf, dtype=torch.float32)
        launch = spec.tiles.forward
        _launch(
            forward_kernel, (_blocks(spec.sq, launch.queries) * spec.batch * spec.heads,),
            out=out, normaliser=normaliser, within_frame=_line(given.places, launch.keys, launch),
            order=given.head_order, **_strides("out", out),
            **_common(spec, given, launch, query=query, key=key, value=value),
        )  # fmt: skip
        ctx.spec = spec
        ctx.save_for_backward(query, key, value, out, normaliser, *given)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normaliser, *small = ctx.saved_tensors
        spec: _Spec = ctx.spec
        given, gradient = _Operands(*small), _dense(gradients[0])
        products = torch.empty_like(normaliser)
        _launch(
            row_products, (_blocks(spec.lines, _PRODUCTS), spec.batch * spec.heads),
            out=out, gradient=gradient, products=products, sq=spec.sq, lines=spec.lines,
            NP=spec.heads, HN=spec.head_dim, ROWS=_PRODUCTS,
            **_strides("out", out), **_strides("gradient", gradient),
        )  # fmt: skip
        seen = {"query": query, "key": key, "value": value, "gradient": gradient}
        kept = {"normaliser": normaliser, "products": products}
        dq, slope_grad = _query_gradients(spec, given, seen, kept, for_slopes=ctx.needs_input_grad[4])
        dk, dv = (x.new_empty(x.shape) for x in (key, value))
        launch = spec.tiles.key
        _launch(
            key_kernel, (_blocks(spec.sk, launch.keys) * spec.batch * spec.groups,),
            key_grad=dk, value_grad=dv, order=given.group_order,
            RAGGED=spec.sq % launch.queries > 0, REACH_TILES=triton.next_power_of_2(_blocks(spec.sq, spec.tiles.frame)),
            **{name: _line(x, launch.queries, launch) for name, x in kept.items()},
            natural_scale=spec.scale, **_strides("grad", dk), **_common(spec, given, launch, **seen),
        )  # fmt: skip
        return None, dq, dk, dv, slope_grad, None


def _query_gradients(
    spec: _Spec, given: _Operands, seen: dict[str, Tensor], kept: dict[str, Any], *, for_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of queries and, on request, of slopes, summed over rows in float64."""
    query, launch = seen["query"], spec.tiles.query
    tiles = _blocks(spec.sq, launch.queries)
    dq, partial = query.new_empty(query.shape), None
    per_row = given.slopes is not None and given.slopes.dim() == 3
    if for_slopes:
        parts = spec.sq if per_row else tiles
        partial = torch.empty(spec.batch, spec.heads, parts, dtype=torch.float32, device=query.device)
    _launch(
        query_kernel, (tiles * spec.batch * spec.heads,),
        query_grad=dq, slope_grad=partial, order=given.head_order, GRAD_SLOPE=for_slopes,
        within_frame=_line(given.places, launch.keys, launch), natural_scale=spec.scale,
        **kept, **_strides("grad", dq), **_common(spec, given, launch, **seen),
    )  # fmt: skip
    if partial is None:
        return dq, None
    return dq, partial.permute(2, 0, 1) if per_row else partial.sum((0, 2), dtype=torch.float64).float()
