"""Appends to a paged cache and slot pooling as compiled for the GPU, at the shapes of a model."""

import dataclasses

import pytest
import torch

from megacontext_megatron.context.gistnet import SlotPooling
from megacontext_megatron.kernels import kv_append
from megacontext_megatron.kernels.kv_append import NewRows, PagedCache
from megacontext_megatron.kernels.pooling import slot_pooling
from tests import append_checks, pooling_checks
from tests.append_checks import Setting
from tests.rotary_cases import Case

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HEADS = Case(s=96, b=2, np=32, ng=8, hn=128, sigma=1, spread=300.0, dtype=torch.bfloat16)
MANY = dataclasses.replace(HEADS, s=2048)
CASES = [
    HEADS,
    MANY,
    dataclasses.replace(HEADS, s=1, b=1, sigma=0),
    dataclasses.replace(HEADS, norm="plain"),
    dataclasses.replace(MANY, norm="centred", interleaved=True, offset=True),
    dataclasses.replace(HEADS, sigma=8, grouped_frequencies=True, norm="plain", dtype=torch.float16),
    dataclasses.replace(MANY, sigma=8, grouped_frequencies=True, percent=0.5, damp_query=False),
    Case(s=131, b=3, np=10, ng=10, hn=80, percent=0.5, sigma=1, norm="plain"),
]
POOLING = pooling_checks.Case(n=300, heads=8, hn=64, dtype=torch.bfloat16)


# Appends


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_stored_is_what_the_separate_launch_finds(case):
    append_checks.check_bits(Setting.of(case, DEVICE))


def test_rows_are_rotated_as_the_carrier_says():
    append_checks.check_bits(Setting.of(HEADS, DEVICE, carried=True, shifted=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_those_of_the_definition(interleaved):
    case = dataclasses.replace(HEADS, dtype=torch.float32, interleaved=interleaved, first=0)
    append_checks.check_definition(case, DEVICE)


@pytest.mark.parametrize("norm", ["", "plain"])
def test_sharing_heads_out_changes_nothing(norm, monkeypatch):
    case = dataclasses.replace(HEADS, norm=norm)
    append_checks.check_forms_agree(case, DEVICE, lambda rows: monkeypatch.setattr(kv_append, "SPLIT_ROWS", rows))


@pytest.mark.parametrize("case", [HEADS, MANY], ids=str)
def test_keys_and_values_may_come_alone(case):
    append_checks.check_keys_alone(case, DEVICE)


def test_an_edit_overwrites_rows_in_place():
    append_checks.check_edit(HEADS, DEVICE)


@pytest.mark.parametrize("case", [HEADS, MANY], ids=str)
def test_rows_without_a_line_are_not_stored(case):
    append_checks.check_what_is_not_stored(case, DEVICE)


def test_a_graph_appends_what_its_inputs_then_hold():
    """One graph serves any rows, places, numbers and pages: what changes lies on the device."""
    seen, fresh = Setting.of(HEADS, DEVICE, carried=True), Setting.of(HEADS, DEVICE, carried=True)
    seen.append()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = seen.append()
    for setting in (seen, fresh):
        assert setting.given.mixed is not None
        setting.given.mixed.data.copy_(setting.given.mixed.flip(0))
        rows = setting.rows
        rows.carrier.copy_(rows.carrier.flip(0))
        rows.index.copy_(torch.where(rows.index % 5 == 0, -1, rows.index.flip(1)))
        rows.page_table.copy_(rows.page_table.flip(1))
    before = seen.held()
    for held, changed in zip(append_checks.tensors_of(fresh.cache), before, strict=True):
        held.copy_(changed)
    graph.replay()
    assert torch.equal(query, fresh.append())
    assert all(map(torch.equal, seen.held(), fresh.held()))
    assert not all(map(torch.equal, seen.held(), before))


def test_no_append_waits_for_the_device():
    setting = Setting.of(HEADS, DEVICE)
    setting.append()
    torch.cuda.set_sync_debug_mode("error")
    try:
        setting.append()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cache_may_hold_more_channels_than_32_bits_count():
    setting = Setting.of(HEADS, DEVICE)
    pages = 2**31 // (32 * 8 * 128) + 8
    key = torch.zeros(pages, 32, 8, 128, device=DEVICE, dtype=torch.bfloat16)
    spans = torch.zeros(pages, 32 * kv_append.SPAN_BYTES, device=DEVICE, dtype=torch.uint8)
    small = setting.cache
    setting.append()
    page, line = setting.lines()
    kept = small.key[page, line].clone()
    table = setting.rows.page_table + (pages - len(small.key))
    setting.cache = PagedCache(key=key, value=torch.empty_like(key), spans=spans)
    setting.append(page_table=table)
    assert int(table.max()) * 32 * 8 * 128 >= 2**31
    assert torch.equal(key[page + pages - len(small.key), line], kept)
    assert not key[: pages - len(small.key)].any()
    assert isinstance(setting.rows, NewRows)


# Slot pooling


@pytest.mark.parametrize(
    "case",
    [
        POOLING,
        dataclasses.replace(POOLING, hn=128, size=4.0),
        dataclasses.replace(POOLING, dtype=torch.float16, rows=48, hn=80, heads=3),
        dataclasses.replace(POOLING, dtype=torch.float32, n=33),
        dataclasses.replace(POOLING, n=5, rows=512),
    ],
    ids=str,
)
def test_pooling_is_the_float64_definition(case):
    pooling_checks.check_against_float64(case, DEVICE)


def test_pooling_backward_is_deterministic():
    pooling_checks.check_backward_is_deterministic(dataclasses.replace(POOLING, n=5000), DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gistnet_pools_by_the_kernel_as_without_it(dtype):
    """Both are within rounding of the same module in float64, the kernel no farther than PyTorch."""
    torch.manual_seed(0)
    exact = SlotPooling(512, 8).double().to(DEVICE)
    torch.nn.init.normal_(exact.query)
    exact.to(dtype).double()
    states = torch.randn(600, 32, 512, device=DEVICE, dtype=dtype)
    weights = torch.randn(600, 512, device=DEVICE, dtype=dtype)
    results = []
    for kernel in (None, slot_pooling):
        module = SlotPooling(512, 8, kernel).to(DEVICE, dtype)
        module.load_state_dict(exact.state_dict())
        results.append(_passes(module, states, weights))
    right = _passes(exact, states.double(), weights.double())
    for plain, ours, expected in zip(*results, right, strict=True):
        errors = [(x.double() - expected).norm() / expected.norm() for x in (plain, ours)]
        assert errors[1] <= 1.05 * errors[0], errors
        assert errors[1] <= 4 * torch.finfo(dtype).eps, errors


def _passes(module, states, weights):
    states = states.detach().requires_grad_()
    pooled = module(states)
    return [pooled.detach(), *torch.autograd.grad(pooled, [states, *module.parameters()], weights)]


def test_more_elements_than_32_bits_count_are_pooled():
    """The last blocks of 2^31 elements are those of a short call, forward and backward."""
    case = dataclasses.replace(POOLING, n=8)
    query, few, grad = case.given(DEVICE)
    blocks = 2**31 // few[0].numel() + 8
    many = torch.zeros(blocks, *few.shape[1:], device=DEVICE, dtype=few.dtype)
    many[-8:] = few.detach()
    many.requires_grad_()
    weights = torch.zeros(blocks, grad.shape[1], device=DEVICE, dtype=few.dtype)
    weights[-8:] = grad
    pooled, expected = slot_pooling(query, many, case.heads), slot_pooling(query, few, case.heads)
    (found,) = torch.autograd.grad(pooled, many, weights)
    (right,) = torch.autograd.grad(expected, few, grad)
    assert torch.equal(pooled[-8:], expected)
    assert torch.equal(found[-8:], right)
    assert not found[:-8].any()
