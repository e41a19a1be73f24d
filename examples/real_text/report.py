"""The report: losses by input and model with their spread over seeds, what gists close of the gap, table and figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.real_text.recipe import FULL, GISTNET, MEAN, NEWEST
from examples.real_text.running import RESULT_FILE

RESULTS_FILE = "results.json"
TABLE_FILE = "results.md"
FIGURE_FILE = "results.png"

Results = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One line of the table: a model's loss for one input, by the name that the evaluation gives it."""

    label: str
    arm: str
    key: str

    def rows_and_tokens(self, recipe: Mapping[str, Any]) -> tuple[int, int]:
        """Return the rows of the input, and the tokens of history they stand for."""
        window, source = recipe["rows"], recipe["source_length"]
        if self.key == NEWEST or (self.key == "recency" and self.arm != FULL):
            return window, window
        return (source if self.key == "full" or self.arm == FULL else window), source


INPUTS = (
    Input(label="mean gists: recency", arm=MEAN, key="recency"),
    Input(label="mean gists: mixed", arm=MEAN, key="mixed"),
    Input(label="mean gists: shuffled", arm=MEAN, key="shuffled"),
    Input(label="mean gists: same weights, all rows", arm=MEAN, key="full"),
    Input(label="GistNet: recency", arm=GISTNET, key="recency"),
    Input(label="GistNet: mixed", arm=GISTNET, key="mixed"),
    Input(label="GistNet: shuffled", arm=GISTNET, key="shuffled"),
    Input(label="GistNet: same weights, all rows", arm=GISTNET, key="full"),
    # a run whose rows are all tokens has one input, which evaluate calls recency
    Input(label="trained on all rows", arm=FULL, key="recency"),
    Input(label="trained on all rows: newest rows", arm=FULL, key=NEWEST),
)
_DERIVED = {
    "gap closed by GistNet": ("share of (recency - trained on all rows)", GISTNET),
    "gap closed by mean gists": ("share of (recency - trained on all rows)", MEAN),
}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results below a folder, by source length, arm and seed."""
    found = [json.loads(path.read_text()) for path in sorted(folder.rglob(RESULT_FILE))]
    return sorted(found, key=lambda result: (result["recipe"]["source_length"], result["arm"], result["seed"]))


def by_length(results: Results) -> dict[int, list[Mapping[str, Any]]]:
    """Return the results of each source length."""
    lengths: dict[int, list[Mapping[str, Any]]] = {}
    for result in results:
        lengths.setdefault(result["recipe"]["source_length"], []).append(result)
    return lengths


def losses(results: Results, arm: str, key: str) -> dict[int, float]:
    """Return an arm's loss for one input by seed."""
    return {
        result["seed"]: result["evaluation"][key]
        for result in results
        if result["arm"] == arm and result["evaluation"].get(key) is not None
    }


def gap_closed(results: Results, arm: str) -> dict[int, float]:
    """Return, by seed, which share of the gap between its recency and a model trained on all rows an arm's gists close.

    Negative where gists do harm.  A seed without a gap, where training on all rows gave no lower loss, has no share.
    """
    recency, mixed, full = (
        losses(results, arm, "recency"),
        losses(results, arm, "mixed"),
        losses(results, FULL, "recency"),
    )
    return {
        seed: (recency[seed] - mixed[seed]) / (recency[seed] - full[seed])
        for seed in recency.keys() & mixed.keys() & full.keys()
        if recency[seed] > full[seed]
    }


def relative_substitution(results: Results, arm: str) -> dict[int, float]:
    """Return, by seed, by how much of it an arm's mixed loss is above that of the same weights on all rows."""
    mixed, full = losses(results, arm, "mixed"), losses(results, arm, "full")
    return {seed: mixed[seed] / full[seed] - 1.0 for seed in mixed.keys() & full.keys()}


def spread(values: Mapping[int, float], *, percent: bool = False) -> str:
    """Return the mean over seeds and their standard deviation, where there are several."""
    if not values:
        return "-"
    scale, digits, unit = (100.0, 1, " %") if percent else (1.0, 4, "")
    mean = statistics.fmean(values.values()) * scale
    if len(values) == 1:
        return f"{mean:.{digits}f}{unit}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values.values()) * scale:.{digits}f}{unit}"


def table_lines(results: Results) -> Iterator[str]:
    """Yield the report as Markdown, a section for each source length."""
    for length, some in by_length(results).items():
        recipe, evaluation = some[0]["recipe"], some[0]["evaluation"]
        yield f"## {length} bytes in {recipe['rows']} rows"
        yield ""
        yield (
            f"Nats per byte of the last {evaluation['horizon']} rows, {evaluation['samples']} held-out samples; mean "
            "and standard deviation over seeds."
        )
        yield ""
        yield from _loss_lines(some)
        yield ""
        yield from _training_lines(some)
        yield ""
        yield from _derived_lines(some)
        yield ""


def _loss_lines(results: Results) -> Iterator[str]:
    yield "| input | rows | bytes of history | seeds | loss | standard error over samples |"
    yield "|---|---|---|---|---|---|"
    for line in INPUTS:
        found = losses(results, line.arm, line.key)
        if found:
            rows, tokens = line.rows_and_tokens(results[0]["recipe"])
            errors = [
                error
                for result in results
                if result["arm"] == line.arm and (error := result["evaluation"].get("errors", {}).get(line.key))
            ]
            error = f"{statistics.fmean(errors):.4f}" if errors else ""
            yield f"| {line.label} | {rows} | {tokens} | {len(found)} | {spread(found)} | {error} |"


def _training_lines(results: Results) -> Iterator[str]:
    yield "| training | parameters | steps | rows | raw bytes | ms a step | seconds with evaluation |"
    yield "|---|---|---|---|---|---|---|"
    for arm in (MEAN, GISTNET, FULL):
        some = [result for result in results if result["arm"] == arm]
        if some:
            first = some[0]
            numbers = (f"{first[name]:,}" for name in ("parameters", "steps", "rows", "raw_tokens"))
            times = (statistics.median(result[name] for result in some) for name in ("step_ms", "seconds"))
            yield "| " + " | ".join([arm, *numbers, *(f"{value:.0f}" for value in times)]) + " |"


def _derived_lines(results: Results) -> Iterator[str]:
    corpus = results[0]["corpus"]
    yield (
        f"- text: {corpus['train_documents']:,} files of at least {corpus['least_bytes']:,} bytes to train on "
        f"({corpus['train_tokens']:,} tokens), {corpus['valid_documents']:,} held out ({corpus['valid_tokens']:,}); "
        f"{corpus['too_short']:,} shorter ones and {corpus['repeated']:,} repeated ones left out"
    )
    for label, (meaning, arm) in _DERIVED.items():
        shares = gap_closed(results, arm)
        of = f", {len(shares)} of {len(losses(results, arm, 'mixed'))} seeds have a gap" if shares else ": no gap"
        yield f"- {label}: {spread(shares, percent=True)} ({meaning}{of})"
    for label, arm in (("GistNet", GISTNET), ("mean gists", MEAN)):
        found = relative_substitution(results, arm)
        yield f"- {label}, mixed above the same weights on all rows: {spread(found, percent=True)}"


def summary(results: Results) -> list[dict[str, Any]]:
    """Return the figures of the table by source length, each by seed, as JSON holds them."""
    return [
        {
            "source_length": length,
            "losses": {line.label: losses(some, line.arm, line.key) for line in INPUTS},
            "gap_closed": {arm: gap_closed(some, arm) for arm in (GISTNET, MEAN)},
            "relative_substitution": {arm: relative_substitution(some, arm) for arm in (GISTNET, MEAN)},
        }
        for length, some in by_length(results).items()
    ]


def draw(results: Results, path: Path) -> None:
    """Draw every input's loss, a point for each seed and a line at their mean, one panel for each source length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = by_length(results)
    figure, axes = pyplot.subplots(
        1, len(lengths), figsize=(7 * len(lengths), 4.5), squeeze=False, constrained_layout=True
    )
    for axis, (length, some) in zip(axes[0], lengths.items(), strict=True):
        colours = {MEAN: "tab:orange", GISTNET: "tab:green", FULL: "tab:blue"}
        for place, line in enumerate(INPUTS):
            values = list(losses(some, line.arm, line.key).values())
            if values:
                mean = statistics.fmean(values)
                axis.hlines(mean, place - 0.3, place + 0.3, color=colours[line.arm])
                axis.plot([place] * len(values), values, "o", color=colours[line.arm], alpha=0.6)
                axis.annotate(f"{mean:.3f}", (place + 0.3, mean), fontsize=7, va="center")
        axis.set_xticks(range(len(INPUTS)), [line.label for line in INPUTS], rotation=30, ha="right", fontsize=7)
        axis.set_ylabel(f"nats per byte, last {some[0]['evaluation']['horizon']} rows")
        axis.set_title(f"{length} bytes in {some[0]['recipe']['rows']} rows")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(folder: Path) -> str:
    """Write results.json, the table and the figure of everything below a folder; returns the table."""
    results = read_results(folder)
    table = "\n".join(table_lines(results))
    (folder / TABLE_FILE).write_text(table)
    document = {"summary": summary(results), "runs": results}
    (folder / RESULTS_FILE).write_text(json.dumps(document, indent=1) + "\n")
    if results:
        try:
            draw(results, folder / FIGURE_FILE)
        except ImportError:
            print("no figure: matplotlib is absent; --report draws it where it is not")
    return table
