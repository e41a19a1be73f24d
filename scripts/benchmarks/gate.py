"""Correctness gates: what must hold before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scripts.benchmarks.results import Check, Row

VECTORS = 2.0**-7
"""Largest relative error of one head's vector in bf16: twice the unit roundoff of each of its channels."""

SUMS = 2.0**-5
"""Largest error of a sum over heads or rows of bf16 products, relative to the root mean square of all such sums: the
terms err by 2^-8 each, independently, and the worst of 10^5 sums lies within five standard deviations."""

SMALL = 1e-2


class GateFailed(Exception):
    """Ours is wrong, so that timing it means nothing; `checks` holds all that was compared."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self.checks = tuple(checks)
        wrong = [f"{c.name}: {c.error:.2e} > {c.tolerance:.2e}" for c in checks if not c.passed]
        super().__init__("wrong results, " + "; ".join(wrong))


@dataclass(kw_only=True)
class Findings:
    """What a group has found so far; kept when it stops early. `absent` says why a group cannot run at all."""

    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    absent: str = ""

    def require(self, checks: Sequence[Check]) -> None:
        """Keep the checks; raises GateFailed if one of them failed, or if there are none."""
        self.checks += checks
        require(checks)


def vector_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest relative error of a vector along the last dimension.

    Vectors shorter than a hundredth of the typical one are measured against that.  Inf for another shape or nan.
    """
    if value.shape != reference.shape:
        return math.inf
    error = (value.detach().double() - reference).norm(dim=-1)
    length = reference.norm(dim=-1)
    return _greatest(error / length.clamp_min(SMALL * _typical(length)))


def sum_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest error relative to the root mean square of the reference; inf for another shape or nan."""
    if value.shape != reference.shape:
        return math.inf
    return _greatest((value.detach().double() - reference).abs() / _typical(reference))


def compared(
    values: Mapping[str, Tensor], references: Mapping[str, Tensor], prefix: str = "", scale: float = 1.0
) -> list[Check]:
    """Compare every reference with the value of its name; `scale` widens the tolerances, for other dtypes than bf16.

    Tensors of heads, [s, b, n, hn] or Megatron's mixed [s, b, ng, ...], are compared vector by vector, all others as
    sums.  A value that is missing fails.
    """
    checks = []
    for name, reference in references.items():
        heads = reference.dim() == 4
        measure, tolerance = (vector_error, VECTORS) if heads else (sum_error, SUMS)
        error = measure(values[name], reference) if name in values else math.inf
        checks.append(Check(name=f"{prefix}{name}", error=error, tolerance=tolerance * scale))
    return checks


def require(checks: Sequence[Check]) -> None:
    """Raise GateFailed if one of the checks failed, or if there are none."""
    if not checks or not all(check.passed for check in checks):
        raise GateFailed(checks or [Check(name="nothing was compared", error=math.inf, tolerance=0.0)])


def _typical(values: Tensor) -> Tensor:
    return values.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def _greatest(errors: Tensor) -> float:
    found = float(errors.max().detach())
    return math.inf if math.isnan(found) else found
