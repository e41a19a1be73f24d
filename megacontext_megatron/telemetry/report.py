"""`python -m megacontext_megatron.telemetry.report FOLDER`: a short table and a figure of a run.

Reads `metrics.jsonl` and, where present, `evaluation.json` in the folder a run saved its checkpoints to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacontext_megatron.telemetry import names
from megacontext_megatron.telemetry.sinks import METRICS_FILE, read_metrics

FIGURE_FILE = "training.png"
EVALUATION_FILE = "evaluation.json"

Entries = list[dict[str, float]]


def series(entries: Entries, prefix: str) -> dict[str, list[tuple[float, float]]]:
    """Return (iteration, value) pairs of every metric whose name begins with `prefix`, by name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name.startswith(prefix):
                found.setdefault(name, []).append((entry["iteration"], value))
    return found


def table_rows(entries: Entries, evaluation: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the lines of the table: what was trained, what the contexts held, and held-out losses."""
    last = entries[-1]
    rows = [
        ("iterations", f"{int(last['iteration'])}"),
        ("training loss, first and last interval", f"{entries[0][names.LOSS.at()]:.3f} -> {last[names.LOSS.at()]:.3f}"),
        ("tokens per row (C / W)", f"{last[names.COMPRESSION.at()]:.1f}"),
    ]
    for name, points in series(entries, "mc/frac_level/").items():
        rows.append((f"rows at level {name.rsplit('/', 1)[1]}", f"{100 * points[-1][1]:.1f} %"))
    for name, points in series(entries, "mc/lod_loss/").items():
        rows.append((f"training loss at level {name.rsplit('/', 1)[1]}", f"{points[-1][1]:.3f}"))
    for name, points in series(entries, "mc/pos/sigma_mean/").items():
        rows.append((f"mean sigma at level {name.rsplit('/', 1)[1]}", f"{points[-1][1]:.2f} tokens"))
    if evaluation is not None:
        rows += _held_out_rows(evaluation)
    return rows


def _held_out_rows(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    names_of = {
        "recency": "recency",
        "mixed": "mixed",
        "shuffled": "shuffled gists",
        "full": "all tokens as rows",
        "bigram": "add-one bigram",
        "advantage_delta": "mixed - recency",
        "substitution_delta": "mixed - all tokens",
        "shuffled_delta": "shuffled - mixed",
    }
    horizon = evaluation["horizon"]
    losses = [
        (f"held-out loss, last {horizon} rows: {label}", f"{evaluation[key]:.3f} nats")
        for key, label in names_of.items()
        if evaluation.get(key) is not None
    ]
    return losses + [
        (f"held-out accuracy, last {horizon} rows: {names_of[key]}", f"{100 * value:.1f} %")
        for key, value in evaluation.get("accuracy", {}).items()
    ]


def draw(entries: Entries, evaluation: dict[str, Any] | None, path: Path) -> None:
    """Draw the loss by level, the last rows by variant with the held-out losses, and the rows by level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_level, last_rows, rows) = pyplot.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for axes, prefix, title in (
        (by_level, "mc/lod_loss/", "training loss by level"),
        (last_rows, "mc/nll_last/", "loss of the last rows by variant"),
        (rows, "mc/frac_level/", "share of mixed contexts' rows"),
    ):
        for name, points in sorted(series(entries, prefix).items()):
            label = name.removeprefix(prefix)
            axes.plot(*zip(*points, strict=True), label=f"level {label}" if axes is not last_rows else label)
        axes.set_title(title)
        axes.set_xlabel("iteration")
    by_level.set_ylabel("nats per row")
    for key, style in (("recency", "C0"), ("mixed", "C1"), ("full", "C2"), ("bigram", "0.5")):
        if evaluation is not None and evaluation.get(key) is not None:
            last_rows.axhline(evaluation[key], color=style, linestyle=":", label=f"held-out {key}")
    rows.set_ylim(0, 1)
    for axes in (by_level, last_rows, rows):
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of a run and write its figure beside its metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder a run was saved to (--save)")
    folder: Path = parser.parse_args(argv).folder
    if not (folder / METRICS_FILE).is_file():
        parser.error(
            f"{folder / METRICS_FILE} is missing: give the folder a run had as --save, after its first --log-interval"
        )
    entries = read_metrics(folder)
    evaluated = folder / EVALUATION_FILE
    evaluation = json.loads(evaluated.read_text()) if evaluated.is_file() else None
    if evaluation is not None and evaluation["iteration"] > entries[-1]["iteration"]:
        print(f"{evaluated} is of an earlier run and is left out")
        evaluation = None
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(folder), show_header=False)
    for label, value in table_rows(entries, evaluation):
        table.add_row(label, value)
    Console().print(table)
    draw(entries, evaluation, folder / FIGURE_FILE)
    print(f"figure: {folder / FIGURE_FILE}")


if __name__ == "__main__":
    main()
