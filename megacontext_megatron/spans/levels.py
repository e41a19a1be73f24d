"""Arithmetic of levels of detail: a level-l node n of block size K covers tokens [n K^l, (n+1) K^l)."""

from __future__ import annotations

import torch
from torch import Tensor


def widths(levels: Tensor, block_size: int) -> Tensor:
    """Return the tokens each level covers, K^l; int64, shape of `levels`."""
    return torch.pow(block_size, levels.long())


def entry_index(starts: Tensor, levels: Tensor, source_length: int, block_size: int) -> Tensor:
    """Return the place of each row's node in the entry table, in which level 0 comes first, then 1, then 2.

    `starts` and `levels` are int64 of any one shape; every start is a multiple of its level's width.
    """
    offsets = (levels >= 1) * source_length + (levels >= 2) * (source_length // block_size)
    return offsets + starts // widths(levels, block_size)
