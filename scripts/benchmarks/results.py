"""Results of benchmarks: readings, ratios between them, targets, and the JSON they are kept in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA = 1
"""Version of the JSON layout."""

CEILING = 4.3e12
"""Bytes per second that a large copy reaches on one H200: the rate behind every floor."""

FLOOR = "floor at 4.3 TB/s"
OURS = "ours"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One contender of a case: one value for each round, or the reason why there is none.

    `rounds` are medians in the case's unit; `host` is the host's time per call in microseconds where it was taken.
    """

    name: str
    rounds: tuple[float, ...] = ()
    host: float | None = None
    absent: str = ""

    @property
    def value(self) -> float:
        """The median over rounds; nan where the contender is absent."""
        return statistics.median(self.rounds) if self.rounds else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A bound that a ratio, or a value, has to keep."""

    bound: float
    side: Literal["<=", ">="]

    def met(self, value: float) -> bool:
        """Return whether `value` keeps the bound; nan does not."""
        return value <= self.bound if self.side == "<=" else value >= self.bound


def at_most(bound: float) -> Target:
    """Return the target `<= bound`."""
    return Target(bound=bound, side="<=")


def at_least(bound: float) -> Target:
    """Return the target `>= bound`."""
    return Target(bound=bound, side=">=")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A ratio to report: reading `over` divided by reading `under`, or `over` itself where `under` is empty."""

    over: str
    under: str = ""
    target: Target | None = None

    @property
    def name(self) -> str:
        """The printed name."""
        return f"{self.over} / {self.under}" if self.under else self.over


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A comparison's value with its smallest and largest over rounds; all nan where a reading is absent."""

    comparison: Comparison
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`pass` or `miss`; `absent` without a value, and empty without a target."""
        if self.comparison.target is None:
            return ""
        if math.isnan(self.value):
            return "absent"
        return "pass" if self.comparison.target.met(self.value) else "miss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case: its readings in `unit`, the bytes its floor counts, and its comparisons."""

    case: str
    readings: tuple[Reading, ...]
    comparisons: tuple[Comparison, ...] = ()
    floor_bytes: int | None = None
    unit: str = "us"

    def reading(self, name: str) -> Reading:
        """Return the reading of that name; an absent one where the case has none."""
        if name == FLOOR and self.floor_bytes is not None:
            return Reading(name=FLOOR, rounds=(floor_microseconds(self.floor_bytes),))
        return next((r for r in self.readings if r.name == name), Reading(name=name, absent="not in this case"))

    def ratios(self) -> list[Ratio]:
        """Return the values of all comparisons."""
        return [self._ratio(comparison) for comparison in self.comparisons]

    def _ratio(self, comparison: Comparison) -> Ratio:
        over = self.reading(comparison.over)
        under = self.reading(comparison.under) if comparison.under else Reading(name="", rounds=(1.0,))
        if not over.rounds or not under.rounds:
            return Ratio(comparison=comparison, value=math.nan, low=math.nan, high=math.nan)
        count = max(len(over.rounds), len(under.rounds))
        pairs = zip(_repeated(over.rounds, count), _repeated(under.rounds, count), strict=True)
        each = [a / b for a, b in pairs]
        return Ratio(comparison=comparison, value=over.value / under.value, low=min(each), high=max(each))


def _repeated(rounds: Sequence[float], count: int) -> Sequence[float]:
    return rounds if len(rounds) == count else [statistics.median(rounds)] * count


def floor_microseconds(count: int) -> float:
    """Return the time in which CEILING moves `count` bytes."""
    return count / CEILING * 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison of a correctness gate: the error found and the largest one allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; nan is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupResult:
    """What a group found: its gates, its rows, the seconds it took, and why it stopped early (empty if it did not)."""

    group: str
    title: str
    rows: tuple[Row, ...] = ()
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0
    stopped: str = ""
    notes: tuple[str, ...] = ()


def as_json(machine: Mapping[str, Any], groups: Sequence[GroupResult]) -> dict[str, Any]:
    """Return everything as plain JSON values; numbers that do not exist are null."""
    return {
        "schema": SCHEMA,
        "ceiling_bytes_per_second": CEILING,
        "machine": dict(machine),
        "groups": [_group_json(group) for group in groups],
    }


def _group_json(group: GroupResult) -> dict[str, Any]:
    return {
        "group": group.group,
        "title": group.title,
        "seconds": group.seconds,
        "stopped": group.stopped,
        "notes": list(group.notes),
        "checks": [
            {"name": c.name, "error": _number(c.error), "tolerance": c.tolerance, "passed": c.passed}
            for c in group.checks
        ],
        "rows": [_row_json(row) for row in group.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "case": row.case,
        "unit": row.unit,
        "floor_bytes": row.floor_bytes,
        "readings": [
            {
                "name": r.name,
                "median": _number(r.value),
                "low": _number(min(r.rounds, default=math.nan)),
                "high": _number(max(r.rounds, default=math.nan)),
                "rounds": list(r.rounds),
                "host_us": r.host,
                "absent": r.absent,
            }
            for r in row.readings
        ],
        "ratios": [
            {
                "name": ratio.comparison.name,
                "value": _number(ratio.value),
                "low": _number(ratio.low),
                "high": _number(ratio.high),
                "target": _target_text(ratio.comparison.target),
                "verdict": ratio.verdict,
            }
            for ratio in row.ratios()
        ],
    }


def _target_text(target: Target | None) -> str:
    return "" if target is None else f"{target.side} {target.bound:g}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
