"""Cases of the span rotary and the bounds that rounding sets, for the kernels on any device.

Every bound is a count of roundings times the unit of fp32 or of the stored dtype, times the magnitude that is rounded:
a rotary pair's where pairs are turned, a head's where it is normed, the sum of absolute terms where terms are summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from megacontext_megatron.config import RotaryConfig
from megacontext_megatron.kernels import reference, rotary
from megacontext_megatron.kernels.rotary_arguments import QKNorm, RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import damping, pairs

EPS = torch.finfo(torch.float32).eps
FLUSHED = torch.finfo(torch.float32).tiny
EPSILON_OF_NORMS = 1e-5
ROUNDINGS = 10
"""Of cosine, sine, damping and one rotation, in units in the last place."""

Tensors = list[Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one call; `sigma` is the number of widths of a row: 0, 1 or the query groups'."""

    s: int = 5
    b: int = 2
    np: int = 4
    ng: int = 2
    hn: int = 16
    percent: float = 1.0
    interleaved: bool = False
    grouped_frequencies: bool = False
    sigma: int = 0
    offset: bool = False
    anchor: bool = False
    damp_query: bool = True
    norm: str = ""
    mixed: bool = False
    dtype: torch.dtype = torch.float32
    first: int = 2**40
    spread: float = 30.0

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed) or "plain"

    @property
    def options(self) -> RotaryOptions:
        """Return the options of the call."""
        return RotaryOptions(interleaved=self.interleaved, damp_query=self.damp_query)


@dataclasses.dataclass(kw_only=True)
class Given:
    """The leaves of one call, all of which want gradients; absent ones are None."""

    omega: Tensor
    sigma: Tensor | None = None
    offset: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    mixed: Tensor | None = None
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    words: Tensor = dataclasses.field(kw_only=True)
    centre: Tensor = dataclasses.field(kw_only=True)
    anchor: Tensor | None = None

    LEAVES = ("omega", "sigma", "offset", "query", "key", "mixed", "query_weight", "key_weight")

    def leaves(self) -> dict[str, Tensor]:
        """Return the leaves that are there, by name."""
        return {name: value for name in self.LEAVES if (value := getattr(self, name)) is not None}

    def wide(self) -> Given:
        """Return float64 leaves of the same values."""
        changed: dict[str, Any] = {name: x.detach().double().requires_grad_() for name, x in self.leaves().items()}
        return dataclasses.replace(self, **changed)

    def places(self) -> RowPlaces:
        """Return the places of the call."""
        return RowPlaces(doubled_centre=self.centre, sigma=self.sigma, offset=self.offset, anchor=self.anchor)

    def table(self) -> RotaryTable:
        """Return the frequencies of the call."""
        return RotaryTable(omega=self.omega, words=self.words)


def given_of(case: Case, device: torch.device | str = "cpu", *, seed: int = 0) -> Given:
    """Return random leaves for a case."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=source).to(device, dtype).requires_grad_()

    def uniform(*shape: int, least: float = 0.0) -> Tensor:
        return (torch.rand(shape, generator=source) + least).to(device).requires_grad_()

    s, b, hn = case.s, case.b, case.hn
    table = RotaryTable.fixed(
        rotary_frequencies(RotaryConfig(head_dim=hn, percent=case.percent, interleaved=case.interleaved))
    )
    omega, words = table.omega, table.words
    if case.grouped_frequencies:
        omega = omega * torch.linspace(0.9, -1.1, case.ng)[:, None]
        words = RotaryTable.learned(omega).words
    given = Given(
        omega=omega.detach().clone().to(device).requires_grad_(),
        words=words.to(device),
        centre=torch.randint(case.first, case.first + 20_000, (s, b), generator=source).to(device),
        anchor=torch.full((b,), case.first + 9_000, device=device) if case.anchor else None,
    )
    if case.sigma:
        sigma = uniform(*((s, b) if case.sigma == 1 else (s, b, case.sigma)))
        given.sigma = (sigma.detach() * case.spread).requires_grad_()
    if case.offset:
        given.offset = normal(s, b)
    if case.mixed:
        given.mixed = normal(s, b, case.ng, (case.np // case.ng + 2) * hn, dtype=case.dtype)
    else:
        given.query, given.key = (
            normal(s, b, case.np, hn, dtype=case.dtype),
            normal(s, b, case.ng, hn, dtype=case.dtype),
        )
    if case.norm:
        least = -0.5 if case.norm == "centred" else 0.5
        given.query_weight, given.key_weight = uniform(hn, least=least), uniform(hn, least=least)
    return given


def call(module: ModuleType, case: Case, given: Given) -> Tensors:
    """Return the outputs of `module`, kernels.rotary or kernels.reference."""
    if given.mixed is None:
        return list(module.span_rotary(given.query, given.key, given.places(), given.table(), case.options))
    norm = None
    if given.query_weight is not None and given.key_weight is not None:
        norm = QKNorm(
            query_weight=given.query_weight,
            key_weight=given.key_weight,
            eps=EPSILON_OF_NORMS,
            zero_centred=case.norm == "centred",
        )
    table = given.table()
    return list(module.split_span_rotary(given.mixed, case.hn, given.places(), table, case.options, norm=norm))


def incoming(outputs: Sequence[Tensor], seed: int = 1) -> Tensors:
    """Return random gradients of outputs, in their dtypes."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=source).to(x.device, x.dtype) for x in outputs]


def gradients(outputs: Sequence[Tensor], given: Given, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the gradients of all leaves, by name."""
    leaves = given.leaves()
    found = torch.autograd.grad(list(outputs), list(leaves.values()), list(weights))
    return dict(zip(leaves, found, strict=True))


def check_against_float64(case: Case, device: torch.device | str = "cpu") -> None:
    """Assert that the kernels' outputs and gradients are those of the float64 reference, within rounding."""
    given = given_of(case, device)
    wide = given.wide()
    outputs, expected = call(rotary, case, given), call(reference, case, wide)
    weights = incoming(outputs)
    found = gradients(outputs, given, weights)
    right = gradients(expected, wide, [w.double() for w in weights])
    bounds = Bounds(case, wide, weights)
    for name, x, y, bound in zip("qkv", outputs, expected, bounds.outputs(), strict=False):
        assert x.dtype == case.dtype
        assert x.is_contiguous()
        assert_within(name, x, y, bound + bounds.stored * y.abs())
    for name, bound in bounds.gradients().items():
        assert found[name].dtype == given.leaves()[name].dtype
        assert_within(name, found[name], right[name], bound + bounds.stored_in(found[name]) * right[name].abs())


def assert_within(name: str, found: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Assert |found - expected| <= bound, element by element."""
    assert found.shape == expected.shape, name
    assert bool(found.isfinite().all()), name
    least = torch.finfo(found.dtype).tiny
    excess = ((found.double() - expected.double()).abs() / (bound.double() + least)).max().item()
    assert excess <= 1, f"{name}: {excess:.2f} times the bound"


class Bounds:
    """How far rounding may move outputs and gradients of a case, [as their shapes], in float64."""

    def __init__(self, case: Case, wide: Given, weights: Sequence[Tensor]) -> None:
        self._case, self._given = case, wide
        self.stored = self._half(case.dtype)
        query, key = self._heads()
        self._x = [self._normed(query, wide.query_weight), self._normed(key, wide.key_weight)]
        self._raw = [query, key]
        self._g = [g.double() for g in weights]
        self._count = wide.omega.shape[-1]
        omega = wide.omega.detach()
        self._angular = torch.zeros(case.s, case.b, len(omega), self._count, device=omega.device, dtype=torch.float64)
        damp = torch.ones_like(self._angular)
        if wide.sigma is not None:
            sigma = wide.sigma.detach()
            self._angular = ((sigma if sigma.dim() == 3 else sigma.unsqueeze(2)).unsqueeze(-1) * omega).square()
            damp = damping(sigma if sigma.dim() == 3 else sigma.unsqueeze(2), omega)
        phase = 0.0 if wide.offset is None else 2 * (wide.offset.detach()[..., None, None] * omega).abs()
        self._damp = [damp if case.damp_query else torch.ones_like(damp), damp]
        self._error = (ROUNDINGS + 2 * self._angular + phase + (case.hn.bit_length() if case.norm else 0)) * EPS

    @staticmethod
    def _half(dtype: torch.dtype) -> float:
        # Triton's interpreter cuts bfloat16 off instead of rounding it.
        cut = dtype == torch.bfloat16 and knobs.runtime.interpret
        return torch.finfo(dtype).eps / (1 if cut else 2)

    def stored_in(self, x: Tensor) -> float:
        """Return the half unit with which x was stored."""
        return self._half(x.dtype)

    def _heads(self) -> tuple[Tensor, Tensor]:
        given, case = self._given, self._case
        if given.mixed is None:
            assert given.query is not None
            assert given.key is not None
            return given.query.detach(), given.key.detach()
        query, key, _ = given.mixed.detach().split(((case.np // case.ng) * case.hn, case.hn, case.hn), dim=3)
        return query.reshape(case.s, case.b, case.np, case.hn), key

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x * self._scale(x) * self._weight(weight)

    def _weight(self, weight: Tensor) -> Tensor:
        return weight.detach() + (1.0 if self._case.norm == "centred" else 0.0)

    def _scale(self, x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + EPSILON_OF_NORMS).rsqrt()

    def _sizes(self, x: Tensor) -> Tensor:
        return torch.hypot(*pairs(x, self._count, interleaved=self._case.interleaved))

    def _over_heads(self, groups: Tensor, heads: int) -> Tensor:
        """Return [s, b, heads, r] of [s, b, 1 or ng, r]."""
        return groups if groups.shape[2] == 1 else groups.repeat_interleave(heads // groups.shape[2], dim=2)

    def _turned(self, x: Tensor, side: int, *, error: Tensor | float, passed: float) -> Tensor:
        """Return x's sizes times relative errors, in the order of channels: `passed` is that of those not rotated."""
        of_pairs = self._over_heads(self._damped(error, side), x.shape[2]) * self._sizes(x)
        together = (
            torch.stack([of_pairs] * 2, -1).flatten(-2) if self._case.interleaved else of_pairs.repeat(1, 1, 1, 2)
        )
        return torch.cat([together, passed * x[..., 2 * self._count :].abs()], dim=-1)

    def _damped(self, error: Tensor | float, side: int) -> Tensor:
        """Return relative errors of damped pairs as absolute ones; a GPU flushes subnormal damping to 0."""
        return error * self._damp[side] + FLUSHED

    def outputs(self) -> Tensors:
        """Return the bounds of query, key and value before they are stored."""
        passed = ROUNDINGS * EPS if self._case.norm else 0.0
        found = [self._turned(x, side, error=self._error, passed=passed) for side, x in enumerate(self._x)]
        return [*found, torch.zeros_like(self._x[1])]

    def gradients(self) -> dict[str, Tensor]:
        """Return the bounds of all leaves' gradients before they are stored."""
        given, found = self._given, self._sums()
        of_heads = [self._of_heads(side) for side in (0, 1)]
        if given.mixed is None:
            found["query"], found["key"] = of_heads
        else:
            s, b, ng = given.mixed.shape[:3]
            groups = [x.reshape(s, b, ng, -1) for x in (*of_heads, torch.zeros_like(of_heads[1]))]
            found["mixed"] = torch.cat(groups, dim=3)
        for side, name in enumerate(("query_weight", "key_weight")):
            if getattr(given, name) is not None:
                found[name] = self._of_weight(side)
        return found

    def _of_heads(self, side: int) -> Tensor:
        if not self._case.norm:
            return self._turned(self._g[side], side, error=self._error, passed=0.0)
        weight = (self._given.query_weight, self._given.key_weight)[side]
        assert weight is not None
        errors = self._turned(self._g[side], side, error=self._error, passed=ROUNDINGS * EPS)
        size = (errors * self._weight(weight)).norm(dim=-1, keepdim=True) * self._scale(self._raw[side])
        return (2 * size).expand_as(errors)

    def _of_weight(self, side: int) -> Tensor:
        direction = (self._raw[side] * self._scale(self._raw[side])).abs()
        depth = self._depth()
        errors = self._turned(self._g[side], side, error=self._error + depth, passed=ROUNDINGS * EPS + depth)
        return (errors * direction).sum((0, 1, 2))

    def _depth(self) -> float:
        """Return the error of a sum relative to its absolute terms: its longest chain of additions."""
        rows = self._case.s * self._case.b
        return (self._case.np + self._case.ng + 8 + rows // 8192 + rows.bit_length()) * EPS / 2

    def _sums(self) -> dict[str, Tensor]:
        given, case = self._given, self._case
        omega = given.omega.detach()
        seen = 0.0 if case.norm else self.stored
        turns, shrinks = 0.0, 0.0
        for side, (x, g) in enumerate(zip(self._x, self._g, strict=False)):
            error = self._over_heads(self._damped(self._error + seen + self._depth(), side), x.shape[2])
            terms = error * self._sizes(x) * self._sizes(g)
            terms = terms.reshape(*terms.shape[:2], case.ng, -1, self._count).sum(3)
            turns = turns + terms
            shrinks = shrinks + (terms if side or case.damp_query else 0.0)
        assert isinstance(turns, Tensor)
        reach = (given.centre - (0 if given.anchor is None else given.anchor)).double().abs()[..., None, None] / 2
        if given.offset is not None:
            reach = reach + given.offset.detach().abs()[..., None, None]
        found = {}
        of_omega = reach * turns
        if given.sigma is not None:
            sigma = given.sigma.detach()
            sigma = sigma if sigma.dim() == 3 else sigma.unsqueeze(2)
            of_omega = of_omega + omega.abs() * sigma.square().unsqueeze(-1) * shrinks
            of_sigma = sigma * (omega.square() * shrinks).sum(-1)
            found["sigma"] = of_sigma if given.sigma.dim() == 3 else of_sigma.sum(2)
        of_omega = of_omega.sum((0, 1))
        found["omega"] = of_omega if len(omega) > 1 else of_omega.sum(0, keepdim=True)
        if given.offset is not None:
            found["offset"] = (omega.abs() * turns).sum((2, 3))
        return found
