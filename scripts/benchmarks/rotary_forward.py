"""Group A: the rotation of q and k, forward, against a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from scripts.benchmarks import oracle, peers
from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.inputs import LARGE, SHAPES, Inputs, Shape
from scripts.benchmarks.options import Options
from scripts.benchmarks.ours import Rotary
from scripts.benchmarks.results import FLOOR, OURS, Check, Comparison, at_least, at_most
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "rotary, forward"
COPY = "copy of q and k"
ONE_COPY = "copy of the same bytes, one launch"
PER_GROUP = "ours, frequencies per KV group"


def run(options: Options, found: Findings) -> None:
    """Check and time every shape; raises GateFailed."""
    rotary, watch = Rotary.kernel(), Stopwatch(rounds=options.rounds)
    turns = Turns.present()
    for shape in SHAPES[:1] if options.quick else SHAPES:
        inputs = Inputs(shape=shape, device=torch.device("cuda"))
        found.require(gate(rotary, inputs))
        for flush in (True, False) if shape.name not in LARGE else (True,):
            with torch.no_grad():
                found.rows.append(watch.row(case(rotary, inputs, turns, flush=flush)))
        torch.cuda.empty_cache()


class Turns:
    """The peers' rotations by name, loaded once; an absent one is its reason."""

    def __init__(self, turns: dict[str, Callable[..., object] | str]) -> None:
        self.turns = turns

    @classmethod
    def present(cls) -> Turns:
        """Load every peer that this machine has."""
        loads: dict[str, Callable[[], Callable[..., object]]] = {
            peers.MEGATRON: peers.megatron,
            peers.COMPILED: lambda: peers.compiled(peers.megatron()),
            peers.FUSED: peers.fused,
            peers.LIGER: peers.liger,
        }
        turns: dict[str, Callable[..., object] | str] = {}
        for name, load in loads.items():
            try:
                turns[name] = load()
            except peers.Absent as absent:
                turns[name] = str(absent)
        return cls(turns)

    def contender(self, name: str, *arguments: Tensor, kind: str = "") -> Contender:
        """Return the peer `kind` (or `name`) on these arguments, named `name`, or its absence."""
        turn = self.turns[kind or name]
        if isinstance(turn, str):
            return Contender(name=name, absent=turn)
        return Contender(name=name, call=partial(turn, *arguments))


def given_of(inputs: Inputs) -> dict[str, Tensor]:
    """Return what a forward rotation is given."""
    return {
        "query": inputs.query,
        "key": inputs.key,
        "doubled_centre": inputs.doubled_centre,
        "sigma": inputs.sigma,
        "anchor": inputs.anchor,
    }


def gate(rotary: Rotary, inputs: Inputs, scale: float = 1.0) -> list[Check]:
    """Compare q and k with the oracle, for shared frequencies and for those of query groups."""
    checks = []
    given = given_of(inputs)
    for per_group in (False, True):
        omega = inputs.omega(per_group=per_group)
        table = rotary.learned_table(omega) if per_group else rotary.fixed_table(inputs)
        with torch.no_grad():
            query, key = rotary.rotate(given, table)
        expected = oracle.outputs(oracle.span_rotary, {**given, "omega": omega})
        prefix = f"{inputs.shape.name}, {'per KV group' if per_group else 'shared'}: "
        checks += compared({"query": query, "key": key}, expected, prefix, scale)
    return checks


def case(rotary: Rotary, inputs: Inputs, turns: Turns, *, flush: bool = True) -> Case:
    """Return the contenders for one shape."""
    shape, given = inputs.shape, given_of(inputs)
    table = peers.angles(inputs.frequencies.omega, shape.rows)
    fixed, grouped = rotary.fixed_table(inputs), rotary.learned_table(inputs.omega(per_group=True))
    contenders = [
        Contender(name=COPY, call=copying(inputs.query, inputs.key)),
        Contender(name=OURS, call=partial(rotary.rotate, given, fixed)),
        Contender(name=PER_GROUP, call=partial(rotary.rotate, given, grouped)),
        turns.contender(peers.FUSED, inputs.query, inputs.key, table),
        *_liger(inputs, turns, table),
        turns.contender(peers.COMPILED, inputs.query, inputs.key, table),
        turns.contender(peers.MEGATRON, inputs.query, inputs.key, table),
        Contender(name=ONE_COPY, call=copying_bytes(shape.qk_bytes, inputs.device)),
        Contender(
            name=peers.PER_HEAD,
            call=partial(
                peers.learned_rotation,
                inputs.query,
                inputs.key,
                inputs.doubled_centre / 2,
                inputs.omega(per_group=True),
            ),
        ),
    ]
    return Case(
        name=shape.name + ("" if flush else ", hot"),
        contenders=contenders,
        comparisons=list(_comparisons(shape, targets=shape.name in LARGE)),
        floor_bytes=2 * shape.qk_bytes,
        flush=flush,
    )


def _liger(inputs: Inputs, turns: Turns, table: Tensor) -> Iterator[Contender]:
    cos, sin = table[:, 0, 0].cos().unsqueeze(0), table[:, 0, 0].sin().unsqueeze(0)
    layout = [peers.liger_layout(x) for x in (inputs.query, inputs.key)]
    yield turns.contender(peers.LIGER, *layout, cos, sin)
    if inputs.shape.batch > 1:
        strided = [x.permute(1, 2, 0, 3) for x in (inputs.query, inputs.key)]
        yield turns.contender(peers.LIGER_STRIDED, *strided, cos, sin, kind=peers.LIGER)


def _comparisons(shape: Shape, *, targets: bool) -> Iterator[Comparison]:
    small = at_most(1.03) if targets else None
    yield Comparison(over=OURS, under=COPY, target=small)
    yield Comparison(over=PER_GROUP, under=COPY, target=small)
    yield Comparison(over=OURS, under=ONE_COPY)
    yield Comparison(over=OURS, under=FLOOR)
    yield Comparison(over=peers.FUSED, under=OURS, target=at_least(1.75) if targets else None)
    yield Comparison(over=peers.MEGATRON, under=OURS, target=at_least(12.0) if targets else None)
    yield Comparison(over=peers.COMPILED, under=OURS)
    yield Comparison(over=peers.LIGER, under=OURS)
    if shape.batch > 1:
        yield Comparison(over=peers.LIGER_STRIDED, under=OURS)
    yield Comparison(over=peers.PER_HEAD, under=PER_GROUP)


def copying(*tensors: Tensor) -> Callable[[], object]:
    """Return a call that copies each tensor into another, one launch each."""
    targets: Sequence[Tensor] = [torch.empty_like(t) for t in tensors]

    def copy() -> None:
        for target, source in zip(targets, tensors, strict=True):
            target.copy_(source)

    return copy


def copying_bytes(count: int, device: torch.device) -> Callable[[], object]:
    """Return a call that copies `count` bytes in one launch."""
    return copying(torch.zeros(count // 2, dtype=torch.bfloat16, device=device))
