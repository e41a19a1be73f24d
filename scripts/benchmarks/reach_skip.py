"""Group F: a linear bias whose keys out of reach are not visited, against causal attention without bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarks import attention_oracle as oracle
from scripts.benchmarks import attention_peers as offered
from scripts.benchmarks.attention_gate import attention_checks, pass_values
from scripts.benchmarks.attention_inputs import RECIPE_HISTORY, AttentionInputs, Centres
from scripts.benchmarks.attention_ours import Attention, reach_of, visited_share
from scripts.benchmarks.attention_peers import Attend, Peer
from scripts.benchmarks.attention_race import Pass, Race, checked, heads_of, rates
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.inputs import LARGE, Shape
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import OURS, Check, Comparison, at_least
from scripts.benchmarks.timing import Case, Stopwatch

TITLE = "a linear bias that skips what is out of reach"
UNSKIPPED = "ours, all keys visited"
SKIPPED_TILES = "FlexAttention, tiles out of reach left out"
SHAPES = (Shape(rows=8192, batch=1), Shape(rows=32768, batch=1))
TIMED: tuple[Pass, ...] = ("forward", "backward")
ULPS = "output of all keys, in last places of bf16"
SAMPLE = 48


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows and slopes: ALiBi's on single tokens, or the GRAPE recipe's on a context of tokens and gists."""

    name: str
    centres: Centres
    flatter: float = 1.0
    judged: bool = False
    shape: Shape = SHAPES[-1]
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @cached_property
    def inputs(self) -> AttentionInputs:
        """Heads after QK-norm with weights 1."""
        return AttentionInputs(
            shape=self.shape, device=torch.device(self.device), dtype=self.dtype, centres=self.centres, qk_norm=True
        )

    @cached_property
    def slopes(self) -> Tensor:
        """Slopes that learn, fp32 [np], nats per token."""
        return self.inputs.slopes(self.flatter).requires_grad_()


def tasks(shape: Shape) -> tuple[Task, ...]:
    """Return what is timed at a shape."""
    return (
        Task(name="ALiBi's slopes, tokens", centres="tokens", judged=shape.name in LARGE, shape=shape),
        Task(
            name="the GRAPE recipe's slopes, a context of tokens and gists",
            centres="context",
            flatter=256 / RECIPE_HISTORY,
            shape=shape,
        ),
    )


def run(options: Options, found: Findings) -> None:
    """Check and time both kinds of rows; raises GateFailed."""
    ours, watch = Attention.kernel(), Stopwatch(rounds=options.rounds)
    for task in tasks(SHAPES[0] if options.quick else SHAPES[-1]):
        reach = reach_of(task.inputs)
        found.require(gate(ours, task, reach))
        peers, notes = peers_of(task, float(reach.score_bound.max()), reach.tolerance)
        share = visited_share(task.inputs, task.slopes, reach)
        span = (task.inputs.doubled_centre[-1] - task.inputs.doubled_centre[0]).max().item() // 2
        found.notes += [*notes, f"{task.name}: {share:.1%} of the causal half visited, over {span} tokens"]
        for how in TIMED:
            row = watch.row(case(ours, task, peers, Race(inputs=task.inputs, how=how)))
            found.rows.append(row)
            found.notes.append(rates(row, task.inputs, how))
        del peers
        torch.cuda.empty_cache()


def attends(ours: Attention, task: Task, reach: Any) -> dict[str, Attend]:
    """Return ours with a reach and without."""
    bias = (task.slopes, task.inputs.doubled_centre, task.inputs.scale)
    return {OURS: ours.linear(*bias, reach), UNSKIPPED: ours.linear(*bias)}


def peers_of(task: Task, bound: float, tolerance: float) -> tuple[dict[str, Peer], list[str]]:
    """Return cuDNN without bias, and on single tokens FlexAttention with the same reach; what is wrong is absent."""
    inputs = task.inputs
    rows = oracle.sample_of(inputs.shape.rows, SAMPLE, inputs.device)
    given, rule = given_of(task), oracle.Rule(scale=inputs.scale)
    unbiased = {name: given[name] for name in oracle.HEADS}
    plain = offered.present({offered.CUDNN: (partial(offered.cudnn, inputs.scale), "rows first")})
    expected = oracle.sampled(unbiased, rows, inputs.of_output[rows], rule)["output"]
    plain, notes = checked(plain, inputs, rows, expected)
    if task.centres != "tokens":
        return plain, notes
    flex = offered.present({SKIPPED_TILES: (partial(_flex, task, bound, tolerance), "sequences first")})
    expected = oracle.sampled(given, rows, inputs.of_output[rows], rule)["output"]
    flex, more = checked(flex, inputs, rows, expected)
    return {**plain, **flex}, [*notes, *more]


def _flex(task: Task, bound: float, tolerance: float) -> Attend:
    inputs, slopes = task.inputs, task.slopes.detach()
    mask = offered.causal_mask(first_tiles(slopes, inputs.shape.rows, bound, tolerance))
    places = torch.arange(inputs.shape.rows, dtype=torch.float32, device=inputs.device).unsqueeze(0)
    return offered.flex(inputs.scale, mask, offered.linear_change(slopes, places))


def first_tiles(slopes: Tensor, rows: int, bound: float, tolerance: float) -> Tensor:
    """Return the first tile of keys that matters to each tile of queries, int64 [np, tiles], for single tokens.

    A key at distance D is left out where slope D > 2 bound + ln(rows / tolerance), for the query of the tile that is
    nearest to it.
    """
    size = offered.FLEX_BLOCK
    farthest = (2 * bound + torch.log(torch.tensor(rows / tolerance, dtype=torch.float64))) / slopes.double().cpu()
    tile = torch.arange(rows // size, dtype=torch.float64)
    nearest = tile * size - (size - 1) - farthest[:, None]
    return (nearest / size).ceil().clamp_min(0).long().to(slopes.device)


def given_of(task: Task) -> dict[str, Tensor]:
    """Return what the oracle reads."""
    inputs = task.inputs
    return {
        "query": inputs.query, "key": inputs.key, "value": inputs.value,
        "slopes": task.slopes, "doubled_centre": inputs.doubled_centre,
    }  # fmt: skip


def gate(ours: Attention, task: Task, reach: Any, scale: float = 1.0) -> list[Check]:
    """Compare the skipping kernel with float64 at a sample of rows, gradients with it, and with itself unskipped."""
    inputs = task.inputs
    rows = oracle.sample_of(inputs.shape.rows, SAMPLE, inputs.device)
    leaves: dict[str, Tensor] = dict(zip(oracle.HEADS, heads_of(inputs), strict=True))
    mine = attends(ours, task, reach)
    with torch.no_grad():
        full, skipped = (mine[name](*leaves.values()) for name in (UNSKIPPED, OURS))
    close = Check(name=f"{inputs.shape.name}, {task.name}: {ULPS}", error=last_places(skipped, full), tolerance=1.0)
    forward = partial(mine[OURS], *leaves.values())
    leaves["slopes"] = task.slopes
    values = pass_values(forward, leaves, inputs.of_output, rows)
    rule = oracle.Rule(scale=inputs.scale)
    expected = oracle.sampled(given_of(task), rows, inputs.of_output[rows], rule, tuple(leaves))
    return [close, *attention_checks(values, expected, f"{inputs.shape.name}, {task.name}: ", scale)]


def last_places(value: Tensor, full: Tensor) -> float:
    """Return the largest difference in units of bf16's last place of the greatest number in a head's vector."""
    greatest = full.detach().abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.bfloat16).tiny)
    unit = torch.exp2(torch.floor(torch.log2(greatest)) - 7)
    return float(((value.detach().float() - full.detach().float()).abs() / unit).max())


def case(ours: Attention, task: Task, peers: dict[str, Peer], race: Race) -> Case:
    """Return the contenders for one kind of rows and one pass."""
    own = attends(ours, task, reach_of(task.inputs))
    contenders = [race.contender(name, Peer(attend=attend), [task.slopes]) for name, attend in own.items()]
    contenders += [race.contender(name, peer) for name, peer in peers.items()]
    return Case(
        name=f"{task.inputs.shape.name}, {race.how}: {task.name}",
        contenders=contenders,
        comparisons=list(comparisons(task, peers)),
    )


def comparisons(task: Task, peers: dict[str, Peer]) -> Iterator[Comparison]:
    """Return what is reported, with the target for single tokens in a long context."""
    yield Comparison(over=offered.CUDNN, under=OURS, target=at_least(4.0) if task.judged else None)
    yield Comparison(over=UNSKIPPED, under=OURS)
    if SKIPPED_TILES in peers:
        yield Comparison(over=SKIPPED_TILES, under=OURS)
