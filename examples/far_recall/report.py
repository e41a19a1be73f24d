"""What the runs gave: a table, `results.json` and a figure of the training curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.far_recall.bound import bag_bound
from examples.far_recall.recipe import Arm
from examples.far_recall.training import Experiment, Outcome

RESULTS, FIGURE = "results.json", "curves.svg"

Runs = Mapping[tuple[str, int], Outcome]
"""Trained models by arm and seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """An arm over its seeds: accuracy and nats of counted rows, and training's mean loss over its last tenth."""

    arm: str
    rows: int
    accuracy: list[float | None]
    nats: list[float | None]
    trained_to: list[float]
    seconds: list[float]


def summarise(experiment: Experiment, arms: Mapping[str, Arm], runs: Runs, seeds: Sequence[int]) -> list[ArmResult]:
    """Return the results of arms in their order; an arm without a model of its own reads the other's."""
    results = []
    for name, arm in arms.items():
        outcomes = [runs[arm.trained_as or name, seed] for seed in seeds]
        results.append(
            ArmResult(
                arm=name,
                rows=arm.rows,
                accuracy=[outcome.accuracy(arm.input) for outcome in outcomes],
                nats=[outcome.evaluation.get(arm.input) for outcome in outcomes],
                trained_to=[_end(outcome) for outcome in outcomes],
                seconds=[outcome.seconds for outcome in outcomes],
            )
        )
    return results


def _end(outcome: Outcome) -> float:
    losses = [loss for _, loss in outcome.curve]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def references(experiment: Experiment) -> dict[str, float]:
    """Return accuracies to compare with: chance, its standard error over the held-out answers, and the bag bound."""
    task = experiment.task
    answers = experiment.recipe.evaluated * task.queries * task.answer_tokens
    chance = task.chance
    known = {"chance": chance, "standard_error_of_chance": math.sqrt(chance * (1 - chance) / answers)}
    return known if task.ask == "distance" else {**known, "bag_of_symbols": bag_bound(task)}


def write_results(experiment: Experiment, results: Sequence[ArmResult], runs: Runs) -> dict[str, Any]:
    """Write results.json and return what is in it."""
    found = {
        "task": asdict(experiment.task),
        "recipe": asdict(experiment.recipe),
        "extra": list(experiment.extra),
        "references": references(experiment),
        "arms": [asdict(result) for result in results],
        "evaluations": {f"{name}-{seed}": outcome.evaluation for (name, seed), outcome in runs.items()},
        "curves": {f"{name}-{seed}": outcome.curve for (name, seed), outcome in runs.items()},
    }
    (experiment.out / RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    return found


def print_table(experiment: Experiment, results: Sequence[ArmResult]) -> None:
    """Print one line an arm: mean over seeds, and each seed."""
    from rich.console import Console
    from rich.table import Table

    recipe = experiment.recipe
    known = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in references(experiment).items())
    table = Table(title=f"answers by {experiment.task.ask}, {recipe.steps} steps of {recipe.batch}: {known}")
    for column in ("arm", "rows", "accuracy", "by seed", "nats", "trained to", "seconds"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for result in results:
        table.add_row(
            result.arm,
            str(result.rows),
            _mean(result.accuracy, 4),
            " ".join("-" if value is None else f"{value:.3f}" for value in result.accuracy),
            _mean(result.nats, 3),
            _mean(result.trained_to, 3),
            _mean(result.seconds, 0),
        )
    Console().print(table)


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else "-"


def draw_curves(experiment: Experiment, runs: Runs) -> Path:
    """Draw the training loss of every run, one colour an arm, with the loss of a guess; returns the figure's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    colours: dict[str, str] = {}
    for (name, _), outcome in runs.items():
        known = name in colours
        colour = colours.setdefault(name, f"C{len(colours)}")
        steps, losses = zip(*outcome.curve, strict=True)
        axes.plot(steps, losses, color=colour, linewidth=1, label=None if known else name)
    axes.axhline(math.log(experiment.task.values), color="grey", linestyle=":", linewidth=1, label="guess")
    axes.set(xlabel="optimizer step", ylabel="nats per answer token", title=f"Recall by {experiment.task.ask}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    path = experiment.out / FIGURE
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
