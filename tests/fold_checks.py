"""What the kernels of folded biases must do, by interpreter and by GPU alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.attention.folded_bias import BiasFold, plain_split_spare
from megacontext_megatron.encoding_config import SPARE_CHANNELS
from megacontext_megatron.kernels.fold import FoldScale, fold, split

FP64_SUM = 2.0**-48
"""Rounding of sums in float64 relative to the sizes of their terms: for 2^18 of them 2^-53 each would be 2^-35 at worst
and sqrt(2^18) 2^-53 = 2^-44 at random; pairwise sums, as here, add one rounding for each of some 20 levels."""


FP32_RESULT = 2.0**-22
"""Rounding of a sum to fp32, of its scale to fp32 and of their quotient, with room for a fourth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Shapes of heads and where their rows lie."""

    s: int = 37
    b: int = 2
    np: int = 6
    ng: int = 2
    hn: int = 64
    dtype: torch.dtype = torch.bfloat16
    by_row: bool = False
    length: int = 131072
    strided: bool = False

    @property
    def scale(self) -> float:
        """That of the softmax."""
        return 1 / math.sqrt(self.hn)

    @property
    def given(self) -> FoldScale:
        """What both forms count in; no power of two, and no fp32 number."""
        return FoldScale(scale=self.scale, anchor=self.length / 2 + 0.1)


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def heads_of(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return q and k; `strided` ones have sequences first and lie in wider heads."""
    found = []
    for n, count in enumerate((case.np, case.ng)):
        if case.strided:
            wide = drawn((case.b, case.s, count + 1, case.hn + 8), seed + n, case.dtype, device)
            found.append(wide.transpose(0, 1)[:, :, 1:, 8:])
        else:
            found.append(drawn((case.s, case.b, count, case.hn), seed + n, case.dtype, device))
    return found[0], found[1]


def bias_of(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Return slopes, fp32, and centres that no dtype but float64 holds."""
    shape = (case.s, case.b, case.np) if case.by_row else (case.np,)
    slopes = drawn(shape, 5, torch.float32, device).abs().exp() / 64
    places = torch.linspace(0, case.length - 1, case.s * case.b, dtype=torch.float64).view(case.s, case.b)
    return slopes, places.to(device)


def plain(case: Case, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Return what PyTorch alone finds, on the CPU, whose division by a number is a division."""
    query, key, slopes, centre = (each.cpu() for each in tensors)
    return BiasFold(scale=case.given.scale, anchor=case.given.anchor).plain(query.clone(), key.clone(), slopes, centre)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor as integers on the CPU."""
    return tensor.detach().cpu().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check_fold_bits(case: Case, device: str, launch: Any = fold) -> None:
    """Channels written are those that PyTorch writes, in place, and no others."""
    query, key = heads_of(case, device)
    slopes, centre = bias_of(case, device)
    expected = plain(case, query, key, slopes, centre)
    found = launch(query, key, slopes, centre, case.given)
    for ours, right, lies in zip(found, expected, (query, key), strict=True):
        assert ours.data_ptr() == lies.data_ptr()
        assert ours.stride() == lies.stride()
        assert torch.equal(bits(ours), bits(right))
        assert bool(right[..., -SPARE_CHANNELS:-1].any())


def check_slope_gradient(case: Case, device: str, launch: Any = fold) -> None:
    """Gradients of slopes are the exact sums rounded to fp32 and divided, and those of q and k pass unchanged."""
    query, key = heads_of(case, device)
    slopes, centre = bias_of(case, device)
    leaves = [each.requires_grad_() for each in (query.detach().clone(), key.detach().clone(), slopes)]
    upstream = heads_of(case, device, seed=9)
    folded = launch(leaves[0] * 1, leaves[1] * 1, slopes, centre, case.given)
    of_query, of_key, of_slopes = torch.autograd.grad(folded, leaves, upstream)
    assert torch.equal(of_query, upstream[0])
    assert torch.equal(of_key, upstream[1])
    spare = upstream[0][..., -SPARE_CHANNELS:].double().cpu()
    place = (centre.cpu() - case.given.anchor).unsqueeze(-1)
    terms = torch.cat([spare[..., :-1], -place.unsqueeze(-1) * spare[..., -1:]], dim=-1)
    right, size = terms.sum(-1), terms.abs().sum(-1)
    if not case.by_row:
        right, size = right.sum((0, 1)), size.sum((0, 1))
    assert of_slopes.dtype == torch.float32
    assert of_slopes.shape == slopes.shape
    error = (of_slopes.double().cpu() - right / case.scale).abs() * case.scale
    assert bool((error <= FP32_RESULT * right.abs() + FP64_SUM * size).all())


def check_deterministic(case: Case, device: str) -> None:
    """Two runs give the same gradient."""
    found = []
    for _ in range(2):
        query, key = heads_of(case, device)
        slopes, centre = bias_of(case, device)
        folded = fold(query, key, slopes.requires_grad_(), centre, case.given)
        found.append(torch.autograd.grad(folded, slopes, heads_of(case, device, seed=9))[0])
    assert torch.equal(*found)


def check_split_bits(case: Case, device: str, launch: Any = split) -> None:
    """Queries, keys, values and the gradient of the projection are those of PyTorch, to the bit."""
    width = (case.np // case.ng + 2) * case.hn
    mixed = drawn((case.s, case.b, case.ng, width), 3, case.dtype, device)
    if case.strided:
        mixed = drawn((case.b, case.s, case.ng, width), 3, case.dtype, device).transpose(0, 1)
    mixed.requires_grad_()
    upstream = (*heads_of(case, device, seed=9), heads_of(case, device, seed=11)[1])
    results = []
    for form in (launch, plain_split_spare):
        parts = form(mixed, case.hn)
        assert parts[0].is_contiguous()
        assert parts[1].is_contiguous()
        results.append([*parts, *torch.autograd.grad(parts, mixed, upstream)])
    for ours, right in zip(*results, strict=True):
        assert ours.shape == right.shape
        assert torch.equal(bits(ours), bits(right))
    assert results[0][2].untyped_storage().data_ptr() == mixed.untyped_storage().data_ptr()
