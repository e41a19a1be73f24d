"""Windows over context-parallel ranks: their chunks' rows see what one rank's rows see, gradients too."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megacontext_megatron.attention.window_chunks import chunked_window_attention
from megacontext_megatron.kernels.window_attention import window_attention
from megacontext_megatron.spans.context_parallel import zigzag_rows
from tests.launch import call

ROWS, HEADS, GROUPS, WIDTH = 48, 4, 2, 16
SCALE = WIDTH**-0.5


def given(batch: int) -> list[Tensor]:
    """Return queries, keys, values and an incoming gradient of all rows, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(ROWS, batch, heads, WIDTH, generator=generator) for heads in (HEADS, GROUPS, GROUPS, HEADS)]


def differences(sizes: list[int], windows: list[int], batches: list[int]) -> dict[str, list[float]]:
    """Return, for each group, window and number of sequences, how far from one rank's results are, and bytes sent."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    sent: list[int] = []
    real = dist.batch_isend_irecv

    def counted(operations: list[Any]) -> Any:
        sent.append(sum(x.tensor.nbytes for x in operations if x.op is dist.isend))
        return real(operations)

    dist.batch_isend_irecv = counted
    found = {}
    for size in sizes:
        group: Any = dist.new_subgroups(size)[0]
        for look_back, batch in itertools.product(windows, batches):
            sent.clear()
            found[f"{size} {look_back} {batch}"] = [difference(group, look_back, batch), *sent]
    dist.destroy_process_group()
    return found


def difference(group: Any, look_back: int, batch: int) -> float:
    own = zigzag_rows(ROWS, group.size(), group.rank())

    def both(attend: Any, heads: list[Tensor], gradient: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in heads]
        out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    *heads, gradient = given(batch)
    expected = both(lambda q, k, v: window_attention(q, k, v, look_back, SCALE), heads, gradient)
    made = both(
        lambda q, k, v: chunked_window_attention(q, k, v, look_back, scale=SCALE, group=group),
        [x[own] for x in heads], gradient[own],
    )  # fmt: skip
    return max(float((x - y[own]).abs().max()) for x, y in zip(made, expected, strict=True))


def test_chunks_see_what_one_rank_sees(tmp_path: Path):
    """A chunk has 12 rows on two ranks and 6 on four."""
    result = call(
        differences, {"sizes": [2, 4], "windows": [0, 1, 5, 6], "batches": [1, 2]}, ranks=4, workdir=tmp_path
    ).check()
    for rank, found in enumerate(result.values):
        assert len(found) == 16
        for case, (apart, *sent) in found.items():
            size, look_back, batch = map(int, case.split())
            assert apart < 4e-6
            # Keys and values of the last rows of each chunk whose next chunk another rank has, and as many gradients.
            neighbours = 1 if rank % size in (0, size - 1) else 2
            rows = 4 * 2 * batch * GROUPS * WIDTH * look_back * neighbours
            assert sent == ([rows, rows] if look_back else [])


def test_rows_of_more_than_one_rank_are_refused():
    query = torch.zeros(8, 1, 1, 16)
    with pytest.raises(ValueError, match="5 rows before a chunk of 4"):
        chunked_window_attention(query, query, query, 5, scale=1.0, group=None)  # pyright: ignore[reportArgumentType]
