"""Where a level's nodes lie, and in which entry of the table."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext_megatron.spans.levels import entry_index, widths

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


def test_widths_are_exact_integers():
    level = torch.tensor([[0, 1], [2, 1]], dtype=torch.int8)
    for block_size in (2, 32, 46340):
        got = widths(level, block_size)
        assert got.dtype == torch.int64
        assert got.tolist() == [[1, block_size], [block_size**2, block_size]]
