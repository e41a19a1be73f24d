"""Rows before a context-parallel rank's chunks: those that precede them in time, with their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megacontext_megatron.attention.halo import chunks_with_halo
from megacontext_megatron.spans.context_parallel import zigzag_rows
from tests.launch import call

ROWS, BATCH, GROUPS, WIDTH = 48, 2, 2, 3


def whole(seed: int) -> torch.Tensor:
    """Return the same numbers on every rank, [s, b, ng, hn]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, BATCH, GROUPS, WIDTH, generator=generator, dtype=torch.float64)


def differences(sizes: list[int], depths: list[int]) -> dict[str, float]:
    """Return, for each size of group and depth, the largest difference from slices of all rows and their gradients."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = {}
    for size in sizes:
        group: Any = dist.new_subgroups(size)[0]
        for depth in depths:
            found[f"{size} {depth}"] = difference(group, depth)
    dist.destroy_process_group()
    return found


def difference(group: Any, depth: int) -> float:
    size, rank = group.size(), group.rank()
    chunk = ROWS // (2 * size)
    rows = zigzag_rows(ROWS, size, rank)
    local = [whole(seed)[rows].requires_grad_() for seed in (1, 2)]
    chunks = chunks_with_halo(local[0], local[1], depth, group)
    worst = 0.0
    expected = [torch.zeros(ROWS, BATCH, GROUPS, WIDTH, dtype=torch.float64) for _ in range(2)]
    loss = torch.zeros((), dtype=torch.float64)
    # every rank works out the gradients that all ranks' chunks send to all rows
    for other in range(size):
        for number in (other, 2 * size - 1 - other):
            begin, end = max(0, number * chunk - depth), (number + 1) * chunk
            for part, seed in enumerate((1, 2)):
                weight = (torch.arange(begin, end) + 1.0 + 100 * number).double()[:, None, None, None]
                expected[part][begin:end] += weight
                if other == rank:
                    mine = chunks[0 if number == rank else 1][part]
                    worst = max(worst, float((mine.detach() - whole(seed)[begin:end]).abs().max()))
                    loss = loss + (mine * weight).sum()
    loss.backward()
    for part, tensor in enumerate(local):
        assert tensor.grad is not None
        worst = max(worst, float((tensor.grad - expected[part][rows]).abs().max()))
    return worst


def test_chunks_come_behind_the_rows_before_them(tmp_path: Path):
    result = call(differences, {"sizes": [2, 4], "depths": [0, 1, 5, 6]}, ranks=4, workdir=tmp_path).check()
    for value in result.values:
        assert value == dict.fromkeys(["2 0", "2 1", "2 5", "2 6", "4 0", "4 1", "4 5", "4 6"], 0.0)


def test_rows_of_more_than_one_rank_are_refused():
    key = torch.zeros(8, 1, 1, 2)
    with pytest.raises(ValueError, match="5 rows before a chunk of 4"):
        chunks_with_halo(key, key, 5, None)  # pyright: ignore[reportArgumentType]
