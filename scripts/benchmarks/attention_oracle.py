"""Attention in float64 from its definition, with gradients by autograd: whole windows, and samples of queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.benchmarks.oracle import Tensors, rotated

CHUNK = 512
"""Queries that are computed at a time in a window."""

HEADS = ("query", "key", "value")
PARTS = {"d query": "parts of d query", "d key": "parts of d key"}
"""Lengths of two sums whose difference is in a gradient: scale |do| |out| |mean key| of each query, [n, b, np], and the
sum of scale weight |do| |out| |query| over the queries that see a key, [m, b, ng]."""

_PLACES = ("doubled_centre", "sigma", "offset")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What scores are: scale q.k; with `look_back`, of the row itself and so many before it alone."""

    scale: float
    look_back: int | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q.k + bias) v, [n, b, np, hn], for q [n, b, np, hn], k and v [m, b, ng, hn].

    `bias` is [b or 1, np or 1, n, m], -inf where a query must not see a key.
    """
    groups = key.shape[2]
    heads = query.unflatten(2, (groups, -1))
    scores = torch.einsum("ibgrc,jbgc->bgrij", heads, key).flatten(1, 2) * scale + bias
    weights = scores.softmax(-1).unflatten(1, (groups, -1))
    return torch.einsum("bgrij,jbgc->ibgrc", weights, value).flatten(2, 3)


def parts_of_query(heads: Mapping[str, Tensor], out: Tensor, upstream: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return PARTS for q, k, an output of the softmax of their scores and its gradient."""
    with torch.no_grad():
        mean_key = attend(heads["query"], heads["key"], heads["key"], bias, scale)
    return scale * upstream.double().norm(dim=-1) * out.detach().norm(dim=-1) * mean_key.norm(dim=-1)


def parts_of_key(heads: Mapping[str, Tensor], out: Tensor, upstream: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return PARTS for the keys, whose weights in a sum over queries are those of values."""
    lengths = upstream.double().norm(dim=-1) * out.detach().norm(dim=-1) * heads["query"].detach().norm(dim=-1)
    ones = torch.ones_like(heads["key"][..., :1].detach()).requires_grad_()
    query, key = heads["query"].detach(), heads["key"].detach()
    with torch.enable_grad():
        [found] = torch.autograd.grad(attend(query, key, ones, bias, scale), [ones], lengths.unsqueeze(-1))
    return scale * found.squeeze(-1)


def hidden_keys(rows: Tensor, columns: Tensor, look_back: int | None) -> Tensor:
    """Return 0 where row i of `rows` sees row j of `columns` and -inf elsewhere, float64 [n, m]."""
    apart = rows[:, None] - columns
    seen = (apart >= 0) if look_back is None else (apart >= 0) & (apart <= look_back)
    return torch.zeros(seen.shape, dtype=torch.float64, device=rows.device).masked_fill(~seen, float("-inf"))


def windowed(given: Mapping[str, Tensor], upstream: Tensor, rule: Rule) -> Tensors:
    """Return `output`, `d query`, `d key`, `d value` and PARTS of attention in a window, CHUNK queries at a time.

    Queries and keys are rotated first where `given` holds what oracle.rotated reads.
    """
    assert rule.look_back is not None
    totals = {f"d {name}": torch.zeros_like(given[name], dtype=torch.float64) for name in HEADS}
    totals[PARTS["d key"]] = torch.zeros(given["key"].shape[:3], dtype=torch.float64, device=upstream.device)
    outputs, parts = [], []
    for start in range(0, len(upstream), CHUNK):
        end, first = min(start + CHUNK, len(upstream)), max(0, start - rule.look_back)
        spans = {"query": slice(start, end), "key": slice(first, end), "value": slice(first, end)}
        leaves = {name: given[name][rows].detach().double().requires_grad_() for name, rows in spans.items()}
        turned = {name: _turned(leaves[name], given, spans[name]) for name in ("query", "key")}
        places = torch.arange(first, end, device=upstream.device)
        bias = hidden_keys(places[start - first :], places, rule.look_back)[None, None]
        out = attend(turned["query"], turned["key"], leaves["value"], bias, rule.scale)
        gradients = torch.autograd.grad(out, list(leaves.values()), upstream[start:end].double())
        for name, gradient in zip(leaves, gradients, strict=True):
            totals[f"d {name}"][spans[name]] += gradient
        outputs.append(out.detach())
        known = turned, out, upstream[start:end], bias, rule.scale
        parts.append(parts_of_query(*known))
        totals[PARTS["d key"]][spans["key"]] += parts_of_key(*known)
    return {"output": torch.cat(outputs), PARTS["d query"]: torch.cat(parts), **totals}


def _turned(heads: Tensor, given: Mapping[str, Tensor], rows: slice) -> Tensor:
    if "omega" not in given:
        return heads
    return rotated(heads, {name: t[rows] if name in _PLACES else t for name, t in given.items()})


def mixed_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return `d query`, `d key` and `d value` as the gradient of Megatron's mixed projection [s, b, ng, ...]."""
    query, key, value = (gradients[f"d {name}"] for name in HEADS)
    return torch.cat([query.unflatten(2, (key.shape[2], -1)).flatten(3), key, value], dim=-1)


def sampled(
    given: Mapping[str, Tensor],
    rows: Tensor,
    upstream: Tensor,
    rule: Rule,
    wanted: Sequence[str] = (),
) -> Tensors:
    """Return `output` [n, b, np, hn] of the queries `rows` (int64 [n]) against all keys, and gradients of the `wanted`.

    `slopes` [np] and `doubled_centre` [s, b], where given, add slope (mu_k - mu_q) to scores.  `upstream` is the
    gradient of those n outputs alone; `d query` is that of the n queries.  PARTS are beside the gradients.
    """
    names = (*HEADS, *(["slopes"] if "slopes" in given else []))
    leaves = {n: (given[n][rows] if n == "query" else given[n]).detach().double() for n in names}
    asked = [leaves[name].requires_grad_() for name in wanted]
    columns = torch.arange(len(given["key"]), device=rows.device)
    bias = hidden_keys(rows, columns, rule.look_back)[None, None]
    if "slopes" in given:
        centre = given["doubled_centre"]
        apart = (centre[None] - centre[rows][:, None]).double() / 2
        bias = bias + leaves["slopes"][:, None, None] * apart.permute(2, 0, 1).unsqueeze(1)
    out = attend(leaves["query"], leaves["key"], leaves["value"], bias, rule.scale)
    gradients = torch.autograd.grad(out, asked, upstream.double()) if asked else ()
    found = {"output": out.detach(), **{f"d {n}": g for n, g in zip(wanted, gradients, strict=True)}}
    for name, parts in (("d query", parts_of_query), ("d key", parts_of_key)):
        if name in found:
            found[PARTS[name]] = parts(leaves, out, upstream, bias.detach(), rule.scale)
    return found


def sample_of(count: int, size: int, device: torch.device) -> Tensor:
    """Return up to `size` of `count` rows, int64, spread evenly, with the first and the last among them."""
    return torch.linspace(0, count - 1, min(size, count), device=device).round().long()
