"""Printed tables of results, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator

from scripts.benchmarks.results import Check, GroupResult, Ratio, Row


def group_lines(result: GroupResult) -> Iterator[str]:
    """Yield the lines of a group: its gates in one line, its readings, its ratios with targets and verdicts."""
    yield f"## {result.group}: {result.title} ({result.seconds:.0f} s)"
    yield ""
    if result.checks:
        worst = max(result.checks, key=_closeness)
        failed = sum(not check.passed for check in result.checks)
        yield (
            f"Gates: {len(result.checks) - failed} of {len(result.checks)} passed; closest to its tolerance "
            f"{worst.name}, {worst.error:.2e} of {worst.tolerance:.2e}."
        )
    yield from result.notes
    if result.stopped:
        yield f"STOPPED: {result.stopped}"
    if result.rows:
        yield from ("", *_reading_lines(result.rows), "", *_ratio_lines(result.rows))
    yield ""


def _closeness(check: Check) -> float:
    """Return an error in tolerances; where none is tolerated, infinity for any."""
    if check.tolerance:
        return check.error / check.tolerance
    return math.inf if check.error else 0.0


def _reading_lines(rows: tuple[Row, ...]) -> Iterator[str]:
    yield f"| case | contender | median, {rows[0].unit} | min..max | of the floor's bytes, TB/s | host, us |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        for reading in row.readings:
            if reading.absent:
                yield f"| {row.case} | {reading.name} | absent | {reading.absent} | | |"
                continue
            rate = "" if row.floor_bytes is None else f"{row.floor_bytes / reading.value * 1e-6:.2f}"
            host = "" if reading.host is None else f"{reading.host:.0f}"
            spread = f"{number(min(reading.rounds))}..{number(max(reading.rounds))}"
            yield f"| {row.case} | {reading.name} | {number(reading.value)} | {spread} | {rate} | {host} |"


def _ratio_lines(rows: tuple[Row, ...]) -> Iterator[str]:
    yield "| case | ratio | value | min..max | target | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        for ratio in row.ratios():
            if math.isnan(ratio.value) and not ratio.verdict:
                continue
            yield _ratio_line(row.case, ratio)


def _ratio_line(case: str, ratio: Ratio) -> str:
    target = ratio.comparison.target
    goal = "" if target is None else f"{target.side} {target.bound:g}"
    verdict = ratio.verdict.upper() if ratio.verdict == "miss" else ratio.verdict
    if math.isnan(ratio.value):
        return f"| {case} | {ratio.comparison.name} | | | {goal} | {verdict} |"
    spread = f"{number(ratio.low)}..{number(ratio.high)}"
    return f"| {case} | {ratio.comparison.name} | {number(ratio.value)} | {spread} | {goal} | {verdict} |"


def number(value: float) -> str:
    """Return a number in four digits."""
    if value != 0 and not 1e-2 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
