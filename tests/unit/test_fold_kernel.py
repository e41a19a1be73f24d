"""Kernels that split heads and write biases into spare channels, interpreted."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from megacontext_megatron.attention import folded_bias
from megacontext_megatron.attention.folded_bias import BiasFold
from megacontext_megatron.kernels import fold as kernels
from megacontext_megatron.kernels.fold import FoldScale, fold, fold_fits, split
from tests import fold_checks
from tests.fold_checks import Case, bias_of, heads_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these compiled")

CASES = [
    Case(),
    Case(by_row=True),
    Case(strided=True),
    Case(strided=True, by_row=True, dtype=torch.float16, length=4096),
    Case(s=1, b=1, np=1, ng=1, hn=128),
    Case(np=5, ng=5, hn=80, dtype=torch.float32, length=2**31),
    Case(s=300, b=3, np=8, ng=4),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_biases_are_written_as_pytorch_writes_them(case):
    fold_checks.check_fold_bits(case, "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slopes_get_exact_sums(case):
    fold_checks.check_slope_gradient(case, "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_splits_are_those_of_pytorch(case):
    fold_checks.check_split_bits(case, "cpu")


def test_gradients_are_deterministic():
    fold_checks.check_deterministic(CASES[-1], "cpu")


@pytest.mark.parametrize("lines", [1, 2])
def test_partial_sums_of_many_programs_are_added(monkeypatch, lines):
    monkeypatch.setattr(kernels, "_HEADS_OF_A_PROGRAM", 8)
    monkeypatch.setattr(kernels, "_LINES", lines)
    fold_checks.check_slope_gradient(Case(), "cpu")


def shifted(query, key, slopes, centre, given):
    return fold(query, key, slopes, centre, dataclasses.replace(given, anchor=given.anchor + 2.0**-7))


def flattened(query, key, slopes, centre, given):
    return fold(query, key, slopes, centre, dataclasses.replace(given, scale=given.scale * (1 + 2.0**-8)))


def rolled(query, key, slopes, centre, given):
    return fold(query, key, slopes.roll(1, -1), centre, given)


@pytest.mark.parametrize("launch", [shifted, flattened, rolled])
def test_checks_see_other_biases(launch):
    with pytest.raises(AssertionError):
        fold_checks.check_fold_bits(Case(), "cpu", launch)
    with pytest.raises(AssertionError):
        fold_checks.check_slope_gradient(Case(), "cpu", launch)


def test_the_check_of_splits_sees_heads_of_another_group():
    def faulty(mixed, head_dim):
        return split(mixed.roll(1, 2), head_dim)

    with pytest.raises(AssertionError):
        fold_checks.check_split_bits(Case(), "cpu", faulty)


def test_who_saved_what_is_overwritten_hears_of_it():
    query, key = heads_of(Case(), "cpu")
    slopes, centre = bias_of(Case(), "cpu")
    leaf = query.clone().requires_grad_()
    made = leaf * 1
    kept = made.square()
    fold(made, key, slopes, centre, Case().given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_what_does_not_fit_is_refused():
    query, key = heads_of(Case(), "cpu")
    slopes, centre = bias_of(Case(), "cpu")
    wrong = {
        "slopes": [query, key, slopes[1:], centre],
        "type of slopes": [query, key, slopes.double(), centre],
        "centre": [query, key, slopes, centre[1:]],
        "type of centre": [query, key, slopes, centre.float()],
        "gradient": [query, key, slopes, centre.clone().requires_grad_()],
        "types": [query, key.float(), slopes, centre],
        "strides": [query.transpose(0, 3).contiguous().transpose(0, 3), key, slopes, centre],
    }
    assert fold_fits(query, key, slopes, centre)
    for name, (q, k, slope, place) in wrong.items():
        assert not fold_fits(q, k, slope, place), name
        with pytest.raises(ValueError, match="do not fit"):
            fold(q, k, slope, place, FoldScale(scale=1.0, anchor=0.0))
    for mixed, width in ((query[..., 1:], 64), (query.double(), 16), (query, 48), (query, 32)):
        with pytest.raises(ValueError, match="a projection"):
            split(mixed, width)
    with torch.no_grad():
        assert fold_fits(*wrong["gradient"])


@pytest.mark.parametrize(("by_row", "places"), list(itertools.product((False, True), repeat=2)))
def test_the_layer_uses_the_kernels_where_they_run(monkeypatch, by_row, places):
    case = Case(by_row=by_row)
    calls = []
    monkeypatch.setattr(folded_bias, "_fuses", lambda heads: True)
    for name in ("fold", "split"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    query, key = heads_of(case, "cpu")
    slopes, centre = bias_of(case, "cpu")
    expected = fold_checks.plain(case, query, key, slopes, centre)
    found = BiasFold(scale=case.given.scale, anchor=case.given.anchor)(
        query, key, slopes, centre.requires_grad_(places)
    )
    assert calls == ([] if places else ["fold"])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    folded_bias.split_spare(torch.zeros(2, 1, 2, 4 * 64), 64)
    assert calls[-1] == "split"


def test_the_cpu_has_no_use_for_kernels():
    assert not folded_bias._fuses(torch.zeros(1))
