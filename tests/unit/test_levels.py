"""Where a level's nodes lie, in which entry of the table, and what a row's span says about its place."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext_megatron.config import SIGMA_RULES, SigmaRule
from megacontext_megatron.spans.levels import entry_index, nodes_per_level, widths
from megacontext_megatron.spans.metadata import CARRIER_COLUMNS, Modality, SpanMetadata, base_sigma

BLOCK_SIZES = st.integers(2, 7)


def table(source_length: int, block_size: int, max_level: int = 2) -> list[tuple[int, int]]:
    """Return (start, level) of every entry in order, made one complete node after another."""
    entries = []
    for level in range(max_level + 1):
        width = block_size**level
        entries += [(start, level) for start in range(0, source_length - width + 1, width)]
    return entries


@given(block_size=BLOCK_SIZES, blocks=st.integers(1, 40))
def test_entry_index_finds_every_node(block_size: int, blocks: int):
    source = blocks * block_size
    nodes = torch.tensor(table(source, block_size))
    index = entry_index(nodes[:, 0], nodes[:, 1], source, block_size)
    assert index.dtype == torch.int64
    assert index.tolist() == list(range(len(nodes)))


@given(block_size=BLOCK_SIZES, blocks=st.integers(1, 40), data=st.data())
def test_entry_index_keeps_shape_and_order(block_size: int, blocks: int, data: st.DataObject):
    source = blocks * block_size
    entries = table(source, block_size)
    picked = data.draw(st.lists(st.sampled_from(range(len(entries))), min_size=6, max_size=6))
    start = torch.tensor([entries[n][0] for n in picked]).view(2, 3)
    level = torch.tensor([entries[n][1] for n in picked]).view(2, 3)
    assert entry_index(start, level, source, block_size).tolist() == torch.tensor(picked).view(2, 3).tolist()


@given(block_size=BLOCK_SIZES, blocks=st.integers(0, 40), max_level=st.integers(0, 2))
def test_nodes_per_level_counts_complete_nodes(block_size: int, blocks: int, max_level: int):
    source = blocks * block_size
    counts = [0] * (max_level + 1)
    for _, level in table(source, block_size, max_level):
        counts[level] += 1
    assert nodes_per_level(source, block_size, max_level) == counts


def test_widths_are_exact_integers():
    level = torch.tensor([[0, 1], [2, 1]], dtype=torch.int8)
    for block_size in (2, 32, 46340):
        got = widths(level, block_size)
        assert got.dtype == torch.int64
        assert got.tolist() == [[1, block_size], [block_size**2, block_size]]


SPANS = st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2)), min_size=1, max_size=6)


def metadata(spans: list[tuple[int, int]], block_size: int) -> SpanMetadata:
    """Return metadata [1, s] of (node, level) pairs."""
    start = torch.tensor([[node * block_size**level for node, level in spans]])
    return SpanMetadata.of_nodes(start, torch.tensor([[level for _, level in spans]]), block_size)


@given(spans=SPANS, block_size=BLOCK_SIZES)
def test_metadata_says_where_spans_lie(spans: list[tuple[int, int]], block_size: int):
    got = metadata(spans, block_size)
    assert (got.start.dtype, got.width.dtype) == (torch.int64, torch.int32)
    assert (got.level.dtype, got.modality.dtype) == (torch.int8, torch.int8)
    for row, (node, level) in enumerate(spans):
        tokens = range(node * block_size**level, (node + 1) * block_size**level)
        assert got.start[0, row] == tokens[0]
        assert got.width[0, row] == len(tokens)
        assert got.end[0, row] == tokens[-1] + 1
        assert got.doubled_centre[0, row] == tokens[0] + tokens[-1]
        assert got.level[0, row] == level
        assert got.modality[0, row] == Modality.TEXT


@given(
    start=st.lists(st.integers(0, 2**53), min_size=6, max_size=6),
    level=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    block_size=st.sampled_from([2, 32, 46340]),
)
def test_carrier_holds_the_metadata_exactly(start: list[int], level: list[int], block_size: int):
    spans = SpanMetadata.of_nodes(torch.tensor(start).view(2, 3), torch.tensor(level).view(2, 3), block_size)
    carrier = spans.pack()
    assert (carrier.dtype, carrier.shape) == (torch.float64, (3, 2, 1, 4))
    assert carrier.is_contiguous()
    assert CARRIER_COLUMNS == ("start", "width", "level", "modality")
    assert carrier[:, :, 0, 0].tolist() == torch.tensor(start).view(2, 3).t().tolist()
    back = SpanMetadata.unpack(carrier)
    for name in CARRIER_COLUMNS:
        sent, received = getattr(spans, name), getattr(back, name)
        assert received.dtype == sent.dtype
        assert torch.equal(received, sent.t())


def test_carrier_takes_no_gradient():
    carrier = metadata([(3, 1)], 4).pack().requires_grad_()
    assert not SpanMetadata.unpack(carrier).start.requires_grad


def standard_deviation(width: int) -> float:
    """Return the standard deviation of the places of `width` consecutive tokens."""
    mean = math.fsum(range(width)) / width
    return math.sqrt(math.fsum((place - mean) ** 2 for place in range(width)) / width)


@pytest.mark.parametrize("width", [2, 4, 32, 49, 1024])
def test_uniform_spread_is_that_of_the_tokens(width: int):
    got = base_sigma(torch.tensor([width], dtype=torch.int32), "uniform")
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(standard_deviation(width), rel=torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("rule", "factor"), [("width", 1.0), ("half-width", 0.5), ("none", 0.0)])
def test_spread_rules_scale_the_width(rule: SigmaRule, factor: float):
    got = base_sigma(torch.tensor([32, 1024], dtype=torch.int32), rule)
    assert got.tolist() == [32 * factor, 1024 * factor]


@pytest.mark.parametrize("rule", SIGMA_RULES)
def test_a_token_has_no_spread(rule: SigmaRule):
    assert base_sigma(torch.ones(3, dtype=torch.int32), rule).tolist() == [0.0] * 3
