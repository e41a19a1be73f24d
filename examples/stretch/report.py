"""The report: a table of means and standard errors over seeds, verdicts, results.json and a figure."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from examples.stretch.recipe import HELD_OUT, LORA, METHODS, NONE, SLOW, TASKS, ZERO_SHOT, Recipe
from examples.stretch.verdicts import BySeed, Records, standard_error, values, verdicts

TABLE_FILE, RESULTS_FILE, FIGURE_FILE = "table.md", "results.json", "results.png"


def shown(by_seed: BySeed) -> str:
    """Return the mean over seeds and its standard error, a dash for none."""
    if not by_seed:
        return "-"
    numbers = list(by_seed.values())
    error = standard_error(numbers)
    return f"{statistics.fmean(numbers):.4f}" + ("" if error is None else f" ± {error:.4f}")


def lines(recipe: Recipe, records: Records) -> Iterator[str]:
    """Yield the report as Markdown."""
    seeds = sorted({each["seed"] for each in records})
    yield (
        f"Nats per token of the last {recipe.last(HELD_OUT)} tokens, T = {recipe.length}, "
        f"{recipe.evaluated} held-out samples of {recipe.longest} tokens whose newest ones are the context; mean and "
        f"standard error over seeds {', '.join(map(str, seeds))}. Frequencies are stretched by context / T."
    )
    yield ""
    yield from _zero_shot(recipe, records)
    yield ""
    yield f"After {recipe.adapter_steps} steps of adapters alone on contexts of {recipe.adapted}T, measured there:"
    yield ""
    yield from _adapted(recipe, records)
    yield ""
    yield f"Tasks at {recipe.adapted}T before and after {LORA}, which was not trained on them:"
    yield ""
    yield from _tasks(recipe, records)
    yield ""
    for verdict in verdicts(records, recipe.adapted):
        yield f"- {verdict}"


def _zero_shot(recipe: Recipe, records: Records) -> Iterator[str]:
    factors = (1, *recipe.factors)
    yield "| zero-shot | " + " | ".join("T" if factor == 1 else f"{factor}T" for factor in factors) + " |"
    yield "|---|" + "---|" * len(factors)
    for method in METHODS:
        yield f"| {method} | " + " | ".join(shown(values(records, method, factor)) for factor in factors) + " |"


def _adapted(recipe: Recipe, records: Records) -> Iterator[str]:
    yield "| stretch | zero-shot | alibi-lora | change | slow-bands |"
    yield "|---|---|---|---|---|"
    for method in METHODS:
        before, after, slow = (values(records, method, recipe.adapted, kind) for kind in (ZERO_SHOT, LORA, SLOW))
        change = {seed: after[seed] - before[seed] for seed in before.keys() & after.keys()}
        yield f"| {method} | {shown(before)} | {shown(after)} | {shown(change)} | {shown(slow)} |"


def _tasks(recipe: Recipe, records: Records) -> Iterator[str]:
    yield "| task | stretch | nats before | nats after | accuracy before | accuracy after |"
    yield "|---|---|---|---|---|---|"
    for task in TASKS:
        for method in recipe.task_methods:
            figures = [
                shown(values(records, method, recipe.adapted, adapters, task, of=of))
                for of in ("loss", "accuracy")
                for adapters in (ZERO_SHOT, LORA)
            ]
            yield f"| {task} | {method} | " + " | ".join(figures) + " |"


def write(out: Path, recipe: Recipe, records: Records) -> str:
    """Write table.md, results.json and, where matplotlib is installed, results.png; returns the table."""
    table = "\n".join(lines(recipe, records)) + "\n"
    (out / TABLE_FILE).write_text(table)
    found = {
        "recipe": dataclasses.asdict(recipe),
        "records": list(records),
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts(records, recipe.adapted)],
    }
    (out / RESULTS_FILE).write_text(json.dumps(found, indent=1) + "\n")
    if find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed (the extra `analysis` brings it)")
    else:
        draw(recipe, records, out / FIGURE_FILE)
    return table


def draw(recipe: Recipe, records: Records, path: Path) -> None:
    """Draw the loss of every method over the length of contexts, and after adapters where they were trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for number, method in enumerate(METHODS):
        factors = [1, *recipe.factors]
        points = [values(records, NONE if factor == 1 else method, factor) for factor in factors]
        kept = [
            (factor * recipe.length, list(found.values()))
            for factor, found in zip(factors, points, strict=True)
            if found
        ]
        means = [statistics.fmean(found) for _, found in kept]
        errors = [standard_error(found) or 0.0 for _, found in kept]
        axes.errorbar([at for at, _ in kept], means, errors, color=f"C{number}", marker="o", capsize=3, label=method)
        after = list(values(records, method, recipe.adapted, LORA).values())
        if after:
            axes.errorbar(
                [recipe.adapted * recipe.length],
                [statistics.fmean(after)],
                [standard_error(after) or 0.0],
                color=f"C{number}",
                marker="*",
                markersize=12,
                capsize=3,
                label=f"{method}, {LORA}",
            )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of context", ylabel=f"nats per token, last {recipe.last(HELD_OUT)}")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
