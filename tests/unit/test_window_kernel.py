"""The sliding-window attention kernels, run by Triton's interpreter."""

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megacontext_megatron.kernels import window_attention as kernels
from megacontext_megatron.kernels.row_rotation import why_rotation_unsupported
from megacontext_megatron.kernels.window_attention import Tile, Tiles, window_attention
from tests import window_checks
from tests.window_cases import Case, call, check_against_float64, found, given_of

WIDE = Case(np=4, ng=1, b=1, sq=45, sk=45)
"""As wide heads as the GPU serves."""

MIXED = Case(np=6, ng=3, mixed=True)
HALVES = Case(np=4, ng=2, rotary="halves", sigma=1, offset=True)
INTERLEAVED = dataclasses.replace(HALVES, rotary="interleaved")
NARROW = Tile(16, 16, 4, 1)
SMALL = Tiles(NARROW, NARROW, NARROW)
"""Several tiles of few rows, so that the middle of a window is reached."""

CASES = [
    Case(),
    Case(np=8, ng=2, sq=13, sk=40, look_back=31),
    Case(np=3, ng=3, look_back=0),
    Case(np=4, ng=2, look_back=1, sq=1, sk=33),
    Case(np=6, ng=2, look_back=31, sq=33, sk=70, tiles=SMALL),
    Case(np=5, ng=1, look_back=1000, sq=40, sk=40, tiles=SMALL),
    Case(np=2, ng=2, b=1, look_back=127, sq=150, sk=263),
    Case(np=4, ng=1, b=1, look_back=127, sq=197, sk=197),
    Case(np=32, ng=1, b=1, look_back=3, sq=9, sk=17, tiles=SMALL),
    dataclasses.replace(WIDE, hn=64, look_back=31),
    dataclasses.replace(WIDE, hn=128, look_back=31, dtype=torch.bfloat16),
    dataclasses.replace(WIDE, hn=128, rotary="halves", sigma=1, dtype=torch.bfloat16),
    dataclasses.replace(WIDE, hn=64, np=2, rotary="interleaved", sigma=1, dtype=torch.float16),
    MIXED,
    dataclasses.replace(MIXED, rotary="halves", sigma=1, offset=True),
    dataclasses.replace(MIXED, rotary="interleaved", sigma=3, grouped_frequencies=True, percent=0.5),
    HALVES,
    INTERLEAVED,
    dataclasses.replace(HALVES, sq=17, sk=50, damp_query=False),
    dataclasses.replace(HALVES, percent=0.5, sigma=2, grouped_frequencies=True, tiles=SMALL),
    dataclasses.replace(INTERLEAVED, percent=0.4, sigma=0, damp_query=False),
    dataclasses.replace(INTERLEAVED, damp_query=False, sigma=2, offset=False),
    Case(dtype=torch.bfloat16, sq=45, sk=45, look_back=31),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_float64_definition(case):
    check_against_float64(case)


@pytest.mark.parametrize("case", [Case(sq=23, sk=40), Case(np=2, sq=40, look_back=31, tiles=SMALL)], ids=str)
def test_masking_all_tiles_or_those_at_an_edge_is_the_same(case):
    window_checks.check_masks(case)


@pytest.mark.parametrize("fault", ["look_back", "scale", "doubled", "sigma", "damp_query"])
def test_the_comparison_would_tell(fault, monkeypatch):
    """One row more or less, a wrong scale, place, width or damping."""
    real = kernels._WindowAttention.apply

    def faulty(spec, *sources):
        turn = spec.rotation
        places = turn.places
        if fault == "look_back":
            spec = dataclasses.replace(spec, look_back=spec.look_back + 1)
        elif fault == "scale":
            spec = dataclasses.replace(spec, scale=spec.scale * (1 + 1e-4))
        elif fault == "doubled":
            where = torch.arange(len(places.doubled_centre))[:, None] % 2
            places = dataclasses.replace(places, doubled_centre=places.doubled_centre + where)
        elif fault == "sigma":
            places = dataclasses.replace(places, sigma=places.sigma * (1 + 1e-3))
        else:
            turn = dataclasses.replace(turn, options=dataclasses.replace(turn.options, damp_query=False))
        return real(dataclasses.replace(spec, rotation=dataclasses.replace(turn, places=places)), *sources)

    monkeypatch.setattr(kernels._WindowAttention, "apply", faulty)
    with pytest.raises(AssertionError, match="times the bound"):
        check_against_float64(HALVES)


@pytest.mark.parametrize("case", [Case(np=4, ng=2), HALVES], ids=str)
def test_rows_out_of_sight_change_no_bit(case):
    window_checks.check_rows_out_of_sight(case)


@pytest.mark.parametrize("case", [dataclasses.replace(MIXED, rotary="halves", sigma=1), MIXED], ids=str)
def test_a_mixed_projection_is_its_parts_bit_for_bit(case):
    window_checks.check_mixed_is_its_parts(case)


@pytest.mark.parametrize("case", [Case(np=4, ng=2), HALVES], ids=str)
def test_strides_make_no_difference(case):
    window_checks.check_strides(case)


@pytest.mark.parametrize("case", [Case(np=4, ng=2), MIXED, dataclasses.replace(HALVES, mixed=True)], ids=str)
def test_what_is_kept_on_the_host_gives_the_same_gradients(case):
    window_checks.check_what_is_kept_elsewhere(case)


@pytest.mark.parametrize("case", [Case(), Case(np=6, ng=2, sq=23, look_back=31)], ids=str)
def test_rows_of_larger_tensors_are_written_where_they_lie(case):
    window_checks.check_rows_of_larger_tensors(case)


@pytest.mark.parametrize("case", [HALVES, INTERLEAVED, dataclasses.replace(HALVES, damp_query=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_inside_is_the_separate_one(case, dtype):
    """At places that fp32 angles know nothing of."""
    case = dataclasses.replace(case, dtype=dtype, first=2**40, sq=20, sk=20, b=1)
    window_checks.check_rotation_is_the_separate_one(case)


def test_backward_is_deterministic():
    window_checks.check_backward_is_deterministic(HALVES)


def test_keys_that_no_query_sees_get_no_gradient():
    case = Case(sq=5, sk=40, look_back=7)
    _, (_, key, value) = found(case, given_of(case))
    assert not key[:28].any()
    assert not value[:28].any()
    assert value[28:].any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("case", [MIXED, Case(np=4, ng=2), HALVES], ids=str)
def test_no_rows_give_no_rows(case):
    case = dataclasses.replace(case, sq=0, sk=0)
    out, gradients = found(case, given_of(case))
    assert out.shape == (0, case.b, case.np, case.hn)
    assert not any(x.numel() for x in gradients)


def test_no_queries_give_keys_zero_gradients():
    case = Case(sq=0, sk=9)
    _, (_, key, value) = found(case, given_of(case))
    assert not key.any()
    assert not value.any()


def test_second_derivatives_are_refused():
    given = given_of(Case())
    out = call(Case(), given)
    (slope,) = torch.autograd.grad(out.square().sum(), given.heads[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_nothing_is_recorded_without_gradients():
    with torch.no_grad():
        assert not call(Case(), given_of(Case())).requires_grad


def test_queries_are_kept_once_more_where_they_are_rotated():
    """What came in, which holds the values, rotated queries, and what went out."""
    case = dataclasses.replace(MIXED, sq=64, sk=64, rotary="halves", np=24)
    given = given_of(case)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        out = call(case, given)
    assert sum(size >= out.numel() for size in kept) == 3


# Refusals


def test_what_cannot_be_served_is_named():
    def why(heads=4, groups=2, head_dim=128, dtype=torch.bfloat16, *, interpreted=False):
        return kernels.why_unsupported(heads, groups, head_dim, dtype, interpreted=interpreted)

    assert why() is None
    assert why(dtype=torch.float32, head_dim=16, interpreted=True) is None
    for message, answer in {
        "float32": why(dtype=torch.float32),
        "channels": why(head_dim=80),
        "multiple": why(heads=5),
        "up to 128": why(heads=256, groups=1),
    }.items():
        assert answer is not None
        assert message in answer


def test_a_rotation_that_cannot_be_inside_is_named():
    def why(case, *, learns=""):
        given = given_of(case)
        if learns:
            getattr(given, learns).requires_grad_()
        rotation = given.rotation(case)
        assert rotation is not None
        return why_rotation_unsupported(rotation, case.hn, case.ng)

    assert why(HALVES) is None
    assert why(dataclasses.replace(INTERLEAVED, percent=0.4)) is None
    for message, answer in {
        "frequencies": why(HALVES, learns="omega"),
        "widths": why(HALVES, learns="sigma"),
        "offsets": why(HALVES, learns="offset"),
        "opposite channels": why(dataclasses.replace(HALVES, percent=0.4)),
        "rotary pairs": why(dataclasses.replace(HALVES, percent=1.2)),
        "4 widths": why(dataclasses.replace(HALVES, sigma=4)),
    }.items():
        assert answer is not None
        assert message in answer


def test_what_does_not_fit_is_refused():
    given = given_of(HALVES)
    query, key, value = given.heads
    rotation = given.rotation(HALVES)
    assert rotation is not None

    def attend(query=query, key=key, value=value, *, look_back=7, scale=0.25, rotation=rotation):
        return window_attention(query, key, value, look_back, scale, rotation=rotation)

    attend()
    fewer = dataclasses.replace(rotation.places, doubled_centre=given.centre[1:], sigma=None, offset=None)
    wrong = {
        "do not fit one another": lambda: attend(value=value[1:]),
        "values": lambda: attend(query=torch.cat([query, query])),
        "queries are": lambda: attend(key=key.bfloat16()),
        "places": lambda: attend(rotation=dataclasses.replace(rotation, places=fewer)),
        "looks": lambda: attend(look_back=-1),
        "positive": lambda: attend(scale=0.0),
        "no gradient": lambda: window_attention(
            query, key, value, 7, 0.25, rotation=_learning(HALVES, given_of(HALVES))
        ),
        "float64": lambda: attend(query.double(), key.double(), value.double()),
        "heads of 24": lambda: kernels.split_window_attention(torch.ones(2, 1, 1, 50), 24, 7, 0.25),
    }
    for message, asked in wrong.items():
        with pytest.raises(ValueError, match=message):
            asked()


def _learning(case, given):
    given.omega.requires_grad_()
    return given.rotation(case)
