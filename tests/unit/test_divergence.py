"""KL divergence over a shared out vocabulary, against PyTorch's in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.model.divergence import divergence, real_columns
from tests.launch import call

ROWS, CONTEXTS = 3, 2
DOUBLE = 1e-12
SINGLE = 50 * torch.finfo(torch.float32).eps
"""For sums of a few dozen fp32 terms of order 1."""


def drawn(vocabulary: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 logits of a student and a teacher, [n, b, vocabulary], and a gradient of the values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, CONTEXTS, vocabulary)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randn(shape[:2], generator=generator, dtype=torch.float64)


def expected(student: Tensor, teacher: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return PyTorch's value [n, b] and gradient of the student."""
    student = student.detach().requires_grad_()
    log_teacher = teacher.log_softmax(dim=-1)
    value = functional.kl_div(student.log_softmax(dim=-1), log_teacher, reduction="none", log_target=True).sum(dim=-1)
    value.backward(gradient)
    assert student.grad is not None
    return value.detach(), student.grad


@given(vocabulary=st.integers(1, 40), seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.1, 3.0, 200.0]))
def test_value_and_gradient_are_pytorchs(vocabulary: int, seed: int, scale: float):
    student, teacher, gradient = drawn(vocabulary, seed, scale)
    value, slope = expected(student, teacher, gradient)
    student.requires_grad_()
    found = divergence(student, teacher, None)
    found.backward(gradient)
    assert student.grad is not None
    torch.testing.assert_close(found.detach(), value, rtol=DOUBLE, atol=DOUBLE * scale)
    torch.testing.assert_close(student.grad, slope, rtol=DOUBLE, atol=DOUBLE * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype):
    student, teacher, gradient = drawn(33, seed=5)
    student, teacher = student.to(dtype), teacher.to(torch.bfloat16)
    value, slope = expected(student.double(), teacher.double(), gradient)
    student.requires_grad_()
    found = divergence(student, teacher, None)
    found.backward(gradient.float())
    assert found.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == dtype
    torch.testing.assert_close(found.detach().double(), value, rtol=SINGLE, atol=SINGLE)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(student.grad.double(), slope, rtol=rounding, atol=SINGLE)


def test_a_step_against_the_gradient_approaches_the_teacher():
    student, teacher, _ = drawn(12, seed=1)
    student.requires_grad_()
    before = divergence(student, teacher, None)
    before.sum().backward()
    assert student.grad is not None
    after = divergence(student.detach() - 0.1 * student.grad, teacher, None)
    assert (before > 0).all()
    assert (after < before).all()


def test_it_is_the_teacher_that_is_imitated():
    """Probability where the teacher has none costs little; none where the teacher has some costs much."""
    teacher = torch.tensor([5.0, 5.0, -5.0, -5.0])
    narrow, wide = torch.tensor([5.0, -5.0, -5.0, -5.0]), torch.tensor([0.0, 0.0, 0.0, 0.0])
    assert divergence(wide, teacher, None) < divergence(narrow, teacher, None)
    assert divergence(teacher, teacher, None) == 0


def test_the_teacher_gets_no_gradient():
    student, teacher, _ = drawn(7, seed=2)
    teacher.requires_grad_()
    divergence(student.requires_grad_(), teacher, None).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_no_rows_are_no_error():
    """What a context-parallel rank without last rows computes, with a gradient that its backward needs."""
    student = torch.zeros(0, CONTEXTS, 8, requires_grad=True)
    value = divergence(student, student.detach(), None)
    value.sum().backward()
    assert value.shape == (0, CONTEXTS)
    assert student.grad is not None


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40))
def test_every_token_id_is_on_one_rank(ranks: int, padded: int, vocabulary: int):
    vocabulary = min(vocabulary, ranks * padded)
    held = [rank * padded + c for rank in range(ranks) for c in range(real_columns(padded, vocabulary, rank))]
    assert held == list(range(vocabulary))


def shared_out(vocabulary: int, padded: int) -> dict[str, Any]:
    """Return value and gradient of this rank's part of a vocabulary."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    student, teacher, gradient = drawn(vocabulary, seed=9)
    first = rank * padded
    own = slice(first, first + real_columns(padded, vocabulary, rank))
    part = student[..., own].clone().requires_grad_()
    value = divergence(part, teacher[..., own], group)
    value.backward(gradient)
    dist.destroy_process_group()
    assert part.grad is not None
    return {"value": value.tolist(), "gradient": part.grad.tolist()}


@pytest.mark.parametrize(("vocabulary", "padded"), [(16, 8), (11, 8), (8, 8), (3, 8)])
def test_two_ranks_share_out_a_vocabulary(tmp_path: Path, vocabulary: int, padded: int):
    """Also where the second holds padding alone."""
    result = call(shared_out, {"vocabulary": vocabulary, "padded": padded}, 2, workdir=tmp_path).check()
    value, slope = expected(*drawn(vocabulary, seed=9))
    gradients = [torch.tensor(each["gradient"], dtype=torch.float64) for each in result.values]
    for each in result.values:
        found = torch.tensor(each["value"], dtype=torch.float64)
        torch.testing.assert_close(found, value, rtol=DOUBLE, atol=DOUBLE)
    gradients = [each.view(ROWS, CONTEXTS, -1) for each in gradients]
    torch.testing.assert_close(torch.cat(gradients, dim=-1), slope, rtol=DOUBLE, atol=DOUBLE)
