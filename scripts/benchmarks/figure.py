"""One figure of a run, drawn from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.benchmarks.results import OURS

ROTARY = frozenset("ABC")
_COLOURS = {"ours": "tab:green", "copy": "tab:gray"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw every group that has rows: times against the copy or the plain layer, errors by centre, rates by layout.

    The rotary groups show their last shape only.  Bars of ours are green and copies grey; the vertical line is 1.
    Raises ValueError if no group has rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [_last_shape(group) for group in results["groups"] if group["rows"]]
    if not groups:
        raise ValueError("there is nothing to draw: no group has rows")
    heights = [max(3.0, 0.24 * _bars(group)) if group["group"] != "G" else 5.0 for group in groups]
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(11, sum(heights)), height_ratios=heights, squeeze=False, constrained_layout=True
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        draw_group: Callable[[Any, Mapping[str, Any]], None] = _errors if group["group"] == "G" else _relative
        draw_group(axis, group)
        axis.set_title(f"{group['group']}: {group['title']}")
    machine = results["machine"]
    figure.suptitle(f"{', '.join(machine.get('gpus') or ['no GPU'])}, torch {machine.get('torch')}")
    figure.savefig(path)
    pyplot.close(figure)


def _last_shape(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a rotary group with the cases of its last shape, and the shape in its title; other groups as they are."""
    if group["group"] not in ROTARY:
        return group
    shape = group["rows"][-1]["case"].partition(",")[0]
    rows = [
        {**row, "case": row["case"].removeprefix(shape).lstrip(", ")}
        for row in group["rows"]
        if row["case"].partition(",")[0] == shape
    ]
    return {**group, "title": f"{group['title']}, {shape}", "rows": rows}


def _bars(group: Mapping[str, Any]) -> int:
    return sum(len(row["readings"]) + 1 for row in group["rows"])


def _relative(axis: Any, group: Mapping[str, Any]) -> None:
    """Draw each row's readings relative to the first that is not ours, with the spread over rounds."""
    labels: list[str] = []
    for row in group["rows"]:
        present = [r for r in row["readings"] if r["median"] is not None]
        base = next((r["median"] for r in present if not r["name"].startswith(OURS)), None) or 1.0
        for reading in present:
            place = len(labels)
            value = reading["median"] / base
            spread = [[value - reading["low"] / base], [reading["high"] / base - value]]
            colour = next((c for start, c in _COLOURS.items() if reading["name"].startswith(start)), "tab:blue")
            axis.barh(place, value, xerr=spread, color=colour)
            axis.annotate(f" {value:.2f}", (value, place), va="center", fontsize=7)
            labels.append(" | ".join(filter(None, [row["case"], reading["name"]])))
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log" if group["group"] in ROTARY else "linear")
    axis.set_xlabel(f"{group['rows'][0]['unit']}, relative to the first of each case that is not ours")


def _errors(axis: Any, group: Mapping[str, Any]) -> None:
    """Draw the largest error of every contender over the centres."""
    centres = [float(row["case"].removeprefix("centres near ")) for row in group["rows"]]
    names = [reading["name"] for reading in group["rows"][0]["readings"]]
    for name in names:
        points = [
            (centre, reading["median"])
            for centre, row in zip(centres, group["rows"], strict=True)
            for reading in row["readings"]
            if reading["name"] == name and reading["median"] is not None
        ]
        if points:
            axis.loglog(*zip(*points, strict=True), marker="o", label=name)
    axis.axhline(1e-6, color="black", linewidth=0.8, linestyle="--")
    axis.set_xlabel("centre, tokens")
    axis.set_ylabel("max |error| of cos, sin")
    axis.legend()
