"""`python -m examples.far_recall`: make the documents, train and evaluate every arm, and show what they recall."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples.far_recall.recipe import TIERS, Arm, Recipe, arms
from examples.far_recall.report import Runs, draw_curves, print_table, summarise, write_results
from examples.far_recall.task import Task
from examples.far_recall.training import Experiment, prepare_data, run_arm
from megacontext_megatron.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(prog="python -m examples.far_recall", description=__doc__)
    out.add_argument("--tier", choices=("cpu", "gpu"), default="cpu", help="size of documents and model")
    out.add_argument("--ask", choices=("content", "distance"), default="content", help="what queries ask for")
    out.add_argument("--arms", default="", help="arms, separated by commas (default: all)")
    out.add_argument("--seeds", default="1,2,3", help="seeds, separated by commas")
    out.add_argument("--out", type=Path, required=True, help="folder of documents, runs and results")
    out.add_argument("--jobs", type=int, default=1, help="trainings at a time; on one GPU they share it")
    out.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of Task or Recipe, steps=500 for example"
    )
    out.add_argument("extra", nargs="*", help="behind --: flags added to every training")
    return out


def experiment_of(options: argparse.Namespace) -> Experiment:
    """Return the experiment that parsed options describe; raises ConfigError for an unknown field."""
    task, recipe = TIERS[options.tier, options.ask]
    changes = dict(_assignment(text) for text in options.set)
    for_task = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(Task)}}
    for_recipe = {k: v for k, v in changes.items() if k in {f.name for f in dataclasses.fields(Recipe)}}
    unknown = changes.keys() - for_task.keys() - for_recipe.keys()
    if unknown:
        raise ConfigError(f"--set {', '.join(sorted(unknown))} is no field of Task or Recipe.")
    return Experiment(
        task=dataclasses.replace(task, **for_task),
        recipe=dataclasses.replace(recipe, **for_recipe),
        out=options.out,
        extra=tuple(options.extra),
    )


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        numbers = tuple(float(part) if set(part) & set(".e") else int(part) for part in value.split(","))
    except ValueError:
        raise ConfigError(f"--set {text} must be NAME=NUMBER, or several numbers separated by commas.") from None
    return name, numbers if name == "copies" else numbers[0]


def chosen_arms(experiment: Experiment, names: str) -> dict[str, Arm]:
    """Return the arms that a list names, all for an empty one; raises ConfigError for one that does not exist."""
    known = arms(experiment.task, experiment.recipe)
    wanted = names.split(",") if names else list(known)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--arms {name} is unknown: the arms are {', '.join(known)}.")
    return {name: known[name] for name in wanted}


def train_all(experiment: Experiment, chosen: Mapping[str, Arm], seeds: Sequence[int], jobs: int) -> Runs:
    """Train and evaluate every arm that has a model of its own, for each seed, `jobs` at a time."""
    known = arms(experiment.task, experiment.recipe)
    names = list(dict.fromkeys(arm.trained_as or name for name, arm in chosen.items()))
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        pending = {
            (name, seed): pool.submit(run_arm, experiment, name, known[name], seed) for seed in seeds for name in names
        }
        return {key: future.result() for key, future in pending.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes."""
    options = parser().parse_args(argv)
    try:
        experiment = experiment_of(options)
        chosen = chosen_arms(experiment, options.arms)
        seeds = [int(seed) for seed in options.seeds.split(",")]
        experiment.out.mkdir(parents=True, exist_ok=True)
        prepare_data(experiment)
        runs = train_all(experiment, chosen, seeds, options.jobs)
    except ConfigError as error:
        sys.exit(f"{parser().prog}: error: {error}")
    results = summarise(experiment, chosen, runs, seeds)
    write_results(experiment, results, runs)
    print_table(experiment, results)
    if find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed (the extra `analysis` brings it)")
    else:
        print(draw_curves(experiment, runs))


if __name__ == "__main__":
    main()
