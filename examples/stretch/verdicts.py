"""What the measurements say: differences between cells, paired by seed, and the claims they decide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from examples.stretch.recipe import HELD_OUT, LORA, METHODS, NONE, ZERO_SHOT

Records = Sequence[Mapping[str, Any]]
BySeed = dict[int, float]
Kind = Literal["below", "beyond", "within"]

ERRORS = 3.0
"""Standard errors that a difference must exceed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A claim about a difference (left minus right, nats per token) and what the seeds say about it.

    `error` is the standard error over seeds of the paired difference, None for one seed.  `holds` is None where the
    seeds are too few to say.  `reversed_seeds` are those whose own difference has the other sign.
    """

    claim: str
    mean: float
    error: float | None
    holds: bool | None
    reversed_seeds: tuple[int, ...]

    def __str__(self) -> str:
        """Return the claim with its figures, as a line of the report."""
        said = {True: "holds", False: "does NOT hold", None: "undecided, needs two seeds"}[self.holds]
        error = "" if self.error is None else f" ± {self.error:.4f}"
        seeds = ", ".join(map(str, self.reversed_seeds))
        turned = f"; reversed in seeds {seeds}" if seeds else ""
        return f"{self.claim}: {said} (difference {self.mean:+.4f}{error}{turned})"


def values(
    records: Records, method: str, factor: int, adapters: str = ZERO_SHOT, data: str = HELD_OUT, *, of: str = "loss"
) -> BySeed:
    """Return one cell's loss, or accuracy, by seed."""
    wanted = {"method": method, "factor": factor, "adapters": adapters, "data": data}
    return {each["seed"]: each[of] for each in records if all(each[name] == value for name, value in wanted.items())}


def standard_error(numbers: Sequence[float]) -> float | None:
    """Return the standard error of the mean, None for fewer than two numbers."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None


def decide(claim: str, left: BySeed, right: BySeed, kind: Kind) -> Verdict | None:
    """Return what seeds that both cells have say; None without one.

    `below`: the mean difference left - right is negative.  `beyond`: it is, by more than ERRORS standard errors.
    `within`: it is not positive by more than ERRORS standard errors.
    """
    difference = {seed: left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())}
    if not difference:
        return None
    mean, error = statistics.fmean(difference.values()), standard_error(list(difference.values()))
    if kind == "below":
        holds = mean < 0
    elif error is None:
        holds = None
    else:
        holds = mean < -ERRORS * error if kind == "beyond" else mean <= ERRORS * error
    turned = tuple(seed for seed, value in difference.items() if value > 0)
    return Verdict(claim=claim, mean=mean, error=error, holds=holds, reversed_seeds=turned)


def verdicts(records: Records, adapted: int) -> list[Verdict]:
    """Return what records say about the order at twice the base's length and about adapters at `adapted` times it."""
    asked: list[tuple[str, BySeed, BySeed, Kind]] = [
        ("at 2T: NTK below none by more than 3 standard errors", *_pair(records, "ntk", NONE), "beyond"),
        ("at 2T: none below linear by more than 3 standard errors", *_pair(records, NONE, "linear"), "beyond"),
        ("at 2T: YaRN no worse than NTK within 3 standard errors", *_pair(records, "yarn", "ntk"), "within"),
    ]
    for method in METHODS:
        after, before = (values(records, method, adapted, adapters) for adapters in (LORA, ZERO_SHOT))
        asked.append((f"at {adapted}T: {method} after {LORA} below its zero-shot value", after, before, "below"))
    decided = [decide(*each) for each in asked]
    return [verdict for verdict in decided if verdict is not None]


def _pair(records: Records, left: str, right: str) -> tuple[BySeed, BySeed]:
    return values(records, left, 2), values(records, right, 2)
