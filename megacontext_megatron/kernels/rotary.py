"""Span rotary on the GPU: queries and keys rotated and damped by the places of their rows in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacontext_megatron.kernels.rotary_arguments import QKNorm, RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.kernels.rotary_backward import backward_kernel, sum_partials
from megacontext_megatron.kernels.rotary_forward import forward_kernel
from megacontext_megatron.kernels.rotary_layout import HeadLayout, mergeable

_LINES = 1024
_COLUMNS = 4
"""Of partial sums, handled at once by a program of eight warps."""


class _Tile(NamedTuple):
    """What a program handles at once: `heads` of each of `rows`, and how many rotary pairs a warp of it."""

    rows: int
    heads: int
    pairs: int

    def warps(self, common: dict[str, Any]) -> int:
        """Return the warps of a program."""
        return max(1, self.rows * common["HEADS"] * common["BLOCK_R"] // self.pairs)


_WHOLE_ROWS = _Tile(1, 8, 128)
"""Streams at the speed of a copy: neighbouring heads together, few registers, many programs."""

_SUMMING = _Tile(8, 1, 128)
"""Leaves an eighth as many partial sums, and adds up over heads within a thread."""

_BY_GROUP = _Tile(4, 1, 256)
"""Finds each angle once, where every query group has angles of its own."""


def span_rotary(
    query: Tensor, key: Tensor, places: RowPlaces, table: RotaryTable, options: RotaryOptions
) -> tuple[Tensor, Tensor]:
    """Return finished queries [s, b, np, hn] and keys [s, b, ng, hn], contiguous, of their inputs' dtype.

    The first 2 r channels of each head are rotated, the others pass.  Computed in fp32; phases are exact modulo one
    turn to 2^-30 turn for doubled centres up to 2^52.  Gradients of q, k and, where they require one, of the table's
    omega and the places' sigma and offset, are deterministic.  The same in plain PyTorch: kernels.reference.
    """
    query, key = mergeable(query), mergeable(key)
    layout = HeadLayout.of_heads(query, key, table.omega.shape[-1])
    finished = _finished(_Spec(layout=layout, places=places, options=options), query, key, table)
    return finished[0], finished[1]


def split_span_rotary(
    mixed: Tensor,
    head_dim: int,
    places: RowPlaces,
    table: RotaryTable,
    options: RotaryOptions,
    *,
    norm: QKNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return finished q [s, b, np, hn], k and v [s, b, ng, hn], contiguous, from Megatron's mixed projection.

    `mixed` is [s, b, ng, (np / ng + 2) hn]: each query group's queries, then its key, then its value.  One pass reads
    it and writes what attention backends want to read; its backward writes the gradient of `mixed` whole, so neither
    the copy that grouped queries need nor the concatenation of gradients remains.  With `norm`, heads are normalised
    before they are rotated.  Otherwise as span_rotary.
    """
    mixed = mixed.contiguous()
    layout = HeadLayout.of_mixed(mixed, head_dim, table.omega.shape[-1])
    query, key, value = _finished(_Spec(layout=layout, places=places, options=options, norm=norm), mixed, None, table)
    return query, key, value


def _finished(spec: _Spec, source: Tensor, key: Tensor | None, table: RotaryTable) -> tuple[Tensor, ...]:
    """Launch; raises ValueError where places, frequencies or norms do not fit the layout."""
    layout, places, norm = spec.layout, spec.places, spec.norm
    sigma, weights = places.sigma, (None, None) if norm is None else (norm.query_weight, norm.key_weight)
    widths = 1 if sigma is None or sigma.dim() == 2 else sigma.shape[2]
    if places.doubled_centre.shape != (layout.s, layout.b):
        raise ValueError(f"places of {tuple(places.doubled_centre.shape)} rows for {layout.s} rows of {layout.b}")
    if not {len(table.omega), widths} <= {1, layout.ng}:
        raise ValueError(f"{len(table.omega)} sets of frequencies and {widths} widths for {layout.ng} query groups")
    if any(weight is not None and weight.shape != (layout.hn,) for weight in weights):
        raise ValueError(f"norms of other than {layout.hn} channels")
    dense = (None if weight is None else weight.contiguous() for weight in weights)
    return _SpanRotary.apply(
        spec, source, key, table.words.contiguous(), table.omega.contiguous(), sigma, places.offset, *dense
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spec:
    """What a call is made of besides the tensors that may get gradients."""

    layout: HeadLayout
    places: RowPlaces
    options: RotaryOptions
    norm: QKNorm | None = None


class _Operands(NamedTuple):
    """The small tensors of a call, as the kernels read them: places of rows, frequencies, weights of norms."""

    words: Tensor
    omega: Tensor
    sigma: Tensor | None
    offset: Tensor | None
    query_weight: Tensor | None
    key_weight: Tensor | None
    centre: Tensor
    anchor: Tensor | None

    @property
    def frequency_groups(self) -> int:
        return self.omega.shape[0]

    @property
    def sigma_groups(self) -> int:
        """Number of widths of a row: 0 for points, else 1 or ng."""
        return 0 if self.sigma is None else self.sigma.shape[2] if self.sigma.dim() == 3 else 1

    @property
    def groups(self) -> int:
        """Number of query groups that have places or frequencies of their own, 1 where none has."""
        return max(self.frequency_groups, self.sigma_groups, 1)


def _common(spec: _Spec, given: _Operands, layout: HeadLayout, tile: _Tile) -> dict[str, Any]:
    """Return the arguments that forward and backward share."""
    norm = spec.norm
    sigma = (0, 0, 0) if given.sigma is None else (*given.sigma.stride(), 0)[:3]
    pairs = triton.next_power_of_2(layout.r)
    return {
        "doubled_centre": given.centre, "sigma": given.sigma, "offset": given.offset,
        "words": given.words, "omega": given.omega,
        "query_weight": given.query_weight, "key_weight": given.key_weight,
        "rows": layout.s * layout.b, "batch": layout.b,
        "query_row": layout.query[0], "query_group": layout.query[1], "query_head": layout.query[2],
        "key_row": layout.key[0], "key_group": layout.key[1],
        "value_row": layout.key[0], "value_group": layout.key[1],
        "centre_s": given.centre.stride(0), "centre_b": given.centre.stride(1),
        "sigma_s": sigma[0], "sigma_b": sigma[1], "sigma_g": sigma[2],
        "offset_s": 0 if given.offset is None else given.offset.stride(0),
        "offset_b": 0 if given.offset is None else given.offset.stride(1),
        "eps": 0.0 if norm is None else norm.eps,
        "NP": layout.np, "NG": layout.ng, "HN": layout.hn, "R": layout.r,
        "BLOCK_HN": triton.next_power_of_2(layout.hn), "BLOCK_R": pairs,
        "BLOCK_REST": triton.next_power_of_2(max(1, layout.hn - 2 * layout.r)),
        "ROWS": tile.rows, "HEADS": min(triton.next_power_of_2(layout.np // given.groups), tile.heads),
        "FREQUENCY_GROUPS": given.frequency_groups, "SIGMA_GROUPS": given.sigma_groups,
        "HAS_OFFSET": given.offset is not None, "DAMP_QUERY": spec.options.damp_query,
        "INTERLEAVED": spec.options.interleaved, "COPY_VALUE": layout.mixed,
        "NORM": norm is not None, "CENTRED": norm is not None and norm.zero_centred,
    }  # fmt: skip


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _launch(kernel: Any, blocks: int, **arguments: Any) -> None:
    kernel[(blocks,)](**arguments)


class _SpanRotary(torch.autograd.Function):
    """Called with a spec, what is read, and the operands that may get gradients: words to key_weight."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: _Spec,
        source: Tensor,
        key: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        layout, places = spec.layout, spec.places
        shape = (layout.s, layout.b)
        outputs = [source.new_empty(*shape, heads, layout.hn) for heads in (layout.np, layout.ng)]
        if layout.mixed:
            outputs.append(torch.empty_like(outputs[1]))
        anchor = None if places.anchor is None else places.anchor.contiguous()
        given = _Operands._make((*tensors, places.doubled_centre, anchor))
        q, k, v = layout.parts(source, key)
        tile = _BY_GROUP if given.groups > 1 else _WHOLE_ROWS
        common = _common(spec, given, layout, tile)
        _launch(
            forward_kernel, _blocks(layout.s * layout.b, tile.rows),
            query=q, key=k, value=v, query_out=outputs[0], key_out=outputs[1], value_out=outputs[-1],
            num_warps=tile.warps(common), **common,
        )  # fmt: skip
        seen: tuple[Tensor | None, ...] = (None, None)
        if spec.norm is not None:
            seen = (source, None)
        elif any(ctx.needs_input_grad[4:7]):
            seen = (outputs[0], outputs[1])
        ctx.spec = spec
        ctx.save_for_backward(*seen, *given)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_seen, key_seen, *small = ctx.saved_tensors
        given = _Operands(*small)
        for_omega, for_sigma, for_offset = ctx.needs_input_grad[4:7]
        spec: _Spec = ctx.spec
        layout = spec.layout.gradient
        dense = [g.contiguous() for g in gradients]
        if layout.mixed:
            width = (layout.np // layout.ng + 2) * layout.hn
            wanted = dense[0].new_empty(layout.s, layout.b, layout.ng, width), None
        else:
            wanted = torch.empty_like(dense[0]), torch.empty_like(dense[1])
        seen = layout.parts(query_seen, key_seen) if query_seen is not None else dense
        q_out, k_out, v_out = layout.parts(*wanted)
        sums = for_omega or for_sigma or for_offset or spec.norm is not None
        tile = _BY_GROUP if given.groups > 1 else _SUMMING if sums else _WHOLE_ROWS
        blocks = _blocks(layout.s * layout.b, tile.rows)
        empty = partial(torch.empty, dtype=torch.float32, device=wanted[0].device)
        omega = empty(blocks, given.groups, layout.r) if for_omega else None
        weights = empty(blocks, 2, layout.hn) if spec.norm is not None else None
        sigma = empty(given.sigma.shape) if for_sigma and given.sigma is not None else None
        offset = empty(layout.s, layout.b) if for_offset else None
        common = _common(spec, given, layout, tile)
        _launch(
            backward_kernel, blocks,
            query_grad=dense[0], key_grad=dense[1], value_grad=dense[-1],
            query_seen=seen[0], key_seen=seen[1], query_out=q_out, key_out=k_out, value_out=v_out,
            anchor=given.anchor, omega_partial=omega, weight_partial=weights, sigma_grad=sigma, offset_grad=offset,
            HAS_ANCHOR=given.anchor is not None, GRAD_OMEGA=for_omega, GRAD_SIGMA=for_sigma, GRAD_OFFSET=for_offset,
            num_warps=tile.warps(common), **common,
        )  # fmt: skip
        if omega is not None:
            omega = _total(omega)
            omega = omega.sum(dim=0, keepdim=True) if given.groups > given.frequency_groups else omega
        weights = (None, None) if weights is None else _total(weights)
        return (
            None,
            *wanted,
            None,
            omega,
            *(_like(*pair) for pair in zip((sigma, offset, *weights), given[2:6], strict=True)),
        )


def _like(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of what it is of."""
    return None if gradient is None or value is None else gradient.to(value.dtype)


def _total(partials: Tensor) -> Tensor:
    """Return the sum over programs of partial sums [programs, ...], fp32."""
    total = partials.new_empty(partials.shape[1:])
    _launch(
        sum_partials, _blocks(total.numel(), _COLUMNS), partials=partials, total=total, programs=len(partials),
        STEPS=_blocks(len(partials), _LINES), WIDTH=total.numel(), BLOCK=_LINES, COLUMNS=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return total
