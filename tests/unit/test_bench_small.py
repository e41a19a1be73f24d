"""Groups H and I: gates that catch wrong kernels, bytes, peers that do the same job, and what a graph reports."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megacontext_megatron.kernels import kv_append as kernels
from megacontext_megatron.kernels.pooling import slot_pooling
from scripts.benchmarks import kv_append, peers, pooling, results
from scripts.benchmarks.append_inputs import Job
from scripts.benchmarks.gate import GateFailed, require, vector_error
from scripts.benchmarks.inputs import Inputs, Shape
from scripts.benchmarks.kv_append import Append
from scripts.benchmarks.pooling import Blocks
from scripts.benchmarks.results import OURS, Reading, Row

CPU = torch.device("cpu")
SHAPE = Shape(rows=17, batch=2, query_heads=2, groups=1, head_dim=8)
JOB = Job(inputs=Inputs(shape=SHAPE, device=CPU))
APPEND = Append.kernel()
BLOCKS = Blocks(blocks=6, heads=2, channels=16, device="cpu")


def at_once(calls):
    """Stand for a graph: make all calls."""
    return lambda: [call() for call in calls]


# Appends, group H


def test_the_gate_of_appends_passes_the_kernel():
    checks = kv_append.gate(APPEND, JOB)
    require(checks)
    assert len({check.name for check in checks}) == len(checks) == 14


def other_rows(change):
    """Return the kernel on rows that are changed first."""

    def changed(function):
        def call(*given):
            *heads, rows, finish, cache = given
            return function(*heads, change(rows), finish, cache)

        return call

    parts = {name: getattr(kernels, name) for name in ("Finish", "NewRows", "PagedCache")}
    return SimpleNamespace(
        **parts, append_split=changed(kernels.append_split), append_rows=changed(kernels.append_rows)
    )


def half_a_token_off(rows):
    carrier = rows.carrier.clone()
    carrier[..., 4] += 1
    return dataclasses.replace(rows, carrier=carrier)


def other_levels(rows):
    carrier = rows.carrier.clone()
    carrier[..., 2] += 1
    return dataclasses.replace(rows, carrier=carrier)


WRONG = {
    "half a token off": (half_a_token_off, {"query", "key"}),
    "another level": (other_levels, {"spans"}),
    "one line further": (lambda rows: dataclasses.replace(rows, index=rows.index + 1), {"key", "value", "spans"}),
    "pages of another sequence": (
        lambda rows: dataclasses.replace(rows, page_table=rows.page_table.flip(0)),
        {"key", "value", "spans"},
    ),
    "nothing stored": (lambda rows: dataclasses.replace(rows, index=-1 - rows.index), {"key", "value", "spans"}),
}


@pytest.mark.full
@pytest.mark.parametrize("name", WRONG)
def test_the_gate_of_appends_catches_what_is_wrong(name):
    change, where = WRONG[name]
    checks = kv_append.gate(Append(module=other_rows(change)), JOB)
    failed = {check.name.rsplit(", ")[-1] for check in checks if not check.passed}
    assert where <= failed
    with pytest.raises(GateFailed):
        require(checks)


@pytest.mark.full
def test_the_gate_sees_other_bits(monkeypatch):
    """Another rounding than that of the separate launch fails."""
    real = kernels.append_split

    def rounded(*given):
        query = real(*given)
        return torch.where(query.abs() == query.abs().max(), query * (1 - 1.5 * torch.finfo(query.dtype).eps), query)

    parts = {name: getattr(kernels, name) for name in ("Finish", "NewRows", "PagedCache", "append_rows")}
    checks = kv_append.gate(Append(module=SimpleNamespace(**parts, append_split=rounded)), JOB)
    failed = [check.name for check in checks if not check.passed]
    assert sum(name.endswith("of the separate launch") for name in failed) == 2


def test_appends_move_the_bytes_of_the_design():
    job = Job.of(4096, 0, "cpu")
    assert kv_append.moved_bytes(job, queries=False) == 4096 * (8192 + 24)
    assert kv_append.moved_bytes(job, queries=True) == 4096 * (2 * 48 * 128 * 2 + 24)
    assert results.floor_microseconds(kv_append.moved_bytes(job, queries=False)) == pytest.approx(7.8, rel=0.01)
    assert kernels.SPAN_BYTES == kv_append.SPAN_BYTES


def test_rows_lie_where_slots_say_and_edits_are_distinct():
    for scattered in (False, True):
        job = dataclasses.replace(JOB, scattered=scattered)
        cache = APPEND.cache(job)
        APPEND.call(job, cache, queries=True)()
        assert len(set(job.slots.tolist())) == SHAPE.tokens
        assert torch.equal(kv_append.stored(job, cache)["value"], job.heads[2])
    steps = job.index.diff(dim=0)
    assert (steps != 1).any()
    assert (JOB.index.diff(dim=0) == 1).all()


def test_the_separate_launches_leave_what_one_leaves():
    caches = [APPEND.cache(JOB), APPEND.cache(JOB)]
    query = APPEND.call(JOB, caches[0], queries=True)()
    assert torch.equal(kv_append.separate(APPEND, JOB, caches[1])(), query)
    for held in zip(*(kv_append.stored(JOB, cache).values() for cache in caches), strict=True):
        assert torch.equal(*held)


@pytest.mark.parametrize("queries", [True, False])
def test_every_append_of_a_graph_has_its_own_pages(queries):
    jobs = [JOB, Job(inputs=Inputs(shape=SHAPE, device=CPU, seed=2))]
    case = kv_append.case(APPEND, jobs, at_once, queries=queries, flush=True)
    assert case.floor_bytes == 2 * kv_append.moved_bytes(JOB, queries=queries)
    ours = next(c for c in case.contenders if c.name == OURS)
    assert ours.call is not None
    found: Any = ours.call()
    assert len(found) == 2
    if queries:
        assert not torch.equal(*found)
    present = {c.name for c in case.contenders if c.call is not None}
    assert (kv_append.SEPARATE in present) == queries
    assert case.contenders[0].name == kv_append.COPY


def test_few_rows_are_judged_by_microseconds_and_many_by_their_floor():
    few = kv_append.case(APPEND, [JOB], at_once, queries=True, flush=False)
    assert few.comparisons[0].name == OURS
    assert few.comparisons[0].target == results.at_most(3.0)
    cold = kv_append.case(APPEND, [JOB], at_once, queries=True, flush=True)
    assert cold.name == f"{few.name}, cold"
    assert cold.comparisons[0].target is None
    many = Job(inputs=Inputs(shape=dataclasses.replace(SHAPE, rows=80), device=CPU))
    large = kv_append.case(APPEND, [many], at_once, queries=True, flush=True)
    assert large.comparisons[0].under == results.FLOOR
    assert large.comparisons[0].target == results.at_most(1.1)


def test_a_graph_of_appends_is_reported_by_the_append():
    readings = (Reading(name=OURS, rounds=(80.0, 84.0), host=16.0), Reading(name="gone", absent="gone"))
    row = kv_append.per_append(Row(case="64 rows", readings=readings, floor_bytes=4300), 4)
    assert row.readings[0] == Reading(name=OURS, rounds=(20.0, 21.0), host=4.0)
    assert row.readings[1].absent == "gone"
    assert row.floor_bytes == 1075


def test_a_peer_that_fails_while_it_is_made_is_named():
    def broken(_):
        raise RuntimeError("operation not permitted when stream is capturing\nat line 1")

    contender = kv_append._peer("peer", at_once, broken, [JOB])
    assert contender.call is None
    assert contender.absent == "failed: RuntimeError: operation not permitted when stream is capturing"


# Pooling, group I


def test_the_gate_of_pooling_passes_the_kernel_and_the_plain_code():
    for pool in (slot_pooling, pooling.plain):
        checks = pooling.gate(pool, BLOCKS)
        require(checks)
        assert [check.name.rsplit(": ")[1] for check in checks] == ["pooled", "d query", "d mixed"]


def scaled(query, mixed, heads):
    return slot_pooling(query * 1.05, mixed, heads)


def swapped(query, mixed, heads):
    return slot_pooling(query, torch.cat(mixed.chunk(2, dim=-1)[::-1], dim=-1), heads)


def one_head(query, mixed, _):
    return slot_pooling(query, mixed, 1)


def without_query(query, mixed, heads):
    return slot_pooling(query.detach(), mixed, heads) + 0 * query


def not_a_number(query, mixed, heads):
    return slot_pooling(query, mixed, heads) * math.nan


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (scaled, "pooled"),
        (swapped, "d mixed"),
        (one_head, "pooled"),
        (without_query, "d query"),
        (not_a_number, "pooled"),
    ],
)
def test_the_gate_of_pooling_catches_what_is_wrong(wrong, where):
    checks = pooling.gate(wrong, BLOCKS)
    assert where in {check.name.rsplit(": ")[1] for check in checks if not check.passed}


def test_packed_sequences_are_the_blocks():
    """What varlen kernels are given: one query and K keys to a sequence, in the blocks' order."""
    seen = {}

    def attend(heads, ends, rows):
        seen.update(ends=ends, rows=rows)
        query, key, value = (x.double() for x in heads)
        parts = []
        for block in range(len(ends[0]) - 1):
            q = query[ends[0][block] : ends[0][block + 1]]
            k, v = (x[ends[1][block] : ends[1][block + 1]] for x in (key, value))
            scores = torch.einsum("qhc,khc->hqk", q, k) / math.sqrt(q.shape[-1])
            parts.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v))
        return torch.cat(parts)

    found = partial(pooling.packed, attend)(BLOCKS.query, BLOCKS.mixed, BLOCKS.heads)
    assert vector_error(found, pooling.exact(BLOCKS)["pooled"]) < 1e-12
    assert seen["rows"] == 32
    assert seen["ends"][0].tolist() == list(range(7))
    assert seen["ends"][1].tolist() == list(range(0, 7 * 32, 32))


def test_pooling_moves_the_bytes_of_the_design():
    model = dataclasses.replace(pooling.MODEL, device="cpu", blocks=2)
    rows = 2 * 32
    assert model.moved_bytes(backward=False) == rows * (2 * 8 * 128 * 2 + 8 * 128 * 2 // 32)
    assert model.moved_bytes(backward=True) == rows * (2 * 2 * 8 * 128 * 2 + 8 * 128 * 2 // 32)
    assert pooling.MODEL.name == "32768 rows, 8x128"


@pytest.mark.parametrize("backward", [False, True])
def test_cases_of_pooling_can_be_called(backward):
    pools = {pooling.BATCHED: pooling.batched, pooling.FLASH4: "ModuleNotFoundError: No module named 'flash_attn'"}
    case = pooling.case(slot_pooling, BLOCKS, pools, backward=backward)
    assert [c.name for c in case.contenders] == [pooling.COPY, OURS, pooling.BATCHED, pooling.FLASH4]
    for contender in case.contenders[:3]:
        assert contender.call is not None
        contender.call()
        contender.call()
    assert case.contenders[3].absent.startswith("ModuleNotFoundError")
    assert [c.name for c in case.comparisons if c.target] == [
        f"{OURS} / {results.FLOOR}",
        f"{pooling.BATCHED} / {OURS}",
    ]


def test_peers_of_pooling_are_there_or_say_why(monkeypatch):
    def absent(_):
        raise peers.Absent("ModuleNotFoundError: gone")

    monkeypatch.setattr(peers, "found", absent)
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    found = pooling.present()
    assert found[pooling.VARLEN] == found[pooling.FLASH4] == "ModuleNotFoundError: gone"
    assert found[pooling.BATCHED] is pooling.batched
