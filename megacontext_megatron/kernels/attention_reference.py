"""Causal attention with windows and linear biases in plain PyTorch: what the kernels compute, step by step."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    look_back: int | None = None,
    slopes: Tensor | None = None,
    centre: Tensor | None = None,
) -> Tensor:
    """Return causal attention [sq, b, np, hn] of queries that are the last sq of sk rows, in the queries' dtype.

    Keys and values are [sk, b, ng, hn], np a multiple of ng; a query sees its own row and the `look_back` before it, or
    all before it.  Scores are scale q k + slope (mu_k - mu_q), with `slopes` [np] or [sq, b, np] in nats per token and
    `centre` [sk, b] in tokens; distances are taken in the centres' own dtype.  Everything else is computed in float32,
    or in float64 where the queries are.  Makes a tensor [b, np, sq, sk].  Raises ValueError where slopes come without
    centres.  Linear biases: Press et al., "Train Short, Test Long" (ALiBi), section 3.
    """
    sq, sk, heads = query.shape[0], key.shape[0], query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = (x.repeat_interleave(heads // x.shape[2], dim=2).to(wide) for x in (key, value))
    scores = torch.einsum("ibhc,jbhc->bhij", query.to(wide), key) * scale
    if slopes is not None:
        if centre is None:
            raise ValueError("slopes need the centres of the rows")
        apart = (centre[None] - centre[sk - sq :, None]).to(wide).permute(2, 0, 1)
        of_row = slopes.to(wide).expand(sq, query.shape[1], heads).permute(1, 2, 0)
        scores = scores + of_row.unsqueeze(3) * apart.unsqueeze(1)
    row = torch.arange(sk - sq, sk, device=query.device)[:, None]
    column = torch.arange(sk, device=query.device)
    hidden = column > row
    if look_back is not None:
        hidden = hidden | (column < row - look_back)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=3)
    return torch.einsum("bhij,jbhc->ibhc", weights, value).to(query.dtype)
