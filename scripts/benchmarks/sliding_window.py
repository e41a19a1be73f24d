"""Group D: attention in a sliding window of 128 rows, plain and with the rotation inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from scripts.benchmarks import attention_oracle as oracle
from scripts.benchmarks import attention_peers as offered
from scripts.benchmarks import peers
from scripts.benchmarks.attention_gate import ROUNDED_AGAIN, attention_checks, pass_values
from scripts.benchmarks.attention_inputs import LOOK_BACK, SHAPES, AttentionInputs, window_bytes
from scripts.benchmarks.attention_ours import Attention, rotary_places
from scripts.benchmarks.attention_peers import Attend, Layout, Peer
from scripts.benchmarks.attention_race import PASSES, Race, checked, heads_of, with_fastest, with_sum
from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.inputs import LARGE
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import FLOOR, OURS, Check, Comparison, Row, at_least, at_most
from scripts.benchmarks.rotary_forward import Turns
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "attention in a window of 128 rows"
INSIDE = "ours, rotary inside"
MIXED = "ours, rotary inside, from the mixed projection"
SEPARATE = "ours, the rotary pass"
ROPES = {peers.FUSED: "rope: Transformer Engine fused", peers.LIGER: "rope: Liger"}
FASTEST, ROPE = "fastest peer", "fastest peer's rope"
PAIR = "fastest peer's rope + fastest peer"
ENGINE_PAIR = "Transformer Engine's rope + fastest peer"
OWN_PAIR = "ours, the rotary pass + fastest peer"
WINDOWS = (offered.BAND, offered.ENGINE, offered.FLASH4, offered.VARLEN, offered.FLEX)
SAMPLE = 48


def run(options: Options, found: Findings) -> None:
    """Check and time every shape and pass; raises GateFailed."""
    ours, watch, turns = Attention.kernel(), Stopwatch(rounds=options.rounds), Turns.present()
    for shape in SHAPES[:1] if options.quick else SHAPES[1:]:
        inputs = AttentionInputs(shape=shape, device=torch.device("cuda"))
        found.require(gate(ours, inputs))
        windows, notes = right(present(inputs), inputs)
        found.notes += notes
        for how in PASSES:
            contest = Contest(ours, Race(inputs=inputs, how=how), windows, turns)
            found.rows.append(derived(watch.row(contest.case())))
            del contest
            torch.cuda.empty_cache()


def present(inputs: AttentionInputs) -> dict[str, Peer]:
    """Load the peers; FlexAttention, which takes longest to compile, for no more than one shape of targets."""
    shape, scale = inputs.shape, inputs.scale
    loads: dict[str, tuple[Callable[[], Attend], Layout]] = {
        offered.BAND: (partial(offered.band, scale, LOOK_BACK), "rows first"),
        offered.ENGINE: (partial(offered.engine, shape, scale, LOOK_BACK), "rows first"),
        offered.FLASH4: (partial(offered.flash4, scale, LOOK_BACK), "sequences first"),
        offered.VARLEN: (partial(offered.varlen, scale, LOOK_BACK), "sequences first"),
        offered.FLEX: (partial(_flex, inputs), "sequences first"),
    }
    return offered.present(loads)


def _flex(inputs: AttentionInputs) -> Attend:
    rows = inputs.shape.rows
    if rows > SHAPES[0].rows:
        raise peers.Absent(f"compiled for {SHAPES[0].rows} rows alone")
    return offered.flex(inputs.scale, offered.window_mask(rows, LOOK_BACK, inputs.device))


def right(windows: dict[str, Peer], inputs: AttentionInputs) -> tuple[dict[str, Peer], list[str]]:
    """Return the peers that compute what the definition says at a sample of rows."""
    rows = oracle.sample_of(inputs.shape.rows, SAMPLE, inputs.device)
    rule = oracle.Rule(scale=inputs.scale, look_back=LOOK_BACK)
    given = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    expected = oracle.sampled(given, rows, inputs.of_output[rows], rule)["output"]
    return checked(windows, inputs, rows, expected)


def gate(ours: Attention, inputs: AttentionInputs, scale: float = 1.0) -> list[Check]:
    """Compare outputs and gradients of all rows with the oracle: plain, rotated inside, and from the projection."""
    rule = oracle.Rule(scale=inputs.scale, look_back=LOOK_BACK)
    given = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    turned = {**rotary_places(inputs), "omega": inputs.omega(per_group=False)}
    rotation, checks = ours.rotation(inputs), []
    for name, inside in (("plain", None), ("rotary inside", rotation)):
        leaves: dict[str, Tensor] = dict(zip(oracle.HEADS, heads_of(inputs), strict=True))
        forward = partial(ours.window(inputs.scale, inside), *leaves.values())
        values = pass_values(forward, leaves, inputs.of_output)
        extra, wider = ({}, 1.0) if inside is None else (turned, ROUNDED_AGAIN)
        expected = oracle.windowed({**given, **extra}, inputs.of_output, rule)
        checks += attention_checks(values, expected, f"{inputs.shape.name}, {name}: ", wider * scale)
    return [*checks, *_gate_mixed(ours, inputs, turned, scale)]


def _gate_mixed(ours: Attention, inputs: AttentionInputs, turned: dict[str, Tensor], scale: float) -> list[Check]:
    width, leaf = inputs.shape.head_dim, inputs.mixed.detach().clone().requires_grad_()
    forward = partial(ours.window_of_mixed(width, inputs.scale, ours.rotation(inputs)), leaf)
    values = pass_values(forward, {"mixed": leaf}, inputs.of_output)
    given = dict(zip(oracle.HEADS, peers.split(inputs.mixed, width), strict=True))
    rule = oracle.Rule(scale=inputs.scale, look_back=LOOK_BACK)
    expected = oracle.windowed({**given, **turned}, inputs.of_output, rule)
    wanted = {"output": expected["output"], "d mixed": oracle.mixed_of(expected)}
    return compared(values, wanted, f"{inputs.shape.name}, from the projection: ", ROUNDED_AGAIN * scale)


class Contest:
    """All contenders for one shape and pass."""

    def __init__(self, ours: Attention, race: Race, windows: dict[str, Peer], turns: Turns) -> None:
        self.ours, self.race, self.windows, self.turns = ours, race, windows, turns

    def case(self) -> Case:
        """Return the case: windows, windows with the rotation inside, and rotations alone."""
        inputs, how = self.race.inputs, self.race.how
        return Case(
            name=f"{inputs.shape.name}, {how}",
            contenders=[*self._plain(), *self._inside(), *self._ropes()],
            comparisons=list(comparisons(self.race)),
            floor_bytes=window_bytes(inputs.shape, forward=how != "backward", backward=how != "forward"),
        )

    def _plain(self) -> Iterator[Contender]:
        yield self.race.contender(OURS, Peer(attend=self.ours.window(self.race.inputs.scale)))
        for name, peer in self.windows.items():
            yield self.race.contender(name, peer)

    def _inside(self) -> Iterator[Contender]:
        inputs = self.race.inputs
        rotation = self.ours.rotation(inputs)
        yield self.race.contender(INSIDE, Peer(attend=self.ours.window(inputs.scale, rotation)))
        leaf = inputs.mixed.detach().clone().requires_grad_()
        attend = self.ours.window_of_mixed(inputs.shape.head_dim, inputs.scale, rotation)
        yield self.race.timed(MIXED, partial(attend, leaf), [leaf], [inputs.of_output])

    def _ropes(self) -> Iterator[Contender]:
        inputs = self.race.inputs
        query, key, _ = heads_of(inputs)
        given = {"query": query, "key": key, **rotary_places(inputs)}
        own = partial(self.ours.rotary.rotate, given, self.ours.rotary.fixed_table(inputs))
        upstream = list(inputs.upstream[:2])
        yield self.race.timed(SEPARATE, own, [query, key], upstream)
        table = peers.angles(inputs.frequencies.omega, inputs.shape.rows)
        leaves = heads_of(inputs)[:2]
        yield self._rope(peers.FUSED, leaves, (table,), upstream)
        leaves = [peers.liger_layout(x.detach()).requires_grad_() for x in (query, key)]
        angle = table[:, 0, 0].unsqueeze(0)
        yield self._rope(peers.LIGER, leaves, (angle.cos(), angle.sin()), [peers.liger_layout(x) for x in upstream])

    def _rope(self, name: str, leaves: list[Tensor], tables: tuple[Tensor, ...], upstream: list[Tensor]) -> Contender:
        turn = self.turns.contender(name, *leaves, *tables)
        if turn.call is None:
            return Contender(name=ROPES[name], absent=turn.absent)
        return self.race.timed(ROPES[name], turn.call, leaves, upstream)


def comparisons(race: Race) -> Iterator[Comparison]:
    """Return what is reported of one shape and pass, with targets for the large ones."""
    judged = race.inputs.shape.name in LARGE
    both = race.how == "forward + backward"
    yield Comparison(over=OURS, under=FASTEST, target=at_most(0.6) if judged and not both else None)
    yield Comparison(over=PAIR, under=INSIDE, target=at_least(1.7) if judged and both else None)
    yield Comparison(over=OURS, under=FLOOR)
    yield Comparison(over=INSIDE, under=FLOOR)
    yield Comparison(over=ENGINE_PAIR, under=INSIDE)
    yield Comparison(over=OWN_PAIR, under=INSIDE)
    yield Comparison(over=INSIDE, under=OURS)
    yield Comparison(over=MIXED, under=INSIDE)
    for name in WINDOWS:
        yield Comparison(over=name, under=OURS)


def derived(row: Row) -> Row:
    """Return the row with the fastest peers and the pairs of a rotation and a window."""
    row = with_fastest(row, WINDOWS, FASTEST)
    row = with_fastest(row, ROPES.values(), ROPE)
    for rotation, pair in ((ROPE, PAIR), (ROPES[peers.FUSED], ENGINE_PAIR), (SEPARATE, OWN_PAIR)):
        row = with_sum(row, (rotation, FASTEST), pair)
    return row
