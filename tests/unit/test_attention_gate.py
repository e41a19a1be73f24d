"""The gate of attention's gradients: what bf16 rounds in every backward passes, and faults do not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scripts.benchmarks import attention_oracle as oracle
from scripts.benchmarks.attention_gate import attention_checks

ROWS, HEADS, GROUPS, WIDTH = 384, 4, 2, 64
SCALE = 1 / math.sqrt(WIDTH)
SLOPES = (2.0**-1, 2.0**-3, 2.0**-5, 2.0**-8)


def given(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = {
        name: torch.randn(ROWS, 1, count, WIDTH, generator=generator).bfloat16()
        for name, count in (("query", HEADS), ("key", GROUPS), ("value", GROUPS), ("upstream", HEADS))
    }
    centre = (2 * torch.arange(ROWS) + 3_000_000_000)[:, None]
    return {**heads, "slopes": torch.tensor(SLOPES, dtype=torch.float64), "doubled_centre": centre}


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


def failed(**fault: float) -> set[str]:
    """Return the names of the checks that an emulated backward with a fault does not pass."""
    inputs, rule = given(), oracle.Rule(scale=SCALE)
    rows = oracle.sample_of(ROWS, 48, torch.device("cpu"))
    expected = oracle.sampled(inputs, rows, inputs["upstream"][rows], rule, ("query", "key", "value"))
    checks = attention_checks(emulated(inputs, rows, **fault), expected, "")  # type: ignore[arg-type]
    assert len(checks) == 4
    return {check.name for check in checks if not check.passed}


def test_what_bf16_rounds_passes():
    assert failed() == set()


@pytest.mark.parametrize("fault", [{"slope": 1.02}, {"slope": 0.5}, {"unseen": 16}], ids=str)
def test_faults_do_not(fault: dict[str, float]):
    assert {"d query", "d key"} & failed(**fault)
