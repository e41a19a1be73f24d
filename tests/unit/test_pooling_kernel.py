"""The slot pooling kernels, run by Triton's interpreter, against float64, and where GistNet uses them."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megacontext_megatron.config import GistConfig
from megacontext_megatron.context.gistnet import SlotPooling, attend
from megacontext_megatron.kernels import pooling
from megacontext_megatron.kernels.pooling import holds, slot_pooling
from megacontext_megatron.model import gpt
from tests import pooling_checks
from tests.pooling_checks import Case, Definition

CASES = [
    Case(),
    Case(n=9, heads=1, hn=8, size=6.0),
    Case(n=3, rows=3, heads=4, hn=5),
    Case(n=1, rows=1, heads=1, hn=1),
    Case(n=2, rows=48, heads=2, hn=24),
    Case(n=4, dtype=torch.bfloat16),
    Case(n=4, heads=3, hn=20, dtype=torch.float16, size=3.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_float64_definition(case):
    pooling_checks.check_against_float64(case)


@pytest.mark.parametrize("per_program", [1, 3])
def test_blocks_of_a_program_are_summed(per_program, monkeypatch):
    monkeypatch.setattr(pooling, "_BLOCKS_OF_A_PROGRAM", per_program)
    pooling_checks.check_against_float64(Case(n=7))


def test_the_comparison_would_tell():
    with pytest.raises(AssertionError, match="times the bound"):
        pooling_checks.check_against_float64(Case(), scale=0.25 * (1 + 1e-4))


def test_the_definition_has_the_gradients_of_its_outputs():
    case = Case(n=2, rows=5, heads=2, hn=3)
    query, mixed, grad = (x.detach().double() for x in case.given())
    leaves = [query.requires_grad_(), mixed.requires_grad_()]
    key, value = mixed.chunk(2, dim=-1)
    pooled = attend(query.expand(2, 1, -1), (key, value), 2).squeeze(1)
    expected, _ = Definition(case, "cpu").results()
    found = (pooled, *torch.autograd.grad(pooled, leaves, grad))
    for name, value in zip(("pooled", "d query", "d mixed"), found, strict=True):
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-12, atol=1e-13)


def test_large_scores_do_not_overflow():
    case = Case(size=1e4)
    found = pooling_checks.found_of(case)
    expected, _ = Definition(case, "cpu").results()
    assert expected["pooled"].isfinite().all()
    torch.testing.assert_close(found["pooled"].double(), expected["pooled"], rtol=1e-2, atol=1e-2)
    assert all(x.isfinite().all() for x in found.values())


def test_backward_is_deterministic():
    pooling_checks.check_backward_is_deterministic(Case(n=9))


def test_no_blocks_are_pooled_to_none():
    found = pooling_checks.found_of(Case(n=0))
    assert found["pooled"].shape == (0, 32)
    assert found["d mixed"].shape == (0, 32, 64)
    assert not found["d query"].any()


def test_second_derivatives_are_refused():
    query, mixed, _ = Case().given()
    pooled = slot_pooling(query, mixed, 2)
    (slope,) = torch.autograd.grad(pooled.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_what_does_not_fit_is_refused():
    query, mixed, _ = Case().given()
    with pytest.raises(ValueError, match="a query"):
        slot_pooling(query[:, :-1], mixed, 2)
    with pytest.raises(ValueError, match="3 heads"):
        slot_pooling(query, mixed, 3)
    with pytest.raises(ValueError, match="bfloat16"):
        slot_pooling(query.bfloat16(), mixed, 2)
    with pytest.raises(ValueError, match="blocks of 2048 rows"):
        slot_pooling(torch.ones(1, 64), torch.ones(1, 2048, 128), 1)


def test_a_head_of_a_block_must_fit_a_program():
    assert holds(32, 64)
    assert holds(32, 128)
    assert holds(512, 64)
    assert not holds(1024, 64)


# GistNet


def refuse(*_: Any) -> Any:
    """Stand for a kernel that must not be called."""
    raise AssertionError("the kernel was called")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_gpu_no_kernel_pools(dtype):
    torch.manual_seed(0)
    module = SlotPooling(16, 4, refuse).to(dtype)
    torch.nn.init.normal_(module.query)
    plain = SlotPooling(16, 4).to(dtype)
    plain.load_state_dict(module.state_dict())
    states = torch.randn(3, 8, 16, dtype=dtype)
    assert torch.equal(module(states), plain(states))


def test_a_module_with_a_kernel_pools_as_one_without(monkeypatch):
    torch.manual_seed(0)
    calls = []

    def kernel(query, mixed, heads):
        calls.append(mixed.shape)
        return slot_pooling(query, mixed, heads)

    module, plain = SlotPooling(16, 4, kernel), SlotPooling(16, 4)
    torch.nn.init.normal_(module.query)
    plain.load_state_dict(module.state_dict())
    # what a GPU in half precision is, said of fp32 on this one
    monkeypatch.setattr("megacontext_megatron.context.gistnet.HALF", (torch.float32,))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    results = []
    for pool in (module, plain):
        states = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        pooled = pool(states)
        results.append((pooled.detach(), *torch.autograd.grad(pooled.square().sum(), [states, *pool.parameters()])))
    assert calls == [(3, 8, 32)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "backend", "block", "expected"),
    [
        ({}, "triton", 32, slot_pooling),
        ({}, "torch", 32, None),
        ({"pooling": "mean"}, "triton", 32, None),
        ({}, "triton", 4096, None),
    ],
)
def test_the_kernel_is_chosen_with_the_backend(changes, backend, block, expected):
    gist = dataclasses.replace(GistConfig(hidden=64, kind="gistnet", pooling="slot"), **changes)
    settings = SimpleNamespace(gist=gist, backend=backend, context=SimpleNamespace(block_size=block))
    assert gpt._slot_kernel(cast(Any, settings)) is expected
