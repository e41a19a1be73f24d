"""Slot pooling against its definition in float64, within what rounding allows, on any device."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from triton import knobs

from megacontext_megatron.kernels.pooling import slot_pooling

EPS = torch.finfo(torch.float32).eps
ROUNDINGS = 12
"""Of an exponential, a quotient and the products around them, in units in the last place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call; `size` is the standard deviation of queries, larger ones make sharper softmaxes."""

    n: int = 5
    rows: int = 32
    heads: int = 2
    hn: int = 16
    size: float = 1.0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed) or "plain"

    def given(self, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return a query, keys and values, both of which want gradients, and the gradient of what is pooled."""
        source = torch.Generator().manual_seed(seed)
        width = self.heads * self.hn
        shapes = ((1, width), (self.n, self.rows, 2 * width), (self.n, width))
        query, mixed, grad = (torch.randn(shape, generator=source) for shape in shapes)
        query, mixed, grad = (x.to(device, self.dtype) for x in (self.size * query, mixed, grad))
        return query.requires_grad_(), mixed.requires_grad_(), grad


def found_of(case: Case, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return what the kernels make of a case: the pooled values and both gradients."""
    query, mixed, grad = case.given(device)
    pooled = slot_pooling(query, mixed, case.heads)
    of_query, of_mixed = torch.autograd.grad(pooled, (query, mixed), grad)
    return {"pooled": pooled.detach(), "d query": of_query, "d mixed": of_mixed}


def check_against_float64(case: Case, device: torch.device | str = "cpu", *, scale: float | None = None) -> None:
    """Assert that outputs and gradients are the definition's; `scale` replaces its 1 / sqrt(hn)."""
    expected, bounds = Definition(case, device, scale).results()
    for name, found in found_of(case, device).items():
        assert found.shape == expected[name].shape, name
        assert found.dtype == case.dtype, name
        assert bool(found.isfinite().all()), name
        # Triton's interpreter cuts bfloat16 off instead of rounding it.
        cut = case.dtype == torch.bfloat16 and knobs.runtime.interpret and name != "d query"
        stored = torch.finfo(case.dtype).eps / (1 if cut else 2)
        # Halves below the least normal number keep fewer digits.
        least = torch.finfo(case.dtype).tiny * torch.finfo(case.dtype).eps
        bound = bounds[name] + stored * expected[name].abs() + least
        excess = ((found.double() - expected[name]).abs() / bound).max().item() if found.numel() else 0.0
        assert excess <= 1, f"{name}: {excess:.2f} times the bound"


class Definition:
    """softmax(q k / sqrt(hn)) v and its gradients, derived by hand in float64, with bounds of fp32's roundings.

    Tensors are [n, heads, rows, hn], and without rows or channels where they are summed.
    """

    def __init__(self, case: Case, device: torch.device | str, scale: float | None = None) -> None:
        query, mixed, grad = (x.detach().double() for x in case.given(device))
        self._case, self._scale = case, 1 / math.sqrt(case.hn) if scale is None else scale
        key, value = mixed.chunk(2, dim=-1)
        self.q = query.view(1, case.heads, 1, case.hn)
        self.k, self.v = (x.unflatten(-1, (case.heads, case.hn)).transpose(1, 2) for x in (key, value))
        self.g = grad.view(case.n, case.heads, 1, case.hn)
        self.p = (self._scale * (self.q * self.k).sum(-1)).softmax(-1)
        sizes = self._scale * (self.q * self.k).abs().sum(-1)
        depth = (case.hn.bit_length() + 2) * EPS
        # An exponent's error is relative in the exponential; the largest one moves the sum as well.
        self.off = 2 * depth * sizes.amax(-1, keepdim=True) + (ROUNDINGS + case.rows.bit_length()) * EPS
        self.depth = depth

    def results(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return outputs and gradients, and how far roundings before they are stored may move them."""
        p, g, k, v, q, off, scale = self.p, self.g, self.k, self.v, self.q, self.off, self._scale
        pooled = (p[..., None] * v).sum(2)
        pooled_off = ((off * p)[..., None] * v.abs()).sum(2)
        of_share, share_off = (g * v).sum(-1), self.depth * (g * v).abs().sum(-1)
        mean, mean_size = (p * of_share).sum(-1, keepdim=True), (p * of_share.abs()).sum(-1, keepdim=True)
        of_score = p * (of_share - mean)
        inner = off * (of_share.abs() + 2 * mean_size) + share_off + (p * share_off).sum(-1, keepdim=True)
        score_off = p * inner + off * of_score.abs()
        of_key, key_off = (
            scale * of_score[..., None] * q,
            scale * (score_off + off * of_score.abs())[..., None] * q.abs(),
        )
        of_value, value_off = p[..., None] * g, (off * p)[..., None] * g.abs()
        of_query = scale * (of_score[..., None] * k).sum((0, 2))
        sums = (self._case.rows.bit_length() + self._case.n.bit_length() + 8) * EPS
        query_off = scale * ((score_off + sums * of_score.abs())[..., None] * k.abs()).sum((0, 2))
        names = ("pooled", "d query", "d mixed")
        expected = (pooled.flatten(1), of_query.view(1, -1), self._mixed(of_key, of_value))
        bounds = (pooled_off.flatten(1), query_off.view(1, -1), self._mixed(key_off, value_off))
        return dict(zip(names, expected, strict=True)), dict(zip(names, bounds, strict=True))

    def _mixed(self, key: Tensor, value: Tensor) -> Tensor:
        return torch.cat([x.transpose(1, 2).flatten(2) for x in (key, value)], dim=-1)


def check_backward_is_deterministic(case: Case, device: torch.device | str = "cpu") -> None:
    """Assert that a second call changes no bit."""
    first, second = found_of(case, device), found_of(case, device)
    assert all(torch.equal(first[name], second[name]) for name in first)
