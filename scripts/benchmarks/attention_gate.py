"""What attention's outputs and gradients are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scripts.benchmarks.attention_oracle import PARTS
from scripts.benchmarks.gate import SMALL, VECTORS, compared
from scripts.benchmarks.results import Check

ROUNDED_AGAIN = 2.0
"""How much wider tolerances are where q and k are rotated inside: they round to bf16 once more."""


def pass_values(
    forward: Callable[[], Tensor], leaves: Mapping[str, Tensor], upstream: Tensor, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Return `output` and `d NAME` of every leaf; with `rows` the upstream gradient is theirs alone, others have 0.

    Then `output` and `d query` are those of these rows.
    """
    out = forward()
    given = upstream
    if rows is not None:
        given = torch.zeros_like(upstream)
        given[rows] = upstream[rows]
    gradients = torch.autograd.grad(out, list(leaves.values()), given)
    values = {"output": out.detach(), **{f"d {n}": g for n, g in zip(leaves, gradients, strict=True)}}
    if rows is not None:
        values |= {n: values[n][rows] for n in ("output", "d query")}
    return values


def attention_checks(
    values: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str, scale: float = 1.0
) -> list[Check]:
    """Compare with the oracle vector by vector, `d query` and `d key` relative to length and to what cancels in them.

    They are sums of weight times (do.v - do.out), over keys times k and over queries times q.  Every backward reads
    `out` rounded to bf16, which shifts such a difference by as much as 2^-9 |do| |out|; where v and out are alike, as
    for a row's own key, that does not shrink with the gradient.
    """
    others = {name: x for name, x in expected.items() if name not in (*PARTS, *PARTS.values())}
    checks = compared(values, others, prefix, scale)
    for name, parts in PARTS.items():
        if name in expected:
            error = _cancelling_error(values.get(name), expected[name], expected[parts])
            checks.append(Check(name=f"{prefix}{name}", error=error, tolerance=VECTORS * scale))
    return checks


def _cancelling_error(value: Tensor | None, reference: Tensor, parts: Tensor) -> float:
    if value is None or value.shape != reference.shape:
        return math.inf
    size = reference.norm(dim=-1)
    # As everywhere, what is far shorter than the typical vector is measured against that: keys almost out of reach.
    length = (size + parts).clamp_min(SMALL * float(size.square().mean().sqrt()))
    worst = float(((value.detach().double() - reference).norm(dim=-1) / length).max())
    return math.inf if math.isnan(worst) else worst
