"""Runs of the real commands: train an arm, evaluate its checkpoint, and collect what both wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.command_line import words
from examples.far_recall.documents import write_dataset
from examples.far_recall.recipe import Arm, Recipe, training_flags
from examples.far_recall.task import Task
from megacontext_megatron.config import ConfigError
from megacontext_megatron.telemetry.report import EVALUATION_FILE
from megacontext_megatron.telemetry.sinks import read_metrics

ROOT = Path(__file__).parents[2]
TRAINING_SEED, HELD_OUT_SEED = 1, 2
RECORD = "data.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What all runs of a table share: task, recipe, folder, and flags added to every training and evaluation."""

    task: Task
    recipe: Recipe
    out: Path
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A trained model: the loss of every logged step, and what evaluate wrote.

    `curve` holds pairs (step, nats per counted row); `seconds` is the wall time of the training command.
    """

    curve: list[tuple[int, float]]
    evaluation: dict[str, Any]
    seconds: float

    def accuracy(self, name: str) -> float | None:
        """Return the accuracy with an input of evaluate, None where evaluate did not measure it."""
        return self.evaluation.get("accuracy", {}).get(name)


def prepare_data(experiment: Experiment) -> None:
    """Write training and held-out documents, unless the same ones are there."""
    folder, recipe = experiment.out / "data", experiment.recipe
    wanted = {"task": repr(experiment.task), "documents": recipe.documents, "evaluated": recipe.evaluated}
    record = folder / RECORD
    if record.exists() and json.loads(record.read_text()) == wanted:
        return
    write_dataset(folder / "train", experiment.task, recipe.documents, TRAINING_SEED)
    # A raw sample's last label is another document's token, so one more document than samples.
    held_out = replace(experiment.task, copies=(1,))
    write_dataset(folder / "valid", held_out, recipe.evaluated + 1, HELD_OUT_SEED)
    record.write_text(json.dumps(wanted))


def run_arm(experiment: Experiment, name: str, arm: Arm, seed: int) -> Outcome:
    """Train an arm and evaluate it; a run whose outcome is in its folder is not repeated.

    Raises ConfigError, naming the log, where a command fails.
    """
    folder = experiment.out / f"{name}-{seed}"
    checkpoints, result = folder / "checkpoints", folder / "outcome.json"
    flags = {**training_flags(experiment.task, experiment.recipe, arm, seed), **_data(experiment.out)}
    line = [*words(flags), *experiment.extra]
    settings = [repr(experiment.task), repr(experiment.recipe), *line]
    known = json.loads(result.read_text()) if result.exists() else {}
    if known.get("settings") != settings:
        folder.mkdir(parents=True, exist_ok=True)
        places = ["--save", str(checkpoints), "--tensorboard-dir", str(folder / "tensorboard")]
        seconds = launch("pretrain", [*line, *places], folder / "training.log")
        launch("evaluate", _evaluation(experiment, arm, checkpoints), folder / "evaluation.log")
        curve = [(int(entry["iteration"]), entry["lm loss"]) for entry in read_metrics(checkpoints)]
        evaluated = json.loads((checkpoints / EVALUATION_FILE).read_text())
        known = {"settings": settings, "curve": curve, "evaluation": evaluated, "seconds": seconds}
        result.write_text(json.dumps(known))
    return Outcome(curve=known["curve"], evaluation=known["evaluation"], seconds=known["seconds"])


def launch(module: str, line: Sequence[str], log: Path) -> float:
    """Run `python -m megacontext_megatron.MODULE` through scripts/train.sh in one process; returns its seconds.

    Raises ConfigError, naming the log, if it fails.
    """
    environment = {
        **os.environ,
        "MC_RUNTIME": os.environ.get("MC_RUNTIME", sys.executable),
        "MC_MODULE": f"megacontext_megatron.{module}",
        "NPROC_PER_NODE": "1",
    }
    started = time.monotonic()
    with log.open("w") as stream:
        command = ["bash", str(ROOT / "scripts" / "train.sh"), *line]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ConfigError(f"{module} failed with exit code {done.returncode}: read {log}.")
    return time.monotonic() - started


def _evaluation(experiment: Experiment, arm: Arm, checkpoints: Path) -> list[str]:
    samples = ["--mc-eval-samples", str(experiment.recipe.evaluated)]
    inputs = ["recency"] if arm.input == "recency" else ["recency", "mixed", "shuffled"]
    return ["--load", str(checkpoints), *samples, "--mc-eval-inputs", *inputs]


def _data(out: Path) -> Mapping[str, str]:
    folder = out.resolve() / "data"
    return {
        "train_data_path": str(folder / "train"),
        "valid_data_path": str(folder / "valid"),
        "data_cache_path": str(folder / "cache"),
    }
