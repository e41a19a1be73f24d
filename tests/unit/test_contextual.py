"""Contextual GRAPE-M: learned steps, and the places that they sum up to."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megacontext_megatron.attention.row_order import ZigzagOrder
from megacontext_megatron.position.contextual import ContextualSteps
from megacontext_megatron.spans.context_parallel import zigzag_rows
from megacontext_megatron.spans.metadata import SpanMetadata
from tests.launch import call
from tests.sums_over_ranks import alone, doubled

HALF = 2.0**-24
ROWS, BATCH, HIDDEN = 16, 2, 6
FIRST_STEP = 1 / (1 + math.exp(-math.log(math.expm1(1e-3)) / 16))


def hidden_rows(dtype=torch.float64, scale=20.0):
    source = torch.Generator().manual_seed(3)
    return (scale * torch.randn(ROWS, BATCH, HIDDEN, generator=source)).to(dtype)


def rows_of(widths, offset=None):
    """Return rows [s, b] of `widths` [s], which tile the history."""
    width = torch.as_tensor(widths).unsqueeze(1).expand(-1, BATCH)
    start = width.cumsum(0) - width
    zeros = torch.zeros_like(start, dtype=torch.int8)
    return SpanMetadata(start=start, width=width.to(torch.int32), level=zeros, modality=zeros, offset=offset)


TOKENS = rows_of([1] * ROWS)
MIXED = rows_of([1024, 32, 32, 1024, 32] + [1] * (ROWS - 5))


def steps(order=None, sum_over_ranks=alone, scale=16.0):
    module = ContextualSteps(HIDDEN, scale, sum_over_ranks, order)
    with torch.no_grad():
        module.weight.add_(torch.linspace(-1.3, 0.7, HIDDEN))
    return module


def definition(hidden, spans, weight, bias, scale=16.0):
    """Return steps and places, [s, b], row by row."""
    found, places = [], []
    for row in range(len(hidden)):
        step = torch.sigmoid(((hidden[row] * weight).sum(-1) + bias) / scale)
        width = spans.width[row].double()
        before = sum(((s * spans.width[n].double()) for n, s in enumerate(found)), torch.zeros(BATCH))
        moved = 0.0 if spans.offset is None else spans.offset[row]
        places.append(before + step * ((width - 1) / 2 + moved))
        found.append(step)
    return torch.stack(found), torch.stack(places)


def place_of(found):
    return found.doubled_centre.double() / 2 + found.offset.double()


def test_every_step_starts_at_0_394():
    module = ContextualSteps(HIDDEN, 16.0, alone)
    assert pytest.approx(0.394, abs=5e-4) == FIRST_STEP
    found = module(hidden_rows(torch.float32), TOKENS)
    np.testing.assert_allclose(found.step.detach().numpy(), FIRST_STEP, rtol=4 * HALF)
    expected = found.step[0, 0].double().item() * np.arange(ROWS)[:, None].repeat(BATCH, 1)
    np.testing.assert_allclose(place_of(found).detach().numpy(), expected, atol=HALF / 4, rtol=0)
    assert not place_of(found)[0].any()


@pytest.mark.parametrize("scale", [16.0, 4.0])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("spans", [TOKENS, MIXED], ids=["tokens", "spans"])
def test_places_are_exclusive_sums_of_steps_and_half_the_own_span(spans, moved, scale):
    if moved:
        source = torch.Generator().manual_seed(4)
        spans = dataclasses.replace(spans, offset=torch.randn(ROWS, BATCH, generator=source).requires_grad_())
    module, hidden = steps(scale=scale), hidden_rows().requires_grad_()
    found = module(hidden, spans)
    weight, bias = (p.detach().double().requires_grad_() for p in (module.weight, module.bias))
    step, place = definition(hidden, spans, weight, bias, scale)
    assert step.max() - step.min() > 0.3
    assert found.doubled_centre.dtype == torch.int64
    assert found.offset.dtype == found.step.dtype == torch.float32
    assert found.offset.abs().max() <= 0.25
    np.testing.assert_allclose(found.step.detach().numpy(), step.detach().numpy(), rtol=1.01 * HALF)
    np.testing.assert_allclose(place_of(found).detach().numpy(), place.detach().numpy(), rtol=1e-14, atol=HALF / 4)
    total = (step * spans.width).sum(0)
    assert (found.anchor - total).abs().max() <= 0.5
    weights = torch.randn(2, ROWS, BATCH, generator=torch.Generator().manual_seed(1))
    inputs = [hidden, *([spans.offset] if moved else [])]
    right = torch.autograd.grad((step * weights[0] + place * weights[1]).sum(), [weight, bias, *inputs])
    (found.step * weights[0] + found.offset * weights[1]).sum().backward()
    for leaf, slope in zip([module.weight, module.bias, *inputs], right, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad.numpy(), slope.numpy(), rtol=1e-5, atol=1e-6 * slope.abs().max().item())
        assert slope.abs().max() > 1e-3


def test_tokens_are_the_authors_exclusive_sum():
    module, hidden = steps(), hidden_rows()
    logit = hidden @ module.weight.detach().double() + module.bias.detach().double()
    omega = torch.sigmoid(logit / 16.0)
    phi = torch.cumsum(omega, dim=0) - omega
    np.testing.assert_allclose(place_of(module(hidden, TOKENS)).detach().numpy(), phi.numpy(), atol=HALF / 4, rtol=0)


def test_far_places_keep_their_digits():
    """In fp32 a place of 2^32 steps would be known to 256 of them."""
    spans = rows_of([2**30] * (ROWS - 4) + [1] * 4)
    module, hidden = steps(), hidden_rows(torch.float32, scale=1.0)
    found = module(hidden, spans)
    between = place_of(found)[-3:] - place_of(found)[-4:-1]
    assert place_of(found)[-4:].min() > 2**32
    np.testing.assert_allclose(between.detach().numpy(), found.step[-4:-1].detach().numpy(), atol=1e-6)


def test_half_precision_rows_are_kept_as_they_are():
    module, hidden = steps(), hidden_rows(torch.bfloat16)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append((x.shape, x.dtype)) or x, lambda x: x), torch.autocast("cpu"):
        found = module(hidden.requires_grad_(), TOKENS)
    assert [dtype for shape, dtype in kept if shape == hidden.shape] == [torch.bfloat16]
    wide = hidden.detach().double() @ module.weight.detach().double() + module.bias.detach().double()
    np.testing.assert_allclose(found.step.detach().numpy(), torch.sigmoid(wide / 16).numpy(), rtol=32 * HALF)
    found.offset.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_product_has_its_gradients():
    module = steps().double()
    hidden = hidden_rows().requires_grad_()
    from megacontext_megatron.position.contextual import _Product

    weight = module.weight.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(_Product.apply, (hidden, weight))


def test_replicas_are_read_through_the_sum_over_ranks():
    found = []
    for sum_over_ranks in (alone, doubled):
        module = steps(sum_over_ranks=sum_over_ranks)
        module(hidden_rows(), TOKENS).offset.sum().backward()
        found.append([p.grad for p in module.parameters()])
    assert all(torch.equal(2 * one, two) for one, two in zip(*found, strict=True))


# Context parallelism


class SharedOut:
    """The zigzag slices of one process: what other ranks hold is given."""

    def __init__(self, size, rank, everything):
        self.rows, self.everything = zigzag_rows(ROWS, size, rank), everything

    def all_rows(self, rows):
        torch.testing.assert_close(rows, self.everything[self.rows], rtol=1e-14, atol=0)
        return self.everything

    def own_rows(self, rows):
        return rows[self.rows]


def slice_of(spans, rows):
    return SpanMetadata(**{f.name: getattr(spans, f.name)[rows] for f in dataclasses.fields(spans)[:4]})


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_count_all_rows_before_theirs(size):
    hidden = hidden_rows()
    whole = steps()(hidden, MIXED)
    logit = hidden @ steps().weight.detach().double() + steps().bias.detach()
    advance = torch.sigmoid(logit / 16.0) * MIXED.width
    for rank in range(size):
        order = SharedOut(size, rank, advance)
        found = steps(order)(hidden[order.rows], slice_of(MIXED, order.rows))
        for name in ("doubled_centre", "offset", "step"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name)[order.rows], rtol=0, atol=HALF / 4)
        assert torch.equal(found.anchor, whole.anchor)
        # Its own rows alone, in its order, would give other places.
        assert not torch.equal(
            steps()(hidden[order.rows], slice_of(MIXED, order.rows)).doubled_centre, found.doubled_centre
        )


def on_two_ranks() -> dict[str, Any]:
    """Return the places and gradients of this context-parallel rank of two."""
    import torch.distributed as dist

    from megacontext_megatron import cpu

    cpu.install()
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    rows = zigzag_rows(ROWS, group.size(), group.rank())
    module, hidden = steps(ZigzagOrder(group)), hidden_rows()[rows].requires_grad_()
    found = module(hidden, slice_of(MIXED, rows))
    (found.offset * weights_of_rows()[rows]).sum().backward()
    assert hidden.grad is not None
    out = {
        "place": place_of(found).tolist(),
        "anchor": found.anchor.tolist(),
        "hidden": hidden.grad.tolist(),
        **{name: p.grad.tolist() for name, p in module.named_parameters() if p.grad is not None},
    }
    dist.destroy_process_group()
    return out


def weights_of_rows():
    return torch.randn(ROWS, BATCH, generator=torch.Generator().manual_seed(7))


def test_ranks_that_exchange_rows_are_one_process(tmp_path: Path):
    module, hidden = steps(), hidden_rows().requires_grad_()
    whole = module(hidden, MIXED)
    (whole.offset * weights_of_rows()).sum().backward()
    assert hidden.grad is not None
    ranks = call(on_two_ranks, {}, ranks=2, workdir=tmp_path).check().values
    for rank, found in enumerate(ranks):
        rows = zigzag_rows(ROWS, 2, rank)
        assert torch.equal(torch.tensor(found["place"], dtype=torch.float64), place_of(whole)[rows])
        assert found["anchor"] == whole.anchor.tolist()
        np.testing.assert_allclose(found["hidden"], hidden.grad[rows].numpy(), rtol=1e-9, atol=1e-9)
    for name, parameter in module.named_parameters():
        # Megatron sums the gradients of context-parallel ranks like those of data-parallel ones.
        total = np.sum([found[name] for found in ranks], axis=0)
        assert parameter.grad is not None
        np.testing.assert_allclose(total, parameter.grad.numpy(), rtol=1e-5, atol=1e-5 * np.abs(total).max())
