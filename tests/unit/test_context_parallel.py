"""Context-parallel slices are Megatron's, and put together they are the whole rows in time order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext_megatron.spans.context_parallel import gathered_order, slice_rows, zigzag_rows
from tests.launch import call

SIZES = st.sampled_from([1, 2, 3, 4, 8])


@given(size=SIZES, chunk=st.integers(1, 5))
def test_every_row_is_on_one_rank(size: int, chunk: int):
    window = 2 * size * chunk
    ranks = [zigzag_rows(window, size, rank) for rank in range(size)]
    assert all(rows.dtype == torch.int64 and len(rows) == window // size for rows in ranks)
    assert sorted(torch.cat(ranks).tolist()) == list(range(window))


@given(size=SIZES, chunk=st.integers(1, 5))
def test_a_rank_holds_an_early_and_its_mirrored_late_chunk(size: int, chunk: int):
    window = 2 * size * chunk
    chunks = [list(range(n * chunk, (n + 1) * chunk)) for n in range(2 * size)]
    for rank in range(size):
        assert zigzag_rows(window, size, rank).tolist() == chunks[rank] + chunks[-1 - rank]


@given(size=SIZES, chunk=st.integers(1, 4), batch=st.integers(1, 3), channels=st.sampled_from([(), (2,), (1, 4)]))
def test_slices_put_together_are_the_rows(size: int, chunk: int, batch: int, channels: tuple[int, ...]):
    window = 2 * size * chunk
    rows = torch.arange(batch * window * max(1, torch.Size(channels).numel())).view(batch, window, *channels)
    slices = [slice_rows(rows, size, rank) for rank in range(size)]
    for rank, part in enumerate(slices):
        assert torch.equal(part, rows[:, zigzag_rows(window, size, rank)])
    order = gathered_order(window, size)
    assert order.dtype == torch.int64
    assert torch.equal(torch.cat(slices, dim=1)[:, order], rows)


def test_one_rank_may_hold_an_odd_number_of_rows():
    rows = torch.arange(14).view(2, 7)
    assert torch.equal(slice_rows(rows, 1, 0), rows)
    assert zigzag_rows(7, 1, 0).tolist() == gathered_order(7, 1).tolist() == list(range(7))


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="6 rows do not divide into 4 chunks"):
        zigzag_rows(6, 2, 0)
    with pytest.raises(RuntimeError):
        slice_rows(torch.arange(6).view(1, 6), 2, 0)


def megatron_slices(window: int, sizes: list[int]) -> dict[str, list[list[int]]]:
    """Return what Megatron gives this rank of 2 rows [2, window] in context-parallel groups of each size."""
    import torch.distributed as dist
    from megatron.core.utils import get_batch_on_this_cp_rank

    dist.init_process_group("gloo")
    out = {}
    for size in sizes:
        group: Any = dist.new_subgroups(size)[0]
        batch = {"start": torch.arange(2 * window).view(2, window), "cu_seqlens": None}
        out[str(size)] = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)["start"].tolist()
    dist.destroy_process_group()
    return out


def test_slices_are_megatrons(tmp_path: Path):
    window, sizes, ranks = 48, [1, 2, 4], 4
    rows = torch.arange(2 * window).view(2, window)
    result = call(megatron_slices, {"window": window, "sizes": sizes}, ranks=ranks, workdir=tmp_path).check()
    for rank, slices in enumerate(result.values):
        for size in sizes:
            assert slice_rows(rows, size, rank % size).tolist() == slices[str(size)]
