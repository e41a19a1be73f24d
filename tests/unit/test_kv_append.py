"""Appends to a paged cache, run by Triton's interpreter, against the separate launch and the definition."""

import dataclasses

import pytest
import torch

from megacontext_megatron.kernels import kv_append
from megacontext_megatron.kernels.kv_append import NewRows, PagedCache
from megacontext_megatron.spans.metadata import SpanMetadata
from tests import append_checks
from tests.append_checks import PAGE, Setting
from tests.rotary_cases import Case

SMALL = Case(s=5, sigma=1)
CASES = [
    SMALL,
    Case(),
    Case(s=40, b=1, sigma=1, interleaved=True, damp_query=False),
    Case(np=6, ng=3, hn=24, percent=0.5, sigma=3, grouped_frequencies=True, offset=True, norm="plain"),
    Case(s=3, np=20, ng=10, hn=4, sigma=1, norm="centred"),
    Case(s=7, b=3, np=5, ng=1, hn=20, percent=0.3, sigma=1, offset=True, interleaved=True),
    Case(s=1, b=1, np=3, ng=3, hn=6, sigma=3),
    Case(s=6, sigma=1, dtype=torch.bfloat16),
    Case(s=6, sigma=1, dtype=torch.float16, norm="plain"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_stored_is_what_the_separate_launch_finds(case):
    append_checks.check_bits(Setting.of(case))


@pytest.mark.parametrize("shifted", [False, True])
def test_rows_are_rotated_as_the_carrier_says(shifted):
    setting = Setting.of(SMALL, carried=True, shifted=shifted)
    assert setting.rows.carrier.shape[3] == 6 + shifted
    append_checks.check_bits(setting)
    page, line = setting.lines()
    spans, stored = SpanMetadata.unpack(setting.rows.carrier), setting.cache.metadata()
    for name in ("start", "width", "level", "modality", "sigma", "doubled_centre"):
        assert torch.equal(getattr(stored, name)[page, line], getattr(spans, name)), name
    assert stored.offset is not None
    assert torch.equal(stored.offset[page, line], torch.zeros(5, 2) if spans.offset is None else spans.offset)


@pytest.mark.full
@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_those_of_the_definition(interleaved):
    case = Case(s=33, hn=8, interleaved=interleaved, first=0)
    append_checks.check_definition(case)
    with pytest.raises(AssertionError):
        append_checks.check_definition(case, half_tokens=1)


@pytest.mark.parametrize(
    "case", [SMALL, Case(sigma=2, norm="plain"), Case(s=2, np=20, ng=10, hn=4, sigma=1), Case(np=9, ng=9)], ids=str
)
def test_sharing_heads_out_changes_no_bit(case, monkeypatch):
    append_checks.check_forms_agree(case, "cpu", lambda rows: monkeypatch.setattr(kv_append, "SPLIT_ROWS", rows))


@pytest.mark.parametrize("case", [SMALL, Case(sigma=2), Case(s=4, b=1, np=9, ng=9, sigma=1)], ids=str)
@pytest.mark.parametrize("split_rows", [0, 64])
def test_keys_and_values_may_come_alone(case, split_rows, monkeypatch):
    monkeypatch.setattr(kv_append, "SPLIT_ROWS", split_rows)
    append_checks.check_keys_alone(case)


def test_an_edit_overwrites_rows_in_place():
    append_checks.check_edit(dataclasses.replace(SMALL, s=9))


@pytest.mark.parametrize("split_rows", [0, 64])
def test_rows_without_a_line_are_not_stored(split_rows, monkeypatch):
    monkeypatch.setattr(kv_append, "SPLIT_ROWS", split_rows)
    append_checks.check_what_is_not_stored(SMALL)


def test_pages_may_lie_apart_and_rows_too():
    dense, apart = Setting.of(SMALL), Setting.of(SMALL)
    cache = dense.cache
    both = torch.stack([cache.key, cache.value], dim=1)
    apart.cache = PagedCache(key=both[:, 0], value=both[:, 1], spans=cache.spans.clone())
    wide = torch.full((5, 2, 4), 7)
    wide[..., 1] = dense.rows.index
    table = torch.full((2, 9), 99, dtype=torch.int64)
    table[:, : dense.rows.page_table.shape[1]] = dense.rows.page_table
    spaced = torch.zeros(5, 2, 1, 12, dtype=torch.float64)
    spaced[..., :6] = dense.rows.carrier
    query = apart.append(index=wide[..., 1], page_table=table[:, :2], carrier=spaced[..., :6])
    assert torch.equal(query, dense.append())
    assert all(map(torch.equal, apart.held(), dense.held()))


def test_a_row_has_24_bytes_of_span_in_its_page():
    cache = PagedCache.empty(3, 2, 4, like=torch.zeros(1))
    assert cache.spans.shape == (3, 32 * 24)
    spans = cache.metadata()
    stored = [spans.start, spans.width, spans.sigma, spans.offset, spans.level, spans.modality]
    assert sum(x.element_size() for x in stored if x is not None) == kv_append.SPAN_BYTES
    spans.start[1, 31], spans.modality[1, 0] = -1, -1
    touched = cache.spans.view(3, -1).ne(0).nonzero().tolist()
    assert touched == [[1, byte] for byte in (*range(248, 256), 704, 705)]


def test_no_rows_store_nothing():
    setting = Setting.of(dataclasses.replace(SMALL, s=0))
    before = setting.held()
    assert setting.append().shape == (0, 2, 4, 16)
    assert all(map(torch.equal, setting.held(), before))


# Refusals


def test_pages_that_do_not_fit_are_refused():
    good = PagedCache.empty(4, 2, 8, like=torch.zeros(1))
    wrong = {
        "pages of keys": {"value": good.value[:3]},
        "bfloat16|pages of keys": {"value": good.value.bfloat16()},
        "dense": {"key": good.key.transpose(2, 3).contiguous().transpose(2, 3)},
        "spans": {"spans": good.spans[:, :-1]},
        "contiguous": {"spans": torch.zeros(4, 2 * 32 * 24, dtype=torch.uint8)[:, : 32 * 24]},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **changes)
    with pytest.raises(ValueError, match="pages of keys"):
        PagedCache.empty(4, 2, 8, like=torch.zeros(1), page=3)


def test_rows_that_do_not_fit_are_refused():
    setting = Setting.of(SMALL)
    good = setting.rows
    wrong = {
        "a carrier": {"carrier": good.carrier[:-1]},
        "a page table": {"page_table": good.page_table[:1]},
        "an index of": {"index": good.index.double()},
        "dense": {"page_table": good.page_table.mT.contiguous().mT},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **changes)
    mixed = setting.given.mixed
    assert mixed is not None
    refused = {
        "an index": {"mixed": mixed[:-1]},
        "rows of torch.float16": {"mixed": mixed.half()},
        "heads": {"mixed": torch.cat([mixed, mixed], dim=2)},
        "a carrier of": {"carrier": good.carrier.float()},
        "a stride apart": {"carrier": good.carrier.transpose(0, 1).contiguous().transpose(0, 1)},
        "widths": {"places": dataclasses.replace(good.rotated(), sigma=torch.ones(5, 2, 4))},
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            setting.append(**changes)


def test_a_wanted_gradient_is_refused():
    setting = Setting.of(SMALL)
    assert setting.given.mixed is not None
    with pytest.raises(ValueError, match="no gradient"):
        kv_append.append_split(setting.given.mixed, setting.rows, setting.finish, setting.cache)


def test_the_default_page_is_one_gists_block():
    assert PagedCache.empty(1, 1, 2, like=torch.zeros(1)).key.shape[1] == PAGE == 32
    assert isinstance(Setting.of(SMALL).rows, NewRows)
