"""New rows into a paged cache on the GPU: rotated keys, values and spans stored where an index says, in one launch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megacontext_megatron.kernels.kv_append_device import append_kernel
from megacontext_megatron.kernels.rotary_arguments import QKNorm, RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.kernels.rotary_layout import HeadLayout, mergeable
from megacontext_megatron.spans.metadata import CARRIER_COLUMNS, SpanMetadata, carried_places, is_carrier

SPAN_BYTES = 24
"""Of a row: start int64; width int32; sigma and offset fp32; level and modality int16."""

SPLIT_ROWS = 256
"""Up to so many rows, heads of a row are shared out over programs: there are too few rows to fill a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedCache:
    """What attention remembers of rows, on pages of P rows each; P is even, and a page is one gist's block.

    `key`, `value`: [pages, P, ng, hn], each page dense, of one dtype; pages may lie apart.
    `spans`: uint8 [pages, 24 P], for each page its rows' starts, widths, spreads, offsets, levels and modalities, one
    after another.  Raises ValueError for other shapes.
    """

    key: Tensor
    value: Tensor
    spans: Tensor

    def __post_init__(self) -> None:
        shape, page = self.key.shape, self.key.shape[1:2].numel()
        if len(shape) != 4 or self.value.shape != shape or self.value.dtype != self.key.dtype or page % 2:
            raise ValueError(f"pages of keys {tuple(shape)} and of values {tuple(self.value.shape)}")
        if any(x.stride()[1:] != (shape[2] * shape[3], shape[3], 1) for x in (self.key, self.value)):
            raise ValueError("pages of keys and values must be dense")
        if self.spans.shape != (shape[0], SPAN_BYTES * page) or self.spans.dtype != torch.uint8:
            raise ValueError(f"spans {tuple(self.spans.shape)} of {self.spans.dtype} for pages {tuple(shape[:2])}")
        if not self.spans.is_contiguous():
            raise ValueError("spans of pages must be contiguous")

    @classmethod
    def empty(cls, pages: int, groups: int, channels: int, *, like: Tensor, page: int = 32) -> PagedCache:
        """Return unwritten pages of `page` rows for `groups` heads of `channels`, of `like`'s dtype and device."""
        key = like.new_empty(pages, page, groups, channels)
        spans = torch.zeros(pages, SPAN_BYTES * page, dtype=torch.uint8, device=like.device)
        return cls(key=key, value=torch.empty_like(key), spans=spans)

    def metadata(self) -> SpanMetadata:
        """Return the spans of all rows as views [pages, P]; levels and modalities are int16 here."""
        page = self.key.shape[1]
        start, width, sigma, offset, level, modality = self.spans.split([n * page for n in (8, 4, 4, 4, 2, 2)], dim=1)
        return SpanMetadata(
            start=start.view(torch.int64),
            width=width.view(torch.int32),
            level=level.view(torch.int16),
            modality=modality.view(torch.int16),
            sigma=sigma.view(torch.float32),
            offset=offset.view(torch.float32),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRows:
    """Which s rows of b sequences are stored, and where; everything lies on the device of the cache.

    `carrier`: float64 [s, b, 1, 6 or 7], the rows' spans; its channels are dense, and rows s b + i a stride apart.
    `index`: int64 or int32 [s, b], a row's number in its sequence's cache; a negative one is not stored.
    `page_table`: int32 or int64 [b, n], the page of each P rows of a sequence; a negative one stores nothing.
    `places`: where keys and queries are rotated, unless as the carrier says.

    A number that the cache already holds is overwritten; what two rows of one number leave is undefined.  Rows whose
    number or page is beyond the table or the cache are not stored.  Raises ValueError for other shapes.
    """

    carrier: Tensor
    index: Tensor
    page_table: Tensor
    places: RowPlaces | None = None

    def __post_init__(self) -> None:
        rows = tuple(self.index.shape)
        if not is_carrier(self.carrier) or self.carrier.shape[:2] != rows:
            raise ValueError(f"a carrier {tuple(self.carrier.shape)} for an index {rows}")
        if self.page_table.dim() != 2 or self.page_table.shape[0] != rows[1]:
            raise ValueError(f"a page table {tuple(self.page_table.shape)} for an index {rows}")
        if any(x.dtype not in (torch.int32, torch.int64) for x in (self.index, self.page_table)):
            raise ValueError(f"an index of {self.index.dtype} and a page table of {self.page_table.dtype}")
        if self.page_table.stride(1) != 1 and self.page_table.shape[1] > 1:
            raise ValueError("rows of a page table must be dense")

    def rotated(self) -> RowPlaces:
        """Return the places that rows are rotated by."""
        if self.places is not None:
            return self.places
        centre, sigma, offset = carried_places(self.carrier)
        return RowPlaces(doubled_centre=centre, sigma=sigma, offset=offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """How new rows become finished heads: frequencies, options and, where heads are normalised first, the norms."""

    table: RotaryTable
    options: RotaryOptions
    norm: QKNorm | None = None


def append_split(mixed: Tensor, rows: NewRows, finish: Finish, cache: PagedCache) -> Tensor:
    """Store keys and values of Megatron's mixed projection and return finished queries [s, b, np, hn].

    `mixed` is [s, b, ng, (np / ng + 2) hn].  Queries, and keys and values as stored, are those of
    kernels.rotary.split_span_rotary, to one unit in the last place where compilers fuse products and sums differently.
    One launch without a wait for the host, so that it may be part of a CUDA graph;
    it has no gradient.  Raises ValueError for what does not fit, and where a gradient is wanted.
    """
    mixed = mixed.contiguous()
    layout = HeadLayout.of_mixed(mixed, cache.key.shape[3], finish.table.omega.shape[-1])
    query, key, value = layout.parts(mixed, None)
    out = mixed.new_empty(layout.s, layout.b, layout.np, layout.hn)
    _append(_Heads(query, key, value, out, layout, layout.key), mixed, rows, finish, cache)
    return out


def append_rows(key: Tensor, value: Tensor, rows: NewRows, finish: Finish, cache: PagedCache) -> None:
    """Store keys and values [s, b, ng, hn], keys rotated and damped; otherwise as append_split.

    Norms of other tiles of heads than a projection's add up in another order.
    """
    key, value = mergeable(key), mergeable(value)
    layout = HeadLayout.of_heads(key, value, finish.table.omega.shape[-1])
    row, _, head = layout.query
    only_keys = replace(layout, np=0, key=(row, head))
    _append(_Heads(key, key, value, key, only_keys, layout.key), key, rows, finish, cache)


class _Heads(NamedTuple):
    """What is read and where queries are written; `layout` has the strides of queries and keys, `strides` values'."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_out: Tensor
    layout: HeadLayout
    strides: tuple[int, int]


def _append(heads: _Heads, source: Tensor, rows: NewRows, finish: Finish, cache: PagedCache) -> None:
    """Launch; `source` is what the heads are part of."""
    layout, places = heads.layout, rows.rotated()
    _check(layout, source, rows, finish, cache)
    if torch.is_grad_enabled() and source.requires_grad:
        raise ValueError("what a cache stores has no gradient: append under torch.no_grad()")
    carrier = rows.carrier
    sigma = (0, 0, 0) if places.sigma is None else (*places.sigma.stride(), 0)[:3]
    offset = (0, 0) if places.offset is None else places.offset.stride()
    arguments = {
        "query": heads.query, "key": heads.key, "value": heads.value, "query_out": heads.query_out,
        "key_pages": cache.key, "value_pages": cache.value,
        "starts": cache.spans.view(torch.int64), "words_of_spans": cache.spans.view(torch.int32),
        "reals_of_spans": cache.spans.view(torch.float32), "halves_of_spans": cache.spans.view(torch.int16),
        "carrier": carrier, "index": rows.index, "page_table": rows.page_table,
        "doubled_centre": places.doubled_centre, "sigma": places.sigma, "offset": places.offset,
        "pages": cache.key.shape[0], "columns": rows.page_table.shape[1],
        "value_row": heads.strides[0], "value_group": heads.strides[1],
        "key_page": cache.key.stride(0), "value_page": cache.value.stride(0),
        "carrier_row": carrier.stride(0) if layout.b == 1 else carrier.stride(1),
        "index_s": rows.index.stride(0), "index_b": rows.index.stride(1), "table_b": rows.page_table.stride(0),
        "centre_s": places.doubled_centre.stride(0), "centre_b": places.doubled_centre.stride(1),
        "sigma_s": sigma[0], "sigma_b": sigma[1], "sigma_g": sigma[2], "offset_s": offset[0], "offset_b": offset[1],
        "PAGE": cache.key.shape[1], "HAS_OFFSET": places.offset is not None,
        "CARRIES_OFFSET": carrier.shape[3] > len(CARRIER_COLUMNS),
    }  # fmt: skip
    tile = _tile(layout, finish.table, places)
    split = layout.s * layout.b <= SPLIT_ROWS
    parts = tile.parts(layout) if split else 1
    grid = (-(-layout.s * layout.b // tile.rows), parts)
    _launch(append_kernel, grid, **arguments, **_constants(layout, finish), **tile.arguments(layout), SPLIT=split)


def _launch(kernel: Any, grid: tuple[int, int], **arguments: Any) -> None:
    kernel[grid](**arguments)


def _constants(layout: HeadLayout, finish: Finish) -> dict[str, Any]:
    """Return the arguments that do not depend on the rows' places or on the cache."""
    table, options, norm = finish.table, finish.options, finish.norm
    return {
        "words": table.words.contiguous(), "omega": table.omega.detach().contiguous(),
        "query_weight": None if norm is None else norm.query_weight.contiguous(),
        "key_weight": None if norm is None else norm.key_weight.contiguous(),
        "rows": layout.s * layout.b, "batch": layout.b,
        "query_row": layout.query[0], "query_group": layout.query[1], "query_head": layout.query[2],
        "key_row": layout.key[0], "key_group": layout.key[1],
        "eps": 0.0 if norm is None else norm.eps,
        "NP": layout.np, "NG": layout.ng, "HN": layout.hn, "R": layout.r,
        "BLOCK_HN": triton.next_power_of_2(layout.hn), "BLOCK_R": triton.next_power_of_2(layout.r),
        "BLOCK_REST": triton.next_power_of_2(max(1, layout.hn - 2 * layout.r)),
        "FREQUENCY_GROUPS": table.omega.shape[0],
        "DAMP_QUERY": options.damp_query, "INTERLEAVED": options.interleaved,
        "NORM": norm is not None, "CENTRED": norm is not None and norm.zero_centred,
    }  # fmt: skip


class _Tile(NamedTuple):
    """What a program handles at once: `rows`, and `heads` of each; `groups` have angles of their own."""

    rows: int
    heads: int
    groups: int
    widths: int

    def parts(self, layout: HeadLayout) -> int:
        """Return into how many programs the heads of a row can be shared out."""
        if self.groups > 1:
            return self.groups
        return -(-layout.np // self.heads) - (-layout.ng // self.heads)

    def arguments(self, layout: HeadLayout) -> dict[str, Any]:
        """Return the kernel's arguments."""
        pairs = 256 if self.groups > 1 else 128
        warps = max(1, self.rows * self.heads * triton.next_power_of_2(layout.r) // pairs)
        return {"ROWS": self.rows, "HEADS": self.heads, "SIGMA_GROUPS": self.widths, "num_warps": warps}


def _tile(layout: HeadLayout, table: RotaryTable, places: RowPlaces) -> _Tile:
    """Return the tile of kernels.rotary's forward launch for the same rows, whose sums over channels are then ours."""
    sigma = places.sigma
    widths = 0 if sigma is None else sigma.shape[2] if sigma.dim() == 3 else 1
    groups = max(len(table.omega), widths, 1)
    if groups > 1:
        return _Tile(4, 1, groups, widths)
    heads: Any = triton.next_power_of_2(layout.np or layout.ng)
    return _Tile(1, min(heads, 8), groups, widths)


def _check(layout: HeadLayout, source: Tensor, rows: NewRows, finish: Finish, cache: PagedCache) -> None:
    """Raise ValueError for what does not fit the heads."""
    shape, places, norm = (layout.s, layout.b), rows.rotated(), finish.norm
    widths = 1 if places.sigma is None or places.sigma.dim() == 2 else places.sigma.shape[2]
    weights = () if norm is None else (norm.query_weight, norm.key_weight)
    row_strides = rows.carrier.stride()
    fits = {
        f"an index {tuple(rows.index.shape)} for rows {shape}": rows.index.shape == shape,
        f"places {tuple(places.doubled_centre.shape)} for rows {shape}": places.doubled_centre.shape == shape,
        f"{len(finish.table.omega)} sets of frequencies and {widths} widths for {layout.ng} query groups": (
            {len(finish.table.omega), widths} <= {1, layout.ng}
        ),
        f"norms of other than {layout.hn} channels": all(weight.shape == (layout.hn,) for weight in weights),
        f"heads ({layout.ng}, {layout.hn}) for pages {tuple(cache.key.shape)}": (
            cache.key.shape[2:] == (layout.ng, layout.hn)
        ),
        f"rows of {source.dtype} for pages of {cache.key.dtype}": source.dtype == cache.key.dtype,
        f"a carrier of {rows.carrier.dtype}": rows.carrier.dtype == torch.float64,
        "a carrier whose rows are not a stride apart": row_strides[3] == 1
        and (min(shape) <= 1 or row_strides[0] == layout.b * row_strides[1]),
    }
    for problem, fine in fits.items():
        if not fine:
            raise ValueError(problem)
