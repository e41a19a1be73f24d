"""The span rotary kernels as compiled for the GPU, at the shapes of a training."""

import dataclasses

import pytest
import torch

from megacontext_megatron.kernels import rotary
from megacontext_megatron.kernels.rotary_arguments import RowPlaces
from tests import rotary_checks
from tests.rotary_cases import Case, call, check_against_float64, given_of, incoming

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HEADS = Case(np=32, ng=8, hn=128, sigma=1, anchor=True, spread=300.0)
REAL = dataclasses.replace(HEADS, s=2048, b=2)
MIXED = dataclasses.replace(REAL, mixed=True, dtype=torch.bfloat16)
CASES = [
    REAL,
    dataclasses.replace(REAL, dtype=torch.bfloat16),
    dataclasses.replace(REAL, dtype=torch.float16, interleaved=True, percent=0.5, offset=True, damp_query=False),
    dataclasses.replace(MIXED, norm="plain"),
    dataclasses.replace(MIXED, norm="centred", sigma=8, grouped_frequencies=True, offset=True, interleaved=True),
    Case(s=131, b=3, np=10, ng=2, hn=80, percent=0.5, sigma=2, anchor=True, mixed=True, norm="plain"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_float64_reference(case):
    check_against_float64(case, DEVICE)


def test_no_width_is_width_0_bit_for_bit():
    rotary_checks.check_zero_sigma_is_a_point(HEADS, DEVICE)


def test_cosine_and_sine_are_within_1e_6_of_mpmath():
    rotary_checks.check_precision(10_000, DEVICE)


def test_scores_do_not_know_where_a_sequence_begins():
    rotary_checks.check_scores_do_not_know_where_a_sequence_begins(dataclasses.replace(HEADS, s=512), DEVICE)


def test_what_is_damped_to_nothing_has_gradients():
    rotary_checks.check_huge_widths(HEADS, DEVICE)


@pytest.mark.parametrize("case", [REAL, dataclasses.replace(MIXED, norm="plain")], ids=str)
def test_backward_is_deterministic(case):
    rotary_checks.check_backward_is_deterministic(case, DEVICE)


def test_an_anchor_keeps_the_digits_of_frequencies():
    rotary_checks.check_anchor_keeps_the_digits_of_frequencies(DEVICE)


def test_strides_make_no_difference():
    rotary_checks.check_strides(HEADS, DEVICE)


def test_norm_in_the_kernel_is_torchs():
    rotary_checks.check_norm_is_torchs(dataclasses.replace(MIXED, norm="plain"), DEVICE)


@pytest.mark.parametrize("learnable", ["level", "head"])
def test_fused_module_is_the_plain_one(learnable):
    rotary_checks.check_module(dataclasses.replace(HEADS, s=96), learnable, DEVICE)


def test_more_channels_than_32_bits_count():
    """Rows at the end of four sequences of 131072 are those of a short call, forward and backward."""
    case = dataclasses.replace(HEADS, s=131_072, b=4, dtype=torch.bfloat16)
    few = given_of(dataclasses.replace(case, s=8), DEVICE)
    few.omega.requires_grad_(False)
    assert few.query is not None
    assert few.key is not None
    assert few.sigma is not None
    heads = []
    for x in (few.query, few.key):
        whole = torch.zeros(case.s, *x.shape[1:], device=DEVICE, dtype=x.dtype)
        whole[-8:] = x.detach()
        heads.append(whole.requires_grad_())
    query, key = heads
    assert query.numel() >= 2**31
    centre, sigma = torch.zeros(case.s, case.b, device=DEVICE, dtype=torch.int64), torch.ones(case.s, case.b)
    centre[-8:], sigma = few.centre, sigma.to(DEVICE)
    sigma[-8:] = few.sigma.detach()
    places = RowPlaces(doubled_centre=centre, sigma=sigma.requires_grad_(), anchor=few.anchor)
    outputs = rotary.span_rotary(query, key, places, few.table(), case.options)
    expected = call(rotary, case, few)
    weights = incoming(expected)
    gradients = [torch.zeros_like(x) for x in outputs]
    for whole, part in zip(gradients, weights, strict=True):
        whole[-8:] = part
    found = torch.autograd.grad(outputs, [query, key, sigma], gradients)
    right = torch.autograd.grad(expected, [few.query, few.key, few.sigma], weights)
    assert all(torch.equal(x[-8:], y) for x, y in zip((*outputs, *found), (*expected, *right), strict=True))
    assert not any(x[:-8].any() for x in found)
