"""Group H: new rows into a paged cache, one launch against a rotation and two index_copy_, in CUDA graphs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks import oracle, peers
from scripts.benchmarks.append_inputs import PAGE, Job
from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import FLOOR, OURS, Check, Comparison, Row, at_most
from scripts.benchmarks.rotary_forward import copying_bytes
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "new rows into a paged cache, per append in a CUDA graph"
COPY = "copy of the same bytes, one launch"
SEPARATE = "our rotary, 2 index_copy_"
ENGINE = "Transformer Engine rope, 2 index_copy_"
FEW = 64
"""Rows up to which an append is judged by its microseconds, with a projection that has just been written."""

SPAN_BYTES = 24
_LAYERS = 32
_LARGE_CALLS = 4
"""Appends in a graph: those of a decoding step's layers, or of many rows, each with its own projection and pages."""

Calls = Sequence[Callable[[], Any]]
Capture = Callable[[Calls], Callable[[], Any]]


def run(options: Options, found: Findings) -> None:
    """Check and time every number of rows; raises GateFailed."""
    append, watch = Append.kernel(), Stopwatch(rounds=options.rounds)
    for rows in (1, FEW) if options.quick else (1, FEW, 4096):
        with torch.no_grad():
            jobs = [Job.of(rows, turn) for turn in range(_LAYERS if rows <= FEW else _LARGE_CALLS)]
            found.require(gate(append, jobs[0]))
            for flush in (False, True) if rows <= FEW else (True,):
                for queries in (True, False):
                    timed = watch.row(case(append, jobs, graphed, queries=queries, flush=flush))
                    found.rows.append(per_append(timed, len(jobs)))
            if rows == FEW:
                edits = [replace(job, scattered=True) for job in jobs]
                timed = watch.row(case(append, edits, graphed, queries=True, flush=False))
                found.rows.append(per_append(timed, len(edits)))
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Append:
    """An implementation of appends, with append_split, append_rows and their arguments' classes."""

    module: Any

    @classmethod
    def kernel(cls) -> Append:
        """Return the Triton kernel."""
        from megacontext_megatron.kernels import kv_append

        return cls(module=kv_append)

    def cache(self, job: Job) -> Any:
        """Return pages for a job."""
        shape = job.shape
        pages = job.pages * shape.batch
        return self.module.PagedCache.empty(pages, shape.groups, shape.head_dim, like=job.inputs.mixed, page=PAGE)

    def finish(self, job: Job) -> Any:
        """Return how rows are finished."""
        from megacontext_megatron.kernels.rotary_arguments import RotaryOptions, RotaryTable

        return self.module.Finish(table=RotaryTable.fixed(job.inputs.frequencies), options=RotaryOptions())

    def call(self, job: Job, cache: Any, *, queries: bool) -> Callable[[], Any]:
        """Return the append of a job, of its whole projection or of keys and values alone."""
        rows = self.module.NewRows(carrier=job.carrier, index=job.index, page_table=job.page_table)
        finish = self.finish(job)
        if queries:
            return partial(self.module.append_split, job.inputs.mixed, rows, finish, cache)
        _, key, value = job.heads
        return partial(self.module.append_rows, key, value, rows, finish, cache)


def gate(append: Append, job: Job, scale: float = 1.0) -> list[Check]:
    """Compare queries and what the pages hold with float64, spans exactly, and both with our rotary's."""
    checks = []
    for scattered in (False, True):
        each = replace(job, scattered=scattered)
        prefix, expected = f"{each.name}, ", finished(each)
        cache = append.cache(each)
        query = append.call(each, cache, queries=True)()
        values = {"query": query, **stored(each, cache)}
        checks += compared(values, expected, prefix, scale)
        checks.append(Check(name=f"{prefix}spans", error=_wrong_spans(each, cache), tolerance=0.0))
        separate = dict(zip(("query", "key", "value"), rotated_apart(append, each)(), strict=True))
        apart = max(_units_apart(values[name], x) for name, x in separate.items())
        checks.append(Check(name=f"{prefix}units in the last place of the separate launch", error=apart, tolerance=1.0))
        alone = append.cache(each)
        append.call(each, alone, queries=False)()
        found = {name: stored(each, alone)[name] for name in ("key", "value")}
        checks += compared(found, {name: expected[name] for name in found}, f"{prefix}alone, ", scale)
    return checks


def _units_apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units in the last place, or of what fusing products leaves of a sum of them."""
    size = expected.double().abs()
    unit = torch.finfo(found.dtype).eps * size + 2.0**-22 * size.max()
    return float(((found.double() - expected.double()).abs() / unit).max())


def finished(job: Job) -> dict[str, Tensor]:
    """Return query, key and value of a job in float64."""
    carrier = job.carrier[:, :, 0]
    given = {
        "doubled_centre": carrier[..., 4],
        "sigma": carrier[..., 5],
        "anchor": carrier[0, :, 4],
        "omega": job.inputs.omega(per_group=False),
    }
    query, key, value = (x.double() for x in job.heads)
    return {"query": oracle.rotated(query, given), "key": oracle.rotated(key, given), "value": value}


def stored(job: Job, cache: Any) -> dict[str, Tensor]:
    """Return the keys and values [s, b, ng, hn] that pages hold for a job."""
    both = (x.flatten(0, 1)[job.slots].unflatten(0, job.index.shape) for x in (cache.key, cache.value))
    return dict(zip(("key", "value"), both, strict=True))


def _wrong_spans(job: Job, cache: Any) -> float:
    """Return how many starts, widths, levels and spreads differ from the carrier's."""
    spans, carrier = cache.metadata(), job.carrier[:, :, 0]
    names = ("start", "width", "level", "sigma")
    columns = zip(names, carrier[..., [0, 1, 2, 5]].unbind(-1), strict=True)
    held = {name: getattr(spans, name).flatten()[job.slots].view(job.index.shape) for name in names}
    return sum(float((held[name].double() != column).sum()) for name, column in columns)


def graphed(calls: Calls) -> Callable[[], Any]:
    """Return the replay of one CUDA graph that makes all calls, one after another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    # A graph reads and writes where its tensors were, so whatever holds them must live as long.
    def replay(_: object = (calls, kept)) -> None:
        graph.replay()

    return replay


def rotated_apart(append: Append, job: Job) -> Callable[[], tuple[Tensor, ...]]:
    """Return our rotary's own launch."""
    from megacontext_megatron.kernels import rotary

    finish = append.finish(job)
    rows = append.module.NewRows(carrier=job.carrier, index=job.index, page_table=job.page_table)
    given = (job.inputs.mixed, job.shape.head_dim, rows.rotated(), finish.table, finish.options)
    return partial(rotary.split_span_rotary, *given)


def separate(append: Append, job: Job, cache: Any) -> Callable[[], Any]:
    """Return our rotary and two index_copy_; spans are not stored."""
    rotate, slots = rotated_apart(append, job), job.slots

    def call() -> Tensor:
        query, key, value = rotate()
        copy_lines(cache, slots, key, value)
        return query

    return call


def engine(job: Job, cache: Any, *, queries: bool) -> Callable[[], Any]:
    """Return Transformer Engine's rope of queries and of keys and two index_copy_; raises peers.Absent.

    Its queries are split off beforehand, which copies grouped ones.
    """
    rope = peers.found(lambda: importlib.import_module("transformer_engine.pytorch.attention.rope"))
    turn = partial(rope.apply_rotary_pos_emb, tensor_format="sbhd", fused=True)
    table = peers.angles(job.inputs.frequencies.omega, job.shape.rows)
    query, key, value = job.heads
    slots = job.slots

    def call() -> object:
        copy_lines(cache, slots, turn(key, table), value)
        return turn(query, table) if queries else None

    return call


def copy_lines(cache: Any, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys and values [s, b, ng, hn] into lines of all pages."""
    for pages, rows in ((cache.key, key), (cache.value, value)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, rows.flatten(0, 1))


def moved_bytes(job: Job, *, queries: bool) -> int:
    """Return the bytes that an append must read and write: heads both, spans written."""
    shape = job.shape
    heads = shape.query_heads * queries + 2 * shape.groups
    return 2 * shape.head_bytes(heads) + SPAN_BYTES * shape.tokens


def case(append: Append, jobs: Sequence[Job], capture: Capture, *, queries: bool, flush: bool) -> Case:
    """Return the contenders for appends of all jobs, each in its own pages; `capture` makes one call of several."""
    first = jobs[0]
    contenders = [
        Contender(
            name=COPY,
            call=capture([copying_bytes(moved_bytes(j, queries=queries) // 2, j.inputs.device) for j in jobs]),
        ),
        Contender(name=OURS, call=capture([append.call(j, append.cache(j), queries=queries) for j in jobs])),
    ]
    if queries:
        contenders.append(_peer(SEPARATE, capture, lambda j: separate(append, j, append.cache(j)), jobs))
    contenders.append(_peer(ENGINE, capture, lambda j: engine(j, append.cache(j), queries=queries), jobs))
    names = [c.name for c in contenders]
    return Case(
        name=f"{first.name}, {'q, k, v' if queries else 'k, v'}{', cold' if flush and few(first) else ''}",
        contenders=contenders,
        comparisons=list(_comparisons(first, names, flush=flush)),
        floor_bytes=moved_bytes(first, queries=queries) * len(jobs),
        flush=flush,
    )


def few(job: Job) -> bool:
    """Return whether a job is judged by its microseconds."""
    return job.shape.tokens <= FEW


def _peer(name: str, capture: Capture, made: Callable[[Job], Callable[[], Any]], jobs: Sequence[Job]) -> Contender:
    try:
        return Contender(name=name, call=capture([made(job) for job in jobs]))
    except peers.Absent as absent:
        return Contender(name=name, absent=str(absent))
    except Exception as error:  # a peer raises what it likes; ours is gated before
        return Contender(name=name, absent=f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _comparisons(job: Job, names: Sequence[str], *, flush: bool) -> Iterator[Comparison]:
    if few(job):
        yield Comparison(over=OURS, target=None if flush else at_most(3.0))
    else:
        yield Comparison(over=OURS, under=FLOOR, target=at_most(1.1))
        yield Comparison(over=OURS, under=COPY)
    for name in names:
        if name not in (COPY, OURS):
            yield Comparison(over=name, under=OURS)


def per_append(row: Row, count: int) -> Row:
    """Return a row of `count` appends at a time as one of single appends."""
    readings = tuple(
        replace(r, rounds=tuple(x / count for x in r.rounds), host=None if r.host is None else r.host / count)
        for r in row.readings
    )
    assert row.floor_bytes is not None
    return replace(row, readings=readings, floor_bytes=row.floor_bytes // count)
