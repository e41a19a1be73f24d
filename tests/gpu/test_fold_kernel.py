"""Kernels that split heads and write biases into spare channels, as compiled for the GPU, at the shapes of a model."""

import dataclasses

import pytest
import torch

from megacontext_megatron.attention.folded_bias import BiasFold, split_spare
from tests import fold_checks
from tests.fold_checks import Case, bias_of, heads_of

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MODEL = Case(s=2048, b=2, np=32, ng=8, hn=128)
CASES = [
    MODEL,
    dataclasses.replace(MODEL, by_row=True),
    dataclasses.replace(MODEL, strided=True),
    dataclasses.replace(MODEL, strided=True, by_row=True, dtype=torch.float16, length=4096),
    dataclasses.replace(MODEL, s=131, b=3, np=10, ng=10, hn=80, length=2**31),
    dataclasses.replace(MODEL, hn=64, dtype=torch.float32),
    Case(s=1, b=1, np=1, ng=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_biases_are_written_as_pytorch_writes_them(case):
    fold_checks.check_fold_bits(case, DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slopes_get_exact_sums(case):
    fold_checks.check_slope_gradient(case, DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_splits_are_those_of_pytorch(case):
    fold_checks.check_split_bits(case, DEVICE)


def test_gradients_are_deterministic():
    fold_checks.check_deterministic(MODEL, DEVICE)


def launches(call) -> list[str]:
    """Return the names of the kernels that a second call runs."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() or () if "CUDA" in str(event.device_type)]


def test_a_layer_takes_one_launch_for_each():
    query, key = heads_of(MODEL, DEVICE)
    slopes, centre = bias_of(MODEL, DEVICE)
    slopes.requires_grad_()
    upstream = heads_of(MODEL, DEVICE, seed=9)
    layer = BiasFold(scale=MODEL.scale, anchor=MODEL.given.anchor)
    assert launches(lambda: layer(query, key, slopes, centre)) == ["fold_forward"]
    folded = layer(query, key, slopes, centre)
    backward = launches(lambda: torch.autograd.grad(folded, slopes, upstream, retain_graph=True))
    assert backward == ["fold_backward", "sum_slopes"]
    mixed = torch.zeros(64, 2, 8, 6 * 128, dtype=torch.bfloat16, device=DEVICE)
    assert launches(lambda: split_spare(mixed, 128)) == ["split_forward"]
