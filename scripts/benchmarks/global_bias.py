"""Group E: causal attention over all rows with a linear bias, against the same without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from scripts.benchmarks import attention_oracle as oracle
from scripts.benchmarks import attention_peers as offered
from scripts.benchmarks import peers
from scripts.benchmarks.attention_gate import attention_checks, pass_values
from scripts.benchmarks.attention_inputs import SHAPES, AttentionInputs
from scripts.benchmarks.attention_ours import SPARE, Attention, as_folded, folded
from scripts.benchmarks.attention_peers import Attend, Layout, Peer
from scripts.benchmarks.attention_race import Pass, Race, checked, heads_of, once, rates, with_fastest
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.inputs import LARGE
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import Check, Comparison, Row, at_least, at_most
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "causal attention with a linear bias, learned slopes"
BACKENDS = (offered.CUDNN, offered.FLASH4, offered.ENGINE)
FOLDED = {name: f"ours, folded, {name}" for name in BACKENDS}
KERNEL = "ours, in the kernel"
FIXED = "FlexAttention, fixed slopes"
LEARNED = "FlexAttention, learned slopes, once"
DENSE = "Transformer Engine, dense bias"
FASTEST, FASTEST_FOLDED = "fastest without bias", "ours, the fastest folded"
TIMED: tuple[Pass, ...] = ("forward", "backward")
SAMPLE = 48


def run(options: Options, found: Findings) -> None:
    """Check and time every shape; raises GateFailed."""
    ours, watch = Attention.kernel(), Stopwatch(rounds=options.rounds)
    for shape in SHAPES[:1] if options.quick else SHAPES[1:]:
        task = Task(inputs=AttentionInputs(shape=shape, device=torch.device("cuda")))
        contest = Contest(ours, task, *backends_of(task))
        found.notes += contest.notes
        found.require(contest.gate())
        for how in TIMED:
            row = derived(watch.row(contest.case(how)))
            found.rows.append(row)
            found.notes.append(rates(row, task.inputs, how))
            torch.cuda.empty_cache()
        if shape.rows == SHAPES[0].rows and not options.quick:
            found.rows.append(contest.learned(watch))
        del contest, task
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Task:
    """Heads, places and slopes: ALiBi's, flattened over the sequence as the GRAPE recipe does it."""

    inputs: AttentionInputs

    @cached_property
    def slopes(self) -> Tensor:
        """Slopes that learn, fp32 [np], nats per token."""
        return self.inputs.slopes(self.inputs.flattened()).requires_grad_()

    @cached_property
    def given(self) -> dict[str, Tensor]:
        """What the oracle reads of the bias's definition."""
        inputs = self.inputs
        return {
            "query": inputs.query, "key": inputs.key, "value": inputs.value,
            "slopes": self.slopes, "doubled_centre": inputs.doubled_centre,
        }  # fmt: skip

    @cached_property
    def rows(self) -> Tensor:
        """Rows whose outputs are compared, int64 [n]."""
        return oracle.sample_of(self.inputs.shape.rows, SAMPLE, self.inputs.device)

    @property
    def rule(self) -> oracle.Rule:
        """Whose scale scores have."""
        return oracle.Rule(scale=self.inputs.scale)

    def outputs(self, given: dict[str, Tensor]) -> Tensor:
        """Return the oracle's outputs at `rows`."""
        return oracle.sampled(given, self.rows, self.inputs.of_output[self.rows], self.rule)["output"]


def backends_of(task: Task) -> tuple[dict[str, Peer], dict[str, Peer], list[str]]:
    """Return the backends without bias, the peers with one, and notes on their errors; what is wrong is absent."""
    inputs = task.inputs
    plain = offered.present(
        {
            offered.CUDNN: (partial(offered.cudnn, inputs.scale), "rows first"),
            offered.FLASH4: (partial(offered.flash4, inputs.scale), "sequences first"),
            offered.ENGINE: (partial(offered.engine, inputs.shape, inputs.scale), "rows first"),
        }
    )
    unbiased = {name: x for name, x in task.given.items() if name in oracle.HEADS}
    plain, notes = checked(plain, inputs, task.rows, task.outputs(unbiased))
    flex: dict[str, tuple[Callable[[], Attend], Layout]] = {
        FIXED: (partial(_flex, task, task.slopes), "sequences first")
    }
    biased, more = checked(offered.present(flex), inputs, task.rows, task.outputs(task.given))
    # its bias is rounded to bf16 in nats, so that it is not held to the definition
    dense: dict[str, tuple[Callable[[], Attend], Layout]] = {DENSE: (partial(_dense, task), "rows first")}
    return plain, {**biased, **offered.present(dense)}, [*notes, *more]


def _flex(task: Task, slopes: Tensor, *, learned: bool = False) -> Attend:
    inputs = task.inputs
    if inputs.shape.rows > SHAPES[0].rows:
        raise peers.Absent(f"compiled for {SHAPES[0].rows} rows alone")
    tiles = inputs.shape.rows // offered.FLEX_BLOCK
    mask = offered.causal_mask(torch.zeros(1, tiles, dtype=torch.int64, device=inputs.device))
    centre = inputs.doubled_centre
    places = ((centre - centre[:1]).float() / 2).transpose(0, 1).contiguous()
    captured = slopes if learned else slopes.detach()
    return offered.flex(inputs.scale, mask, offered.linear_change(captured, places))


def _dense(task: Task) -> Attend:
    inputs = task.inputs
    if inputs.shape.rows > SHAPES[0].rows:
        raise peers.Absent(f"the bias alone would take {2 * inputs.shape.query_heads * inputs.shape.rows**2:.1e} bytes")
    centre = inputs.doubled_centre[:, 0]
    apart = (centre - centre[:, None]).float() / 2
    bias = (task.slopes.detach()[:, None, None] * apart).to(inputs.dtype).unsqueeze(0)
    return offered.engine(inputs.shape, inputs.scale, bias=bias)


class Contest:
    """All contenders for one shape."""

    def __init__(
        self, ours: Attention, task: Task, plain: dict[str, Peer], biased: dict[str, Peer], notes: list[str]
    ) -> None:
        self.ours, self.task, self.plain, self.biased, self.notes = ours, task, plain, biased, notes

    def own(self) -> dict[str, Peer]:
        """Return ours by name: the bias folded into each backend, and in the kernel."""
        task, inputs = self.task, self.task.inputs
        mine = {}
        for name, peer in self.plain.items():
            fold = partial(folded, slopes=task.slopes, doubled_centre=inputs.doubled_centre, scale=inputs.scale)
            mine[FOLDED[name]] = peer if peer.attend is None else replace(peer, attend=fold(peer.attend))
        mine[KERNEL] = Peer(attend=self.ours.linear(task.slopes, inputs.doubled_centre, inputs.scale))
        return mine

    def gate(self, scale: float = 1.0) -> list[Check]:
        """Compare outputs at a sample of rows, and what these alone give to all gradients, with the oracle."""
        checks = []
        for name, peer in self.own().items():
            if peer.attend is None:
                continue
            leaves = {**dict(zip(oracle.HEADS, heads_of(self.task.inputs, peer.layout), strict=True))}
            forward = partial(peer.attend, *leaves.values())
            leaves["slopes"] = self.task.slopes
            checks += self._compared(name, forward, leaves, scale)
        return checks

    def _compared(
        self, name: str, forward: Callable[[], Tensor], leaves: dict[str, Tensor], scale: float
    ) -> list[Check]:
        task, rows = self.task, self.task.rows
        values = pass_values(forward, leaves, task.inputs.of_output, rows)
        given = task.given if name == KERNEL else as_folded(task.given, task.inputs.scale)
        upstream = task.inputs.of_output[rows]
        expected = oracle.sampled(given, rows, upstream, task.rule, tuple(leaves))
        if name != KERNEL:
            for heads in ("d query", "d key"):
                values[heads], expected[heads] = values[heads][..., :-SPARE], expected[heads][..., :-SPARE]
        return attention_checks(values, expected, f"{task.inputs.shape.name}, {name}: ", scale)

    def case(self, how: Pass) -> Case:
        """Return the case of one pass: without bias, with it, and the peers that have one."""
        race = Race(inputs=self.task.inputs, how=how)
        contenders = [race.contender(name, peer) for name, peer in self.plain.items()]
        contenders += [race.contender(name, peer, [self.task.slopes]) for name, peer in self.own().items()]
        contenders += [race.contender(name, peer) for name, peer in self.biased.items()]
        return Case(
            name=f"{self.task.inputs.shape.name}, {how}", contenders=contenders, comparisons=list(comparisons(race))
        )

    def learned(self, watch: Stopwatch) -> Row:
        """Return the row forward and backward with FlexAttention's learned slopes, which takes seconds, once."""
        task = self.task
        race = Race(inputs=task.inputs, how="forward + backward")
        own = self.own()
        names = [KERNEL, FOLDED[offered.CUDNN]]
        row = watch.row(
            Case(
                name=f"{task.inputs.shape.name}, {race.how}, learned slopes",
                contenders=[race.contender(name, own[name], [task.slopes]) for name in names],
                comparisons=[Comparison(over=LEARNED, under=name) for name in names],
            )
        )
        slopes = task.slopes.detach().clone().requires_grad_()
        try:
            peer = Peer(attend=_flex(task, slopes, learned=True), layout="sequences first")
            slow = race.contender(LEARNED, peer, [slopes])
        except peers.Absent as absent:
            slow = Contender(name=LEARNED, absent=str(absent))
        call = slow.call
        reading = once(LEARNED, call) if call is not None else replace(row.reading(LEARNED), absent=slow.absent)
        return replace(row, readings=(*row.readings, reading))


def comparisons(race: Race) -> Iterator[Comparison]:
    """Return what is reported of one shape and pass, with targets for the large ones."""
    judged = race.inputs.shape.name in LARGE
    for name in BACKENDS:
        yield Comparison(over=FOLDED[name], under=name, target=at_most(1.02) if judged else None)
    yield Comparison(over=FASTEST, under=FASTEST_FOLDED, target=at_least(0.98) if judged else None)
    yield Comparison(over=KERNEL, under=offered.CUDNN)
    yield Comparison(over=FIXED, under=FASTEST_FOLDED)
    yield Comparison(over=FIXED, under=KERNEL)
    if race.inputs.shape.rows == SHAPES[0].rows:
        yield Comparison(over=DENSE, under=FASTEST_FOLDED)


def derived(row: Row) -> Row:
    """Return the row with the fastest backend without bias and the fastest folded one."""
    return with_fastest(with_fastest(row, BACKENDS, FASTEST), FOLDED.values(), FASTEST_FOLDED)
