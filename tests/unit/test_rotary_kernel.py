"""The span rotary kernels, run by Triton's interpreter, and the plain reference beside them."""

import dataclasses

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megacontext_megatron.config import GaussianRopeConfig, RotaryConfig
from megacontext_megatron.kernels import reference, rotary
from megacontext_megatron.kernels.gaussian import FusedGaussianRotary
from megacontext_megatron.kernels.rotary_arguments import QKNorm, RotaryOptions, RotaryTable, RowPlaces, turn_words
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary
from tests import oracles, rotary_checks
from tests.rotary_cases import Case, call, check_against_float64, given_of, gradients, incoming

WORDS_BITS = 96
WORDS_ERROR = 8
"""In units of 2^-96 turn: six products, each cut off, and what is left out below them."""

MIXED = Case(np=6, ng=3, hn=24, percent=0.5, mixed=True, anchor=True, sigma=1)
CASES = [
    Case(),
    Case(interleaved=True, first=0),
    Case(sigma=1, anchor=True, offset=True),
    Case(sigma=1, anchor=True, offset=True, interleaved=True, damp_query=False),
    Case(sigma=2, anchor=True, damp_query=False, percent=0.5),
    Case(sigma=1, anchor=True, offset=True, grouped_frequencies=True, hn=24, percent=0.5, interleaved=True),
    Case(offset=True, first=-20_000, grouped_frequencies=True),
    Case(s=9, b=1, np=5, ng=1, hn=20, percent=0.3, sigma=1, anchor=True),
    Case(s=1, b=3, np=3, ng=3, hn=6, sigma=3, offset=True, anchor=True),
    Case(s=1, b=1, np=1, ng=1, hn=2, sigma=1, offset=True),
    Case(s=3, np=20, ng=10, hn=4, sigma=10, anchor=True),
    Case(sigma=1, anchor=True, dtype=torch.bfloat16),
    Case(sigma=1, anchor=True, offset=True, dtype=torch.float16, interleaved=True),
    MIXED,
    dataclasses.replace(MIXED, sigma=3, norm="plain", grouped_frequencies=True, offset=True),
    dataclasses.replace(MIXED, norm="centred", interleaved=True, percent=1.0, offset=True),
    dataclasses.replace(MIXED, norm="plain", dtype=torch.bfloat16, damp_query=False, percent=1.0),
]
ALL_GRADIENTS = Case(sigma=2, anchor=True, offset=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_float64_reference(case):
    check_against_float64(case)


@pytest.mark.parametrize("fault", ["doubled", "sigma", "anchor"])
def test_the_comparison_would_tell(fault, monkeypatch):
    """Another place, another width, or counting frequencies' gradients from another place for queries alone."""
    real = rotary._SpanRotary.apply

    def faulty(spec, *args):
        places = spec.places
        if fault == "doubled":
            places = dataclasses.replace(places, doubled_centre=places.doubled_centre + 1)
        elif fault == "anchor":
            places = dataclasses.replace(places, anchor=places.anchor + 1)
        else:
            args = tuple(a * (1 + 1e-4) if a is places.sigma else a for a in args)
        return real(dataclasses.replace(spec, places=places), *args)

    monkeypatch.setattr(rotary._SpanRotary, "apply", faulty)
    with pytest.raises(AssertionError, match="times the bound"):
        check_against_float64(Case(sigma=1, anchor=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_no_width_is_width_0_bit_for_bit(interleaved):
    rotary_checks.check_zero_sigma_is_a_point(Case(interleaved=interleaved))


@pytest.mark.parametrize("base", [10_000, 1_000_000])
def test_cosine_and_sine_are_within_1e_6_of_mpmath(base):
    rotary_checks.check_precision(base)


def test_scores_do_not_know_where_a_sequence_begins():
    rotary_checks.check_scores_do_not_know_where_a_sequence_begins(Case(s=12, sigma=1))


@pytest.mark.parametrize("case", [ALL_GRADIENTS, dataclasses.replace(MIXED, percent=1.0, offset=True, norm="plain")])
def test_what_is_damped_to_nothing_has_gradients(case):
    rotary_checks.check_huge_widths(case)


def test_backward_is_deterministic():
    rotary_checks.check_backward_is_deterministic(ALL_GRADIENTS)


def test_an_anchor_keeps_the_digits_of_frequencies():
    rotary_checks.check_anchor_keeps_the_digits_of_frequencies()


@pytest.mark.parametrize(
    "case",
    [
        ALL_GRADIENTS,
        Case(sigma=2, anchor=True, offset=True, np=2, grouped_frequencies=True),
        Case(s=1, sigma=1),
        Case(s=4, b=1, sigma=1, offset=True),
    ],
    ids=str,
)
def test_strides_make_no_difference(case):
    rotary_checks.check_strides(case)


@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_in_the_kernel_is_torchs(interleaved):
    rotary_checks.check_norm_is_torchs(dataclasses.replace(MIXED, norm="plain", interleaved=interleaved))


@pytest.mark.parametrize("learnable", ["none", "level", "layer", "head"])
@pytest.mark.parametrize("damp_query", [True, False])
def test_fused_module_is_the_plain_one(learnable, damp_query):
    rotary_checks.check_module(Case(s=6, sigma=1, damp_query=damp_query), learnable)


def test_module_refuses_what_the_kernel_does_not_compute():
    for config in (GaussianRopeConfig(phase="megatron"), GaussianRopeConfig(renorm="rms")):
        with pytest.raises(ValueError, match="exact phases"):
            FusedGaussianRotary(config, rotary_frequencies(RotaryConfig(head_dim=8)), False)


def test_module_first_used_in_a_validation_trains():
    case = Case(sigma=1)
    module = rotary_checks.module_of(FusedGaussianRotary, case, "level", "cpu")
    spans, leaves = rotary_checks.rows_of_all_levels(case, "cpu"), given_of(case)
    assert leaves.query is not None
    with torch.inference_mode():
        module(leaves.query, leaves.key, spans)
    query, _ = module(leaves.query, leaves.key, spans)
    query.sum().backward()
    assert leaves.query.grad is not None


# Frequencies in turns


def turns_of(omega):
    """Return omega / (4 pi) modulo 1 in units of 2^-96, rounded down."""
    with mpmath.workprec(400):
        return int(mpmath.floor(mpmath.ldexp(mpmath.mpf(omega) / (4 * mpmath.pi), WORDS_BITS)))


def distance(words, expected):
    """Return the distance modulo one turn of words [3] from an integer."""
    first, second, third = (int(word) % 2**32 for word in words)
    difference = ((first << 64) + (second << 32) + third - expected) % 2**WORDS_BITS
    return min(difference, 2**WORDS_BITS - difference)


@given(st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=8))
@example([0.0, -0.0, 1.0, -1.0, 1e-4, -1e-4, 2.0**-126, -(2.0**-126), 2.0**20])
def test_turns_of_learned_frequencies_are_mpmaths(omega):
    stored = torch.tensor([omega], dtype=torch.float32)
    words = turn_words(stored)
    assert words.dtype == torch.int32
    assert words.shape == (3, *stored.shape)
    for at, value in enumerate(stored[0].tolist()):
        assert distance(words[:, 0, at], turns_of(value)) <= WORDS_ERROR


@pytest.mark.parametrize("base", [10_000, 1_000_000])
def test_fixed_and_learned_tables_agree(base):
    fixed = RotaryTable.fixed(rotary_frequencies(RotaryConfig(head_dim=128, base=base)))
    learned = RotaryTable.learned(fixed.omega)
    assert fixed.words.shape == learned.words.shape == (3, 1, 64)
    for at, omega in enumerate(fixed.omega[0].tolist()):
        # A fixed table comes from 64 and 53 bits, whose last is below 2^-96 turn here.
        assert distance(fixed.words[:, 0, at], turns_of(omega)) <= 1
        assert distance(learned.words[:, 0, at], turns_of(omega)) <= WORDS_ERROR


# The reference


@pytest.mark.parametrize("case", [Case(), Case(interleaved=True, percent=0.5), Case(damp_query=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_bit_equal_to_the_module(case, dtype):
    case = dataclasses.replace(case, s=6, dtype=dtype)
    module = rotary_checks.module_of(GaussianRotary, case, "none", "cpu")
    spans, leaves = rotary_checks.rows_of_all_levels(case, "cpu"), given_of(case)
    leaves.omega.requires_grad_(False)
    leaves.centre, leaves.sigma = spans.doubled_centre, module.sigma(spans)
    found, expected = call(reference, case, leaves), module(leaves.query, leaves.key, spans)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "case",
    [
        Case(sigma=1, offset=True, first=0),
        Case(sigma=2, offset=True, first=0, interleaved=True, percent=0.5, grouped_frequencies=True, damp_query=False),
    ],
    ids=str,
)
def test_reference_is_the_definition_in_float64(case):
    leaves = given_of(case).wide()
    query, key = (x.detach() for x in call(reference, case, leaves))
    assert leaves.offset is not None
    assert leaves.sigma is not None
    mu = (leaves.centre.double() / 2 + leaves.offset.detach())[..., None, None].numpy()
    sigma = leaves.sigma.detach().reshape(case.s, case.b, -1, 1).numpy()
    omega = leaves.omega.detach().numpy()
    damped = oracles.normal_expectation(omega, mu, sigma)
    turned = damped if case.damp_query else oracles.normal_expectation(omega, mu, 0.0)
    for found, source, factors in ((query, leaves.query, turned), (key, leaves.key, damped)):
        assert source is not None
        factors = np.repeat(factors, source.shape[2] // factors.shape[2], axis=2)
        expected = oracles.multiplied(source.detach().numpy(), factors, interleaved=case.interleaved)
        # The definition's angle of up to 2^14 radians is rounded to float64 before its cosine.
        assert np.abs(found.numpy() - expected).max() <= 2.0**14 * 4 * np.finfo(np.float64).eps * np.abs(expected).max()


def test_reference_has_the_gradients_of_its_outputs():
    case = Case(s=2, b=1, np=2, ng=2, hn=6, percent=0.7, sigma=2, offset=True, grouped_frequencies=True, first=0)
    leaves = given_of(dataclasses.replace(case, spread=2.0)).wide()
    names = [name for name in leaves.leaves() if name != "omega"]

    def finished(*values):
        return tuple(call(reference, case, dataclasses.replace(leaves, **dict(zip(names, values, strict=True)))))

    assert torch.autograd.gradcheck(finished, [leaves.leaves()[name] for name in names])


def test_references_gradient_of_frequencies_is_that_of_the_definition():
    case = Case(s=3, b=1, np=1, ng=1, hn=4, sigma=1, offset=True, first=0)
    leaves = given_of(case).wide()
    outputs = call(reference, case, leaves)
    weights = [w.double() for w in incoming(outputs)]
    found = gradients(outputs, leaves, weights)["omega"]
    omega = leaves.omega.detach().requires_grad_()
    assert leaves.offset is not None
    assert leaves.sigma is not None
    angle = (leaves.centre / 2 + leaves.offset)[..., None, None] * omega
    damp = torch.exp(-((leaves.sigma[..., None, None] * omega) ** 2) / 2)
    total = torch.zeros((), dtype=torch.float64)
    for x, weight in zip((leaves.query, leaves.key), weights, strict=True):
        assert x is not None
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(damp, angle)
        total = total + (turned.real * weight[..., :2] + turned.imag * weight[..., 2:]).sum()
    assert torch.allclose(found, torch.autograd.grad(total, omega)[0], rtol=1e-9, atol=0)


# Autograd


def test_second_derivatives_are_refused():
    case = Case(sigma=1)
    leaves = given_of(case)
    assert leaves.query is not None
    query, _ = call(rotary, case, leaves)
    (slope,) = torch.autograd.grad(query.square().sum(), leaves.query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_an_output_without_gradient_gives_none_of_its_own():
    case = dataclasses.replace(MIXED, norm="plain", percent=1.0)
    leaves = given_of(case)
    query, key, value = call(rotary, case, leaves)
    alone = gradients([query], leaves, [torch.ones_like(query)])
    query, key, value = call(rotary, case, leaves)
    whole = gradients([query, key, value], leaves, [torch.ones_like(query), *map(torch.zeros_like, (key, value))])
    assert all(torch.equal(whole[name], alone[name]) for name in whole)
    assert not alone["key_weight"].any()


@pytest.mark.parametrize("wanted", ["omega", "sigma", "offset", "query", "key"])
def test_one_leaf_alone_gets_its_gradient(wanted):
    leaves = given_of(ALL_GRADIENTS)
    outputs = call(rotary, ALL_GRADIENTS, leaves)
    whole = gradients(outputs, leaves, incoming(outputs))
    for name, leaf in leaves.leaves().items():
        leaf.requires_grad_(name == wanted)
    outputs = call(rotary, ALL_GRADIENTS, leaves)
    (alone,) = torch.autograd.grad(outputs, leaves.leaves()[wanted], incoming(outputs))
    # How many rows a program sums at once depends on what is asked for.
    assert torch.allclose(alone, whole[wanted], rtol=1e-5, atol=1e-5 * whole[wanted].abs().max().item())


def test_nothing_is_recorded_without_gradients():
    leaves = given_of(ALL_GRADIENTS)
    with torch.no_grad():
        assert not any(x.requires_grad for x in call(rotary, ALL_GRADIENTS, leaves))


def test_recomputation_changes_no_bit():
    leaves = given_of(ALL_GRADIENTS)
    outputs = call(rotary, ALL_GRADIENTS, leaves)
    again = checkpoint(lambda: tuple(call(rotary, ALL_GRADIENTS, leaves)), use_reentrant=False)
    assert isinstance(again, tuple)
    weights = incoming(outputs)
    found, right = (gradients(x, leaves, weights) for x in (again, outputs))
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_rotation_alone_keeps_neither_queries_nor_keys():
    """Only gradients of places and frequencies need what came out, and only norms what went in."""
    case = Case(s=64, hn=32, sigma=1)
    for learns, fewest in ((False, 0), (True, 2)):
        leaves = given_of(case)
        leaves.omega.requires_grad_(learns)
        assert leaves.sigma is not None
        leaves.sigma.requires_grad_(False)
        kept = []
        with saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            outputs = call(rotary, case, leaves)
        assert sum(size >= outputs[1].numel() for size in kept) == fewest


def test_no_rows_give_no_rows():
    case = Case(s=0, sigma=1, anchor=True)
    leaves = given_of(case)
    outputs = call(rotary, case, leaves)
    found = gradients(outputs, leaves, incoming(outputs))
    assert outputs[0].shape == (0, case.b, case.np, case.hn)
    assert not found["omega"].any()


# Refusals


def test_what_does_not_fit_is_refused():
    case = Case(np=8, ng=4, hn=16)
    leaves = given_of(case)
    query, key = leaves.query, leaves.key
    assert query is not None
    assert key is not None
    places, table = leaves.places(), leaves.table()

    def rotate(query=query, key=key, places=places, table=table):
        return rotary.span_rotary(query, key, places, table, RotaryOptions())

    rotate()
    wrong = {
        "doubled centres": lambda: RowPlaces(doubled_centre=leaves.centre.float()),
        "sigma": lambda: RowPlaces(doubled_centre=leaves.centre, sigma=torch.ones(case.b, case.s)),
        "offset": lambda: RowPlaces(doubled_centre=leaves.centre, offset=torch.ones(case.s, case.b, 1)),
        "anchor": lambda: RowPlaces(doubled_centre=leaves.centre, anchor=torch.ones(case.s)),
        "with words": lambda: RotaryTable(omega=leaves.omega, words=leaves.words.repeat(1, 2, 1)),
        "frequencies": lambda: RotaryTable.learned(leaves.omega[0]),
        "widths": lambda: rotate(places=dataclasses.replace(places, sigma=torch.ones(case.s, case.b, case.np))),
        "2 sets": lambda: rotate(table=RotaryTable.learned(leaves.omega.repeat(2, 1))),
        "rows": lambda: rotate(places=RowPlaces(doubled_centre=leaves.centre.mT)),
        "rotary pairs": lambda: rotate(table=RotaryTable.learned(torch.ones(1, 9))),
        "0 rotary pairs": lambda: rotate(table=RotaryTable.learned(torch.ones(1, 0))),
        "bfloat16": lambda: rotate(key=key.bfloat16()),
    }
    for message, asked in wrong.items():
        with pytest.raises(ValueError, match=message):
            asked()


def test_a_projection_of_other_heads_is_refused():
    leaves = given_of(MIXED)
    assert leaves.mixed is not None
    norm = QKNorm(query_weight=torch.ones(7), key_weight=torch.ones(7), eps=1e-5)
    with pytest.raises(ValueError, match="heads of 23"):
        rotary.split_span_rotary(leaves.mixed, 23, leaves.places(), leaves.table(), MIXED.options)
    with pytest.raises(ValueError, match="norms"):
        rotary.split_span_rotary(leaves.mixed, MIXED.hn, leaves.places(), leaves.table(), MIXED.options, norm=norm)
