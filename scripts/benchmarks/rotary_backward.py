"""Group B: the rotation forward and backward, and backward alone, without and with gradients of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks import oracle, peers
from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.inputs import LARGE, SHAPES, Inputs
from scripts.benchmarks.options import Options
from scripts.benchmarks.ours import Rotary
from scripts.benchmarks.results import FLOOR, OURS, Check, Comparison, at_most
from scripts.benchmarks.rotary_forward import COPY, Turns, copying
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "rotary, forward and backward"
WITH_TABLE = "ours, its table made in the call"
Outputs = tuple[Tensor, ...]
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """Which gradients are wanted besides those of q and k, and whether query groups have their own frequencies."""

    name: str
    positions: bool
    per_group: bool

    @property
    def wanted(self) -> tuple[str, ...]:
        """The inputs that get a gradient."""
        return ("query", "key", *(("omega", "sigma", "offset") if self.positions else ()))


MODES = (
    Mode(name="q, k", positions=False, per_group=False),
    Mode(name="q, k, omega, sigma, mu", positions=True, per_group=False),
    Mode(name="q, k, omega per KV group, sigma, mu", positions=True, per_group=True),
)


def run(options: Options, found: Findings) -> None:
    """Check and time every shape and mode; raises GateFailed."""
    rotary, watch, turns = Rotary.kernel(), Stopwatch(rounds=options.rounds), Turns.present()
    eager = peers.compiled(peers.learned_rotation)
    for shape in SHAPES[:1] if options.quick else SHAPES:
        inputs = Inputs(shape=shape, device=torch.device("cuda"))
        for mode in MODES:
            found.require(gate(rotary, inputs, mode))
            for alone in (True, False):
                found.rows.append(watch.row(case(Race(rotary, inputs, mode, alone=alone), turns, eager)))
                torch.cuda.empty_cache()


def given_of(inputs: Inputs, mode: Mode) -> dict[str, Tensor]:
    """Return what a rotation of this mode is given; the inputs that get a gradient require it."""
    given = {
        "query": inputs.query,
        "key": inputs.key,
        "omega": inputs.omega(per_group=mode.per_group),
        "doubled_centre": inputs.doubled_centre,
        "sigma": inputs.sigma,
        "anchor": inputs.anchor,
    }
    if mode.positions:
        given["offset"] = 0.25 - 0.5 * inputs.sigma / 8
    return {name: t.detach().clone().requires_grad_(name in mode.wanted) for name, t in given.items()}


def gate(rotary: Rotary, inputs: Inputs, mode: Mode, scale: float = 1.0) -> list[Check]:
    """Compare q, k and every wanted gradient with the oracle."""
    given = given_of(inputs, mode)
    out = dict(zip(("query", "key"), rotate(rotary, inputs, mode, given), strict=True))
    upstream: dict[str, Tensor] = dict(zip(("query", "key"), inputs.upstream, strict=False))
    gradients = torch.autograd.grad(list(out.values()), [given[n] for n in mode.wanted], list(upstream.values()))
    values = {**out, **{f"d {n}": g for n, g in zip(mode.wanted, gradients, strict=True)}}
    expected = oracle.outputs_and_gradients(oracle.span_rotary, given, upstream, mode.wanted)
    return compared(values, expected, f"{inputs.shape.name}, {mode.name}: ", scale)


def rotate(rotary: Rotary, inputs: Inputs, mode: Mode, given: Mapping[str, Tensor], table: Any = None) -> Outputs:
    """Run ours; where frequencies are learned their table is made here, unless it is given."""
    if table is None:
        table = rotary.learned_table(given["omega"]) if mode.positions else rotary.fixed_table(inputs)
    return rotary.rotate(given, table)


class Race:
    """The contenders of one shape and mode: `alone` times the backward pass only."""

    def __init__(self, rotary: Rotary, inputs: Inputs, mode: Mode, *, alone: bool) -> None:
        self.rotary, self.inputs, self.mode, self.alone = rotary, inputs, mode, alone

    def passes(self, forward: Callable[[], Outputs], leaves: list[Tensor], upstream: list[Tensor]) -> Call:
        """Return a call of the backward pass, with the forward pass before it unless `alone`."""
        if not self.alone:
            return lambda: torch.autograd.grad(forward(), leaves, upstream)
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    def ours(self, name: str, *, with_table: bool = False) -> Contender:
        """Return ours, with its table made beforehand or in every call."""
        given = given_of(self.inputs, self.mode)
        table = None
        if not with_table:
            table = self.rotary.fixed_table(self.inputs)
            if self.mode.positions:
                table = self.rotary.learned_table(given["omega"])
        forward = partial(rotate, self.rotary, self.inputs, self.mode, given, table)
        leaves = [given[n] for n in self.mode.wanted]
        return Contender(name=name, call=self.passes(forward, leaves, list(self.inputs.upstream[:2])))

    def peer(self, name: str, turns: Turns) -> Contender:
        """Return a peer that rotates q and k by a table of angles, or its absence."""
        inputs = self.inputs
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.query, inputs.key)]
        table = peers.angles(inputs.frequencies.omega, inputs.shape.rows)
        found = turns.contender(name, *leaves, table)
        return self._timed(found, leaves, list(inputs.upstream[:2]))

    def liger(self, turns: Turns) -> Contender:
        """Return Liger on its own layout, or its absence."""
        inputs = self.inputs
        leaves = [peers.liger_layout(x).detach().requires_grad_() for x in (inputs.query, inputs.key)]
        angle = peers.angles(inputs.frequencies.omega, inputs.shape.rows)[:, 0, 0].unsqueeze(0)
        found = turns.contender(peers.LIGER, *leaves, angle.cos(), angle.sin())
        return self._timed(found, leaves, [peers.liger_layout(x) for x in inputs.upstream[:2]])

    def eager(self, name: str, turn: Callable[..., Outputs], *, spread: bool) -> Contender:
        """Return a plain PyTorch rotation with learned frequencies; with `spread`, sigma and places learn as well."""
        given = given_of(self.inputs, self.mode)
        centre = (given["doubled_centre"] - given["anchor"]).float() / 2
        leaves = [given[n] for n in (self.mode.wanted if spread else ("query", "key", "omega"))]

        def forward() -> Outputs:
            places = centre + given["offset"] if spread else centre
            return turn(given["query"], given["key"], places, given["omega"], given["sigma"] if spread else None)

        return self._timed(Contender(name=name, call=forward), leaves, list(self.inputs.upstream[:2]))

    def _timed(self, found: Contender, leaves: list[Tensor], upstream: list[Tensor]) -> Contender:
        if found.call is None:
            return found
        try:
            call = self.passes(found.call, leaves, upstream)  # type: ignore[arg-type]
        except Exception as error:  # a peer raises what it likes; ours is gated before
            return Contender(name=found.name, absent=f"failed: {type(error).__name__}: {error}")
        return Contender(name=found.name, call=call)


def case(race: Race, turns: Turns, eager: Callable[..., Outputs]) -> Case:
    """Return the contenders for one shape, mode and pass; `eager` is learned_rotation under torch.compile."""
    inputs, mode = race.inputs, race.mode
    contenders = [
        Contender(name=COPY, call=copying(inputs.query, inputs.key)),
        race.ours(OURS),
        race.peer(peers.FUSED, turns),
    ]
    if not mode.positions:
        contenders += [race.liger(turns), race.peer(peers.COMPILED, turns), race.peer(peers.MEGATRON, turns)]
    else:
        contenders.append(race.eager(peers.EAGER, peers.learned_rotation, spread=True))
        if not race.alone:
            contenders.append(race.ours(WITH_TABLE, with_table=True))
        if mode.per_group:
            contenders.append(race.eager(peers.PER_HEAD, peers.learned_rotation, spread=False))
        else:
            contenders.append(race.eager(peers.EAGER_COMPILED, eager, spread=True))
    passes = (3 if mode.positions else 2) + (0 if race.alone else 2)
    return Case(
        name=f"{inputs.shape.name}, {'backward' if race.alone else 'forward + backward'}: {mode.name}",
        contenders=contenders,
        comparisons=list(_comparisons(race, [c.name for c in contenders])),
        floor_bytes=passes * inputs.shape.qk_bytes,
    )


def _comparisons(race: Race, names: list[str]) -> Iterator[Comparison]:
    judged = race.alone and race.inputs.shape.name in LARGE
    positions = race.mode.positions
    yield Comparison(over=OURS, under=COPY, target=at_most(1.03) if judged and not positions else None)
    yield Comparison(over=OURS, under=FLOOR, target=at_most(1.15) if judged and positions else None)
    for name in names:
        if name not in (COPY, OURS):
            yield Comparison(over=name, under=OURS)
