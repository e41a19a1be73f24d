"""Cases of sliding-window attention, its definition in float64, and the bounds that rounding sets.

The definition is written here from softmax attention and from complex rotation by the expectation of exp(i omega x)
over a normal distribution, not from the kernels nor from the plain references beside them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megacontext_megatron.kernels.rotary_arguments import RotaryOptions, RotaryTable, RowPlaces
from megacontext_megatron.kernels.row_rotation import RowRotation
from megacontext_megatron.kernels.window_attention import (
    Tiles,
    split_window_attention,
    window_attention,
)

ROUNDINGS = 4
"""Of scores, weights, their sum and what is stored, in units in the last place of the stored dtype, of the largest sum
of the absolute values of what is summed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options of one call; `rotary` is "" (none), "halves" or "interleaved"; `sigma` as in rotary_cases."""

    sq: int = 40
    sk: int = 40
    b: int = 2
    np: int = 4
    ng: int = 1
    hn: int = 16
    look_back: int = 7
    mixed: bool = False
    rotary: str = ""
    percent: float = 1.0
    sigma: int = 0
    offset: bool = False
    grouped_frequencies: bool = False
    damp_query: bool = True
    first: int = 2**20
    dtype: torch.dtype = torch.float32
    tiles: Tiles | None = None

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{f.name}={getattr(self, f.name)}".replace("torch.", "") for f in changed) or "plain"

    @property
    def scale(self) -> float:
        """Of scores."""
        return self.hn**-0.5


@dataclasses.dataclass(kw_only=True)
class Given:
    """Tensors of a call: heads (of `mixed`, views), the incoming gradient, and what turns heads."""

    heads: list[Tensor]
    mixed: Tensor | None
    incoming: Tensor
    centre: Tensor
    omega: Tensor
    sigma: Tensor | None
    offset: Tensor | None

    def rotation(self, case: Case) -> RowRotation | None:
        """Return what turns heads, if anything does."""
        if not case.rotary:
            return None
        options = RotaryOptions(interleaved=case.rotary == "interleaved", damp_query=case.damp_query)
        places = RowPlaces(doubled_centre=self.centre, sigma=self.sigma, offset=self.offset)
        return RowRotation(places=places, table=RotaryTable.learned(self.omega), options=options)


def given_of(case: Case, device: torch.device | str = "cpu") -> Given:
    """Return random tensors; rows of random gaps, widths and displacements."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    query, key, value = normal(case.sq, case.b, case.np, case.hn), *normal(2, case.sk, case.b, case.ng, case.hn)
    mixed = None
    if case.mixed:
        grouped = query.view(case.sq, case.b, case.ng, case.np // case.ng * case.hn)
        mixed = torch.cat([grouped, key, value], dim=3).to(device, case.dtype).requires_grad_()
    pairs = int(case.hn * case.percent) // 2
    groups = case.ng if case.grouped_frequencies else 1
    omega = 10_000.0 ** -(torch.arange(pairs) / pairs) * (1 + 0.1 * torch.arange(groups))[:, None]
    centre = case.first + torch.randint(1, 9, (case.sk, case.b), generator=draw).cumsum(0)
    widths = (case.sk, case.b) if case.sigma == 1 else (case.sk, case.b, case.sigma)
    return Given(
        heads=[x.to(device, case.dtype).requires_grad_() for x in (query, key, value)],
        mixed=mixed,
        incoming=normal(case.sq, case.b, case.np, case.hn).to(device, case.dtype),
        centre=centre.to(device),
        omega=omega.float().to(device),
        sigma=normal(*widths).abs().to(device) if case.sigma else None,
        offset=normal(case.sk, case.b).to(device) if case.offset else None,
    )


def call(case: Case, given: Given) -> Tensor:
    """Return what the kernels find."""
    rotation = given.rotation(case)
    if given.mixed is not None:
        return split_window_attention(
            given.mixed, case.hn, case.look_back, case.scale, rotation=rotation, tiles=case.tiles
        )
    query, key, value = given.heads
    return window_attention(query, key, value, case.look_back, case.scale, rotation=rotation, tiles=case.tiles)


def turned(x: Tensor, case: Case, given: Given, rows: slice, *, damp: bool) -> Tensor:
    """Return heads turned by the definition: pairs as complex numbers times E exp(i omega x), x normal."""
    mu = given.centre[rows].double() / 2
    if given.offset is not None:
        mu = mu + given.offset[rows].double()
    omega = given.omega.double()
    angle = mu[..., None, None] * omega
    size = torch.ones_like(angle)
    if given.sigma is not None and damp:
        sigma = given.sigma[rows].double()
        sigma = sigma if sigma.dim() == 3 else sigma[..., None]
        size = torch.exp(-((sigma[..., None] * omega) ** 2) / 2)
    # Sizes and angles may each be of one group or of all.
    angle, size = torch.broadcast_tensors(angle, size)
    factor = torch.polar(size.contiguous(), angle.contiguous())
    factor = factor.repeat_interleave(x.shape[2] // factor.shape[2], dim=2)
    width = 2 * omega.shape[1]
    part = x[..., :width]
    if case.rotary == "interleaved":
        product = torch.complex(part[..., ::2], part[..., 1::2]) * factor
        out = torch.stack([product.real, product.imag], dim=-1).flatten(-2)
    else:
        product = torch.complex(part[..., : width // 2], part[..., width // 2 :]) * factor
        out = torch.cat([product.real, product.imag], dim=-1)
    return torch.cat([out, x[..., width:]], dim=-1)


def definition(case: Case, given: Given) -> tuple[list[Tensor], list[float]]:
    """Return the attention and its gradients by queries, keys and values, float64, and the magnitudes of their terms.

    A magnitude is the largest sum of the absolute values of what is summed.
    """
    leaves = [x.detach().double().requires_grad_() for x in given.heads]
    query, key, value = leaves
    if case.rotary:
        query = turned(query, case, given, slice(case.sk - case.sq, case.sk), damp=case.damp_query)
        key = turned(key, case, given, slice(0, case.sk), damp=True)
    row = torch.arange(case.sk - case.sq, case.sk, device=query.device)[:, None]
    column = torch.arange(case.sk, device=query.device)
    seen = (column <= row) & (row - column <= case.look_back)
    out, incoming = torch.zeros_like(query), given.incoming.double()
    terms = [torch.zeros_like(x) for x in (query, query, key, value)]
    per_group = case.np // case.ng
    for sequence in range(case.b):
        for head in range(case.np):
            at, shared = (slice(None), sequence, head), (slice(None), sequence, head // per_group)
            q, k, v = query[at], key[shared], value[shared]
            weight = (q @ k.T * case.scale).masked_fill(~seen, -torch.inf).softmax(dim=1)
            out[at] = weight @ v
            with torch.no_grad():
                change = (incoming[at] @ v.T).abs()
                change = case.scale * weight * (change + (weight * change).sum(dim=1, keepdim=True))
                terms[0][at] = weight @ v.abs()
                terms[1][at] = change @ k.abs()
                terms[2][shared] += change.T @ q.abs()
                terms[3][shared] += weight.T @ incoming[at].abs()
    return [out, *torch.autograd.grad(out, leaves, incoming)], [x.max().item() if len(x) else 0.0 for x in terms]


def found(case: Case, given: Given) -> tuple[Tensor, list[Tensor]]:
    """Return what the kernels find, the gradient of a mixed projection taken apart."""
    out = call(case, given)
    if given.mixed is None:
        return out, list(torch.autograd.grad(out, given.heads, given.incoming))
    (whole,) = torch.autograd.grad(out, given.mixed, given.incoming)
    query, key, value = whole.split((whole.shape[3] - 2 * case.hn, case.hn, case.hn), dim=3)
    return out, [query.reshape(out.shape), key, value]


def check_against_float64(case: Case, device: torch.device | str = "cpu") -> dict[str, float]:
    """Assert that attention and gradients are the definition's to a few roundings; return errors in units of bounds."""
    given = given_of(case, device)
    out, gradients = found(case, given)
    right, magnitudes = definition(case, given)
    unit = ROUNDINGS * torch.finfo(case.dtype).eps
    names = ("out", "query", "key", "value")
    errors = {}
    for name, x, y, magnitude in zip(names, (out, *gradients), right, magnitudes, strict=True):
        assert x.shape == y.shape
        assert x.dtype == case.dtype
        errors[name] = (x.double() - y).abs().max().item() / (unit * magnitude)
    assert all(error <= 1 for error in errors.values()), f"times the bound: {errors}"
    return errors
