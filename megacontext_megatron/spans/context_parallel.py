"""Zigzag slicing of rows for context parallelism: rank r of n holds chunks r and 2n-1-r of 2n."""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag_rows(window: int, size: int, rank: int, device: torch.device | None = None) -> Tensor:
    """Return the row numbers, int64 [window / size], that a context-parallel rank holds, in its order."""
    if size == 1:
        return torch.arange(window, device=device)
    if window % (2 * size):
        raise ValueError(f"{window} rows do not divide into {2 * size} chunks")
    chunk = window // (2 * size)
    rows = torch.arange(chunk, device=device)
    first = rows + rank * chunk
    second = rows + (2 * size - 1 - rank) * chunk
    return torch.cat([first, second])


def gathered_order(window: int, size: int, device: torch.device | None = None) -> Tensor:
    """Return the permutation, int64 [window], that puts rows gathered rank after rank back into time order."""
    return torch.cat([zigzag_rows(window, size, rank, device) for rank in range(size)]).argsort()


def slice_rows(rows: Tensor, size: int, rank: int) -> Tensor:
    """Return this context-parallel rank's part of [b, s] rows: [b, s / size]."""
    if size == 1:
        return rows
    batch, window = rows.shape[:2]
    chunks = rows.view(batch, 2 * size, window // (2 * size), *rows.shape[2:])
    return torch.cat([chunks[:, rank], chunks[:, 2 * size - 1 - rank]], dim=1)
