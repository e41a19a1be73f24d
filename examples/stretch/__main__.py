"""`python -m examples.stretch`: train bases, measure every stretch of them, train adapters, and report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.stretch import report
from examples.stretch.commands import Commands
from examples.stretch.recipe import FIELDS, TIERS, Recipe
from examples.stretch.running import Experiment, prepare_data, run_all
from megacontext_megatron.config import ConfigError


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m examples.stretch",
        description=__doc__,
        epilog="Results are kept: a repeated command runs what is missing.",
    )
    out.add_argument(
        "--tier", choices=tuple(TIERS), default="cpu", help="generated data and two cores, or text and a GPU"
    )
    out.add_argument("--out", type=Path, required=True, help="folder of data, runs and results")
    out.add_argument("--seeds", default="1,2,3", help="seeds of the bases, separated by commas")
    out.add_argument("--jobs", type=int, default=1, help="commands at a time; on one GPU they share it")
    out.add_argument("--input", nargs="+", default=["stdlib"], help="gpu tier: folders of text (default: stdlib)")
    out.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of Recipe, steps=500 for example"
    )
    out.add_argument("--keep-checkpoints", action="store_true", help="keep bases and adapters after the report")
    out.add_argument("extra", nargs="*", help="behind --: flags added to every training")
    return out


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the recipe that parsed options describe; raises ConfigError for a field that it does not have."""
    changes = dict(_assignment(text) for text in options.set)
    if unknown := sorted(changes.keys() - set(FIELDS)):
        raise ConfigError(f"--set {', '.join(unknown)} is no field of Recipe.")
    return dataclasses.replace(TIERS[options.tier], **changes)


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name == "task_methods":
        return name, tuple(value.split(","))
    try:
        numbers = tuple(float(part) if set(part) & set(".e") else int(part) for part in value.split(","))
    except ValueError:
        raise ConfigError(f"--set {text} must be NAME=NUMBER, or several numbers separated by commas.") from None
    return name, numbers if name == "factors" else numbers[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line describes."""
    options = parser().parse_args(argv)
    try:
        recipe = recipe_of(options)
        out = options.out.resolve()
        data = prepare_data(recipe, out, options.input)
        experiment = Experiment(
            recipe=recipe, out=out, data=data, run=Commands(cpu=recipe.cpu), extra=tuple(options.extra)
        )
        seeds = [int(seed) for seed in options.seeds.split(",")]
        records = run_all(experiment, seeds, options.jobs, keep_checkpoints=options.keep_checkpoints)
    except ConfigError as error:
        sys.exit(f"{parser().prog}: error: {error}")
    print(report.write(out, recipe, records))


if __name__ == "__main__":
    main()
