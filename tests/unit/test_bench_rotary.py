"""The rotary benchmarks: bytes, gates that catch wrong kernels, peers that do the same job, precision."""

import dataclasses
import importlib.util
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megacontext_megatron.kernels import reference
from scripts.benchmarks import (
    oracle,
    peers,
    precision,
    results,
    rotary_backward,
    rotary_forward,
    split_norm,
)
from scripts.benchmarks.gate import GateFailed, require, sum_error, vector_error
from scripts.benchmarks.inputs import SHAPES, Inputs, Shape
from scripts.benchmarks.ours import EPS, Rotary

CPU = torch.device("cpu")
SMALL = Inputs(shape=Shape(rows=24, batch=2, query_heads=4, groups=2, head_dim=16), device=CPU)
REFERENCE = Rotary.reference()
Q_K, POSITIONS, PER_GROUP = rotary_backward.MODES


# bytes


def test_bytes_are_those_of_the_design():
    assert [round(shape.qk_bytes / 1e6, 1) for shape in SHAPES] == [41.9, 167.8, 335.5]
    floors = [[results.floor_microseconds(n * shape.qk_bytes) for shape in SHAPES] for n in (2, 3)]
    assert floors[0] == pytest.approx([19.5, 78.0, 156.0], rel=2e-3)
    assert floors[1] == pytest.approx([29.3, 117.0, 234.0], rel=2e-3)


def test_floors_count_every_tensor_once():
    heads = {name: t.numel() * 2 for name, t in {"q": SMALL.query, "k": SMALL.key, "mixed": SMALL.mixed}.items()}
    n = heads["q"] + heads["k"]
    turns = rotary_forward.Turns.present()
    assert rotary_forward.case(REFERENCE, SMALL, turns).floor_bytes == 2 * n
    for mode, alone, passes in [(Q_K, True, 2), (Q_K, False, 4), (POSITIONS, True, 3), (PER_GROUP, False, 5)]:
        race = rotary_backward.Race(REFERENCE, SMALL, mode, alone=alone)
        assert rotary_backward.case(race, turns, peers.learned_rotation).floor_bytes == passes * n
    floors = [split_norm.case(REFERENCE, SMALL, split_norm.plain, backward=b).floor_bytes for b in (False, True)]
    assert floors == [2 * heads["mixed"], 4 * heads["mixed"] + n]


# gates


def gates(rotary):
    """Return the checks of groups A, B and C by name."""
    checks = rotary_forward.gate(rotary, SMALL) + split_norm.gate(rotary, SMALL)
    for mode in rotary_backward.MODES:
        checks += rotary_backward.gate(rotary, SMALL, mode)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_gates_pass_the_reference():
    checks = gates(REFERENCE)
    require(list(checks.values()))
    assert len(checks) == 28
    gradients = {name.rsplit(" d ")[1] for name in checks if " d " in name}
    assert gradients == {"query", "key", "omega", "sigma", "offset", "mixed", "query_weight", "key_weight"}


def other_places(**changes):
    """Return the reference on places that are changed first."""

    def changed(places):
        return dataclasses.replace(places, **{name: change(places) for name, change in changes.items()})

    return SimpleNamespace(
        span_rotary=lambda q, k, places, *rest: reference.span_rotary(q, k, changed(places), *rest),
        split_span_rotary=lambda mixed, width, places, *rest, **norm: reference.split_span_rotary(
            mixed, width, changed(places), *rest, **norm
        ),
    )


def other_outputs(change):
    """Return the reference with its outputs changed."""
    return SimpleNamespace(
        span_rotary=lambda *given: change(*reference.span_rotary(*given)),
        split_span_rotary=lambda *given, **norm: change(*reference.split_span_rotary(*given, **norm)),
    )


def scaled_gradient(x, factor):
    return x * factor + (1 - factor) * x.detach()


def last_row_again(query, key, *rest):
    return torch.cat([query[:-1], query[-2:-1]]), key, *rest


WRONG = {
    "centres in fp32": (other_places(doubled_centre=lambda p: p.doubled_centre.float().long()), "query"),
    "half a token off": (other_places(doubled_centre=lambda p: p.doubled_centre + 1), "key"),
    "no damping": (other_places(sigma=lambda p: None if p.offset is None else 0 * p.sigma), "query"),
    "sigma in half precision": (other_places(sigma=lambda p: p.sigma.to(torch.float8_e4m3fn).float()), "query"),
    "anchor left out": (other_places(anchor=lambda p: torch.zeros_like(p.anchor)), "d omega"),
    "half of the gradient of sigma": (other_places(sigma=lambda p: scaled_gradient(p.sigma, 0.5)), "d sigma"),
    "offset without effect": (other_places(offset=lambda p: None if p.offset is None else 0 * p.offset), "d offset"),
    "other pairs": (other_outputs(lambda q, k, *v: (q.flip(-1), k, *v)), "query"),
    "keys' heads swapped": (other_outputs(lambda q, k, *v: (q, k.flip(2), *v)), "key"),
    "values' heads swapped": (other_outputs(lambda q, k, *v: (q, k, *(t.flip(2) for t in v))), "value"),
    "one row wrong": (other_outputs(last_row_again), "query"),
    "gradient of keys scaled": (other_outputs(lambda q, k, *v: (q, scaled_gradient(k, 1.02), *v)), "d key"),
    "not a number": (other_outputs(lambda q, k, *v: (q, k * math.nan, *v)), "key"),
}


@pytest.mark.parametrize("name", WRONG)
def test_gates_catch_what_is_wrong(name):
    module, where = WRONG[name]
    checks = gates(Rotary(module=module))
    failed = {found.rsplit(": ")[1] for found, check in checks.items() if not check.passed}
    assert where in failed
    with pytest.raises(GateFailed, match=where):
        require(list(checks.values()))


def test_a_gate_that_compares_nothing_fails():
    with pytest.raises(GateFailed, match="nothing was compared"):
        require([])


def test_errors_are_relative_and_never_hide_a_shape():
    expected = torch.tensor([[3.0, 4.0], [0.0, 1e-9]], dtype=torch.float64)
    assert vector_error(expected * 1.01, expected) == pytest.approx(0.01)
    assert sum_error(expected + 1.0, expected) == pytest.approx(1.0 / 2.5)
    assert vector_error(expected[:1], expected) == math.inf
    assert sum_error(expected[0], expected) == math.inf


# the oracle and the peers do the same job


def test_the_oracle_does_not_depend_on_its_chunks(monkeypatch):
    mode = POSITIONS
    given = rotary_backward.given_of(SMALL, mode)
    upstream = {"query": SMALL.upstream[0], "key": SMALL.upstream[1]}
    whole = oracle.outputs_and_gradients(oracle.span_rotary, given, upstream, mode.wanted)
    monkeypatch.setattr(oracle, "CHUNK", 7)
    parts = oracle.outputs_and_gradients(oracle.span_rotary, given, upstream, mode.wanted)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-12, atol=1e-9)


@pytest.fixture
def at_slots():
    """What the oracle is given for places 0, 1, 2, ... without spread."""
    rows, batch = SMALL.shape.rows, SMALL.shape.batch
    slots = 2 * torch.arange(rows).unsqueeze(1).expand(rows, batch)
    weights = dict(zip(("query_weight", "key_weight"), SMALL.norm_weights, strict=True))
    heads = {"query": SMALL.query, "key": SMALL.key, "mixed": SMALL.mixed, **weights}
    return {
        **heads,
        "omega": SMALL.omega(per_group=False),
        "doubled_centre": slots,
        "anchor": torch.zeros(batch).long(),
    }


def test_peers_rotate_as_the_oracle_does(at_slots):
    table = peers.angles(SMALL.frequencies.omega, SMALL.shape.rows)
    places = at_slots["doubled_centre"] / 2
    rotations = {
        "Megatron": partial(peers.megatron(), SMALL.query.float(), SMALL.key.float(), table),
        "eager": partial(peers.learned_rotation, SMALL.query.float(), SMALL.key.float(), places, at_slots["omega"]),
    }
    expected = oracle.span_rotary(at_slots)
    for name, rotation in rotations.items():
        for found, wanted in zip(rotation(), (expected["query"], expected["key"]), strict=True):
            assert vector_error(found, wanted) < 1e-5, name


def test_the_eager_peer_damps_by_frequencies_of_its_heads():
    given = rotary_backward.given_of(SMALL, PER_GROUP)
    places = (given["doubled_centre"] - given["anchor"]) / 2 + given["offset"]
    found = peers.learned_rotation(given["query"].float(), given["key"].float(), places, given["omega"], given["sigma"])
    near = {**given, "doubled_centre": given["doubled_centre"] - given["anchor"], "anchor": 0 * given["anchor"]}
    expected = oracle.span_rotary(near)
    assert vector_error(found[0], expected["query"]) < 1e-3
    assert vector_error(found[1], expected["key"]) < 1e-3


def test_the_separate_passes_do_what_one_pass_does(at_slots):
    table = peers.angles(SMALL.frequencies.omega, SMALL.shape.rows)
    mixed, query_weight, key_weight = (at_slots[name].float() for name in split_norm.WANTED)
    found = split_norm.plain(mixed, query_weight, key_weight, table, peers.megatron())
    expected = oracle.split_norm_rotary(at_slots, EPS)
    for name, value in zip(split_norm.NAMES, found, strict=True):
        assert vector_error(value, expected[name]) < 1e-5, name


def test_liger_reads_its_own_layout_without_a_copy():
    x = peers.liger_layout(SMALL.query)
    assert x.transpose(1, 2).is_contiguous()
    assert torch.equal(x.permute(2, 0, 1, 3), SMALL.query)


def test_absent_peers_are_named():
    with pytest.raises(peers.Absent, match="no_such_peer"):
        peers.found(lambda: importlib.import_module("no_such_peer"))
    contender = rotary_forward.Turns({"TE": "ImportError: gone"}).contender("TE", SMALL.query)
    assert contender.call is None
    assert contender.absent == "ImportError: gone"


# precision


def test_precision_passes_the_reference_and_fails_fp32_angles():
    row = precision.row(REFERENCE, 1e9, CPU, count=2)
    require(precision.as_checks(row))
    assert row.reading(precision.MEGATRON).value > 0.1
    fp32 = Rotary(module=WRONG["centres in fp32"][0])
    with pytest.raises(GateFailed):
        require(precision.as_checks(precision.row(fp32, 2.0**51, CPU, count=2)))


def test_true_waves_know_known_values():
    waves = precision.true_waves([0, 1, 2**52], torch.tensor([1.0, 2.0**-10]))
    assert waves[0].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert waves[1, 1, 0].item() == math.sin(0.5)
    # 2^51 2^-10 = 2^41 is exact in float64, where libm reduces it correctly
    assert waves[2, 0, 1].item() == pytest.approx(math.cos(2.0**41), abs=1e-15)
