"""Rows, heads and biases on which attention kernels are compared with attention's definition in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megacontext_megatron.kernels.linear_bias_attention import LinearBias, Reach, linear_bias_attention

FAR = 3_000_000_000
UNITS = {torch.float32: 128.0, torch.bfloat16: 4.0, torch.float16: 4.0}
"""Of rounding, allowed relative to a tensor's largest element: float32 adds up hundreds of terms, the others round once
what they give and once each weight and gradient that a matrix product reads."""
GISTS = (1_048_576, 32_768, 1024, 1024, 32, 32, 32, 1, 1, 1, 1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: `widths` are those of consecutive spans, repeated until there are sk; `bias` is none, head or row."""

    sq: int = 40
    sk: int = 40
    b: int = 1
    np: int = 2
    ng: int = 1
    hn: int = 16
    dtype: torch.dtype = torch.float32
    bias: str = "head"
    widths: Sequence[int] = (1,)
    first: int = FAR
    look_back: int | None = None
    steepest: float = 0.5
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.hn**-0.5


@dataclasses.dataclass(kw_only=True)
class Given:
    """The tensors of a call, and the gradient of its output."""

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor | None
    doubled_centre: Tensor
    gradient: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """Return what gets gradients, by name."""
        found = {"query": self.query, "key": self.key, "value": self.value, "slopes": self.slopes}
        return {name: x for name, x in found.items() if x is not None}

    def bias(self) -> LinearBias | None:
        return None if self.slopes is None else LinearBias(slopes=self.slopes, doubled_centre=self.doubled_centre)


def doubled_centres(widths: Sequence[int], sk: int, first: int) -> Tensor:
    """Return twice the centres of consecutive spans, int64 [sk], the first of which starts at `first`."""
    width = torch.tensor([widths[i * len(widths) // sk] for i in range(sk)])
    end = 2 * first + 2 * width.cumsum(0)
    return end - width - 1


def given_of(case: Case, device: str = "cpu") -> Given:
    """Return random tensors; queries and keys are RMS-normed, so no |score| exceeds sqrt(hn)."""
    generator = torch.Generator().manual_seed(case.seed)

    def heads(rows: int, count: int, normed: bool = True) -> Tensor:
        x = torch.randn(rows, case.b, count, case.hn, generator=generator)
        x = torch.nn.functional.rms_norm(x, (case.hn,)) if normed else x
        return x.to(device, case.dtype)

    sizes = {"none": (0,), "head": (case.np,), "row": (case.sq, case.b, case.np)}
    decay = torch.rand(sizes[case.bias], generator=generator)
    spread = 2.0 if case.bias == "row" else 8.0
    slopes = (case.steepest * 2.0 ** (-spread * decay)).to(device)
    centre = [doubled_centres(case.widths, case.sk, case.first + 1001 * at) for at in range(case.b)]
    return Given(
        query=heads(case.sq, case.np).requires_grad_(),
        key=heads(case.sk, case.ng).requires_grad_(),
        value=heads(case.sk, case.ng, normed=False).requires_grad_(),
        slopes=None if case.bias == "none" else slopes.requires_grad_(),
        doubled_centre=torch.stack(centre, 1).to(device),
        gradient=heads(case.sq, case.np, normed=False),
    )


def definition(case: Case, leaves: dict[str, Tensor], centre: Tensor) -> Tensor:
    """Return attention in the leaves' dtype, from doubled centres int64: softmax(s - m |mu_q - mu_k|) v, by heads."""
    query, key, value, slopes = (leaves.get(name) for name in ("query", "key", "value", "slopes"))
    assert query is not None
    assert key is not None
    assert value is not None
    row = torch.arange(case.sk - case.sq, case.sk, device=query.device)[:, None]
    behind = row - torch.arange(case.sk, device=query.device)
    hidden = (behind < 0) | (behind > (case.sk if case.look_back is None else case.look_back))
    sequences = []
    for b in range(case.b):
        distance = (centre[case.sk - case.sq :, b, None] - centre[None, :, b]).abs().double() / 2
        heads = []
        for head in range(case.np):
            group = head * case.ng // case.np
            scores = case.scale * query[:, b, head] @ key[:, b, group].T
            if slopes is not None:
                slope = slopes[head] if slopes.dim() == 1 else slopes[:, b, head, None]
                scores = scores - slope * distance
            heads.append(scores.masked_fill(hidden, float("-inf")).softmax(1) @ value[:, b, group])
        sequences.append(torch.stack(heads, 1))
    return torch.stack(sequences, 1)


def expected_of(case: Case, given: Given) -> dict[str, Tensor]:
    """Return the output and the gradients of the definition in float64."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in given.leaves().items()}
    out = definition(case, leaves, given.doubled_centre)
    found = torch.autograd.grad(out, list(leaves.values()), given.gradient.double())
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def found_of(case: Case, given: Given, reach: Reach | None = None) -> dict[str, Tensor]:
    """Return the output and the gradients of the kernels."""
    out = linear_bias_attention(
        given.query, given.key, given.value, case.scale, given.bias(), look_back=case.look_back, reach=reach
    )
    leaves = given.leaves()
    found = torch.autograd.grad(out, list(leaves.values()), given.gradient)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def check(case: Case, found: dict[str, Tensor], expected: dict[str, Tensor], left_out: float = 0.0) -> None:
    """Check found tensors; `left_out` is the share of weights that a reach leaves out.

    What a row gets by attention is a mean of rows, which leaving out w of the weight moves by less than 2 w times the
    largest row; sums over rows and heads are bounded by their largest element, which is a sum of as many.
    """
    unit = torch.finfo(case.dtype).eps / 2
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].shape == right.shape
        # Some gradients are zero as a difference of numbers of about 1.
        bound = (UNITS[case.dtype] * unit + 2 * left_out) * max(1.0, right.abs().max().item())
        error = (found[name].double() - right).abs().max().item()
        assert error <= bound, f"{name} is {error / bound:.3g} times the bound from the definition"


def reach_of(case: Case, device: str = "cpu") -> Reach:
    """Return the reach of normed heads, whose |scores| are at most sqrt(hn) but for rounding."""
    return Reach(score_bound=torch.full((case.np,), 1.01 * case.hn**0.5, device=device))
