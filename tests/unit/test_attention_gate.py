"""The gate of attention's gradients: what bf16 rounds in every backward passes, and faults do not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.benchmarks import attention_oracle as oracle
from scripts.benchmarks.attention_gate import attention_checks
from scripts.benchmarks.gate import VECTORS, vector_error

ROWS, HEADS, GROUPS, WIDTH = 1024, 4, 2, 128
SCALE = 1 / math.sqrt(WIDTH)
SLOPES = (2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8)

KINDS = ("flattened", "tokens")
"""Slopes that take 2 nats at least off the longest distance between gists, as in group E; and, as in group F, ALiBi's
on single tokens, whose queries and keys are normed."""


def given(kind: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = {
        name: torch.randn(ROWS, 1, count, WIDTH, generator=generator).bfloat16()
        for name, count in (("query", HEADS), ("key", GROUPS), ("value", GROUPS), ("upstream", HEADS))
    }
    slopes, apart = torch.tensor(SLOPES, dtype=torch.float64), 1
    if kind == "tokens":
        for name in ("query", "key"):
            wide = heads[name].double()
            heads[name] = (wide * wide.square().mean(-1, keepdim=True).rsqrt()).bfloat16()
    else:
        apart = 8
        slopes = slopes * 512 / (apart * (ROWS - 1))
    centre = (2 * apart * torch.arange(ROWS) + 3_000_000_000)[:, None]
    return {**heads, "slopes": slopes, "doubled_centre": centre}


def emulated(inputs: dict[str, Tensor], rows: Tensor, *, slope: float = 1.0, unseen: int = 0) -> dict[str, Tensor]:
    """Return the output and gradients that a backward with bf16 products finds; `unseen` leaves out the first keys."""
    query, key, value = (inputs[name].double() for name in ("query", "key", "value"))
    upstream = torch.zeros_like(query)
    upstream[rows] = inputs["upstream"].double()[rows]
    key, value = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (key, value))
    place = inputs["doubled_centre"][:, 0].double() / 2
    bias = inputs["slopes"][:, None, None] * slope * (place[None] - place[:, None])
    seen = torch.ones(ROWS, ROWS).tril().bool()
    seen[:, :unseen] &= torch.eye(ROWS, dtype=torch.bool)[:, :unseen]
    scores = torch.einsum("ibhc,jbhc->bhij", query, key) * SCALE + bias
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    out = torch.einsum("bhij,jbhc->ibhc", weights.bfloat16().double(), value).bfloat16().double()
    delta = (upstream * out).sum(-1).permute(1, 2, 0)[..., None]
    inner = torch.einsum("ibhc,jbhc->bhij", upstream, value)
    signal = (weights * (inner - delta)).bfloat16().double()
    by_group = (ROWS, 1, GROUPS, HEADS // GROUPS, WIDTH)
    found = {
        "output": out,
        "d query": torch.einsum("bhij,jbhc->ibhc", signal, key) * SCALE,
        "d key": (torch.einsum("bhij,ibhc->jbhc", signal, query) * SCALE).view(by_group).sum(3),
        "d value": torch.einsum("bhij,ibhc->jbhc", weights.bfloat16().double(), upstream).view(by_group).sum(3),
    }
    rounded = {name: tensor.bfloat16() for name, tensor in found.items()}
    return rounded | {name: rounded[name][rows] for name in ("output", "d query")}


def errors(kind: str, seed: int = 0, swapped: int = 0, **fault: float) -> dict[str, float]:
    """Return the errors, in tolerances, of an emulated backward with a fault; `swapped` gives heads others' slopes."""
    inputs, rule = given(kind, seed), oracle.Rule(scale=SCALE)
    rows = oracle.sample_of(ROWS, 48, torch.device("cpu"))
    expected = oracle.sampled(inputs, rows, inputs["upstream"][rows], rule, ("query", "key", "value"))
    read = inputs | {"slopes": inputs["slopes"].roll(swapped)}
    values = emulated(read, rows, **fault)  # type: ignore[arg-type]
    checks = attention_checks(values, expected, "")
    assert len(checks) == 4
    found = {check.name: check.error / check.tolerance for check in checks}
    return found | {"d key by its length": vector_error(values["d key"], expected["d key"]) / VECTORS}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_bf16_rounds_passes_with_room(kind: str, seed: int):
    found = errors(kind, seed)
    assert found.pop("d key by its length") > 2
    assert max(found.values()) < 0.75
    assert max(found["d query"], found["d key"]) < 0.5


@pytest.mark.parametrize(
    "fault", [{"slope": 1.02}, {"slope": 0.5}, {"unseen": 16}, {"unseen": 128}, {"swapped": 1}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_faults_do_not(kind: str, fault: dict[str, Any]):
    found = errors(kind, **fault)
    assert found["d key"] > 1
    assert max(found["output"], found["d value"]) > 2
