"""What an append to a paged cache must keep to, on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megacontext_megatron.kernels import kv_append, rotary
from megacontext_megatron.kernels.kv_append import Finish, NewRows, PagedCache
from megacontext_megatron.kernels.rotary_arguments import QKNorm, RowPlaces
from megacontext_megatron.spans.metadata import SpanMetadata, SpanShift
from tests import oracles
from tests.rotary_cases import EPS, EPSILON_OF_NORMS, Case, Given, call, given_of

Device = torch.device | str
PAGE = 32
PRECISION = 1e-6
"""Of cosine and sine, on which the rotary kernels have their own tests."""
FUSED = 2.0**-22
"""Of the largest product, what fusing it or not leaves of a sum that cancels, fp32."""


@dataclasses.dataclass(kw_only=True)
class Setting:
    """New rows of a case, and a cache with room for twice as many, whose lines all hold something."""

    case: Case
    given: Given
    rows: NewRows
    cache: PagedCache

    @classmethod
    def of(cls, case: Case, device: Device = "cpu", *, carried: bool = False, shifted: bool = False) -> Setting:
        """Return a setting whose rows are rotated by the places of the case, or as the carrier says."""
        case = dataclasses.replace(case, mixed=True)
        given = given_of(case, device)
        source = torch.Generator().manual_seed(5)
        wanted = -(-case.s // PAGE) + 1
        pages = 2 * case.b * wanted
        assert given.mixed is not None
        cache = PagedCache.empty(pages, case.ng, case.hn, like=given.mixed.detach(), page=PAGE)
        for filled in (cache.key, cache.value):
            filled.copy_(torch.randn(filled.shape, generator=source))
        cache.spans.copy_(torch.randint(0, 256, cache.spans.shape, generator=source, dtype=torch.uint8))
        index = torch.stack([torch.randperm(wanted * PAGE, generator=source)[: case.s] for _ in range(case.b)], dim=1)
        table = torch.randperm(pages, generator=source)[: case.b * wanted].view(case.b, wanted)
        rows = NewRows(
            carrier=carrier_of(case, source, shifted=shifted).to(device),
            index=index.to(device),
            page_table=table.to(device, torch.int32),
            places=None if carried else given.places(),
        )
        return cls(case=case, given=given, rows=rows, cache=cache)

    @property
    def finish(self) -> Finish:
        """How rows are finished."""
        given, norm = self.given, None
        if given.query_weight is not None and given.key_weight is not None:
            weights = {"query_weight": given.query_weight, "key_weight": given.key_weight}
            norm = QKNorm(**weights, eps=EPSILON_OF_NORMS, zero_centred=self.case.norm == "centred")
        return Finish(table=given.table(), options=self.case.options, norm=norm)

    @torch.no_grad()
    def append(self, **changes: Tensor) -> Tensor:
        """Append the rows, or others, and return the finished queries."""
        assert self.given.mixed is not None
        mixed = changes.pop("mixed", self.given.mixed)
        return kv_append.append_split(mixed, dataclasses.replace(self.rows, **changes), self.finish, self.cache)

    @torch.no_grad()
    def separately(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return finished q, k and v of the separate launch."""
        places = self.rows.rotated()
        given = dataclasses.replace(
            self.given, centre=places.doubled_centre, sigma=places.sigma, offset=places.offset, anchor=None
        )
        query, key, value = call(rotary, self.case, given)
        return query, key, value

    def lines(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the page and the line of each row, [s, b] each."""
        index = self.rows.index if index is None else index
        page = self.rows.page_table.long().gather(1, (index // PAGE).T).T
        return page, index % PAGE

    def held(self) -> list[Tensor]:
        """Return copies of everything that the cache holds."""
        return [x.clone() for x in tensors_of(self.cache)]


def carrier_of(case: Case, source: torch.Generator, *, shifted: bool = False) -> Tensor:
    """Return the carrier of random spans of levels 0 to 2, which may move their own place."""
    level = torch.randint(0, 3, (case.b, case.s), generator=source)
    start = (torch.randint(0, 2**15, level.shape, generator=source) + (case.first >> 10)) * 1024
    shift = None
    if shifted:
        raw = torch.randn(*level.shape, 2, generator=source)
        shift = SpanShift.bounded(raw, SpanMetadata.of_nodes(start, level, 32).width)
    return SpanMetadata.of_nodes(start, level, 32).pack("uniform", shift)


def tensors_of(cache: PagedCache) -> list[Tensor]:
    """Return keys, values and spans as tensors [pages, P], or with heads [pages, P, ng, hn]."""
    spans = cache.metadata()
    assert spans.sigma is not None
    assert spans.offset is not None
    words = [x.view(torch.int32) for x in (spans.sigma, spans.offset)]
    return [cache.key, cache.value, spans.start, spans.width, spans.level, spans.modality, *words]


def alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether two launches found the same: the same bits, but for heads on a GPU.

    There a compiler fuses multiplications with additions as it likes, in each kernel its own, so that a sum of two
    products differs in fp32, and after rounding by at most one unit in the last place.
    """
    if not found.is_floating_point() or not found.is_cuda:
        return torch.equal(found, expected)
    apart = (found.double() - expected.double()).abs()
    size = expected.double().abs()
    return bool((apart <= torch.finfo(found.dtype).eps * size + FUSED * size.max()).all())


def check_bits(setting: Setting) -> None:
    """Assert that all that is stored is what the separate launch finds, and that nothing else is touched."""
    query, key, value = setting.separately()
    expected = setting.held()
    page, line = setting.lines()
    carrier = setting.rows.carrier[:, :, 0]
    start, width, level, modality, _, sigma, *offset = carrier.unbind(-1)
    moved = offset[0] if offset else torch.zeros_like(sigma)
    words = [x.float().view(torch.int32) for x in (sigma, moved)]
    for held, new in zip(expected, (key, value, start, width, level, modality, *words), strict=True):
        held[page, line] = new.to(held.dtype)
    found = setting.append()
    assert alike(found, query)
    assert all(map(alike, setting.held(), expected))


def check_forms_agree(case: Case, device: Device, few: Callable[[int], None]) -> None:
    """Assert that rows give the same whether their heads are shared out over programs; `few` sets up to where."""
    results = []
    for limit in (0, case.s * case.b):
        few(limit)
        setting = Setting.of(case, device)
        results.append([setting.append(), *setting.held()])
    assert all(map(alike, *results))


def check_keys_alone(case: Case, device: Device = "cpu") -> None:
    """Assert that keys and values given by themselves, by strides, are stored as those of a projection."""
    whole, alone = Setting.of(case, device), Setting.of(case, device)
    whole.append()
    assert alone.given.mixed is not None
    mixed, hn = alone.given.mixed.detach(), case.hn
    with torch.no_grad():
        kv_append.append_rows(
            mixed[..., -2 * hn : -hn], mixed[..., -hn:].clone(), alone.rows, alone.finish, alone.cache
        )
    assert all(map(torch.equal, alone.held(), whole.held()))


def check_edit(case: Case, device: Device = "cpu") -> None:
    """Assert that writing some rows again leaves what one append of the final rows leaves."""
    edited, final = Setting.of(case, device), Setting.of(case, device)
    assert final.given.mixed is not None
    mixed, carrier = final.given.mixed.detach().clone(), final.rows.carrier.clone()
    some = slice(1, None, 3)
    mixed[some] = mixed[some].flip(-1)
    carrier[some] = carrier[some].flip(0)
    final.append(mixed=mixed, carrier=carrier)
    edited.append()
    places = edited.rows.places
    assert places is not None
    again = RowPlaces(
        doubled_centre=places.doubled_centre[some],
        sigma=None if places.sigma is None else places.sigma[some],
        offset=None if places.offset is None else places.offset[some],
    )
    edited.append(
        mixed=mixed[some],
        carrier=carrier[some].contiguous(),
        index=edited.rows.index[some],
        places=again,  # type: ignore[arg-type]
    )
    assert all(map(torch.equal, edited.held(), final.held()))


def check_what_is_not_stored(case: Case, device: Device = "cpu") -> None:
    """Assert that rows without a line are finished and not stored: no number, none of the table's, no page."""
    setting = Setting.of(case, device)
    query, _, _ = setting.separately()
    index, table = setting.rows.index, setting.rows.page_table
    before = setting.held()
    beyond = index + table.shape[1] * PAGE
    for changes in (
        {"index": -1 - index},
        {"index": beyond},
        {"page_table": -1 - table},
        {"page_table": table + len(setting.cache.key)},
    ):
        assert alike(setting.append(**changes), query)
        assert all(map(torch.equal, setting.held(), before)), changes
    kept = torch.arange(case.s, device=index.device) % 2 == 0
    setting.append(index=torch.where(kept[:, None], index, -1))
    other = Setting.of(case, device)
    other.append()
    page, line = setting.lines()
    for found, old, new in zip(setting.held(), before, other.held(), strict=True):
        assert torch.equal(found[page[kept], line[kept]], new[page[kept], line[kept]])
        assert torch.equal(found[page[~kept], line[~kept]], old[page[~kept], line[~kept]])


def check_definition(case: Case, device: Device = "cpu", *, half_tokens: int = 0) -> None:
    """Assert that keys are E[exp(i w x)] times what came in, for x spread as the carrier says, in float64.

    `half_tokens` moves the definition's centres.
    """
    assert case.dtype == torch.float32
    setting = Setting.of(case, device, carried=True)
    setting.append()
    page, line = setting.lines()
    spans = SpanMetadata.unpack(setting.rows.carrier.cpu())
    omega = setting.given.omega.detach().double().cpu().numpy()[0]
    spread = np.vectorize(lambda width: oracles.uniform_spread(int(width)))(spans.width.numpy())
    mu = (spans.doubled_centre.double().numpy() + half_tokens) / 2
    factors = oracles.normal_expectation(omega, mu[..., None, None], spread[..., None, None])
    assert setting.given.mixed is not None
    raw = setting.given.mixed.detach()[..., -2 * case.hn : -case.hn].double().cpu().numpy()
    expected = oracles.multiplied(raw, factors, interleaved=case.interleaved)
    found = setting.cache.key[page, line].double().cpu().numpy()
    # cosine and sine, the damping, and the roundings of one rotation, of pairs no longer than the longest
    longest = np.sqrt(2.0) * np.abs(raw).max()
    assert np.abs(found - expected).max() <= (PRECISION + 8 * EPS) * longest
    assert torch.equal(setting.cache.value[page, line], setting.given.mixed.detach()[..., -case.hn :])
