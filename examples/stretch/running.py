"""Runs of the real commands: a base for each seed, adapters on it, and one evaluation for each cell of the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.command_line import words
from examples.real_text.documents import build
from examples.stretch import sequences
from examples.stretch.commands import Commands
from examples.stretch.recipe import (
    HELD_OUT,
    LONG_COPY,
    ORDERING,
    ZERO_SHOT,
    Cell,
    Recipe,
    adapter_flags,
    base_flags,
    cells,
    evaluation_flags,
    training_flags,
)
from megacontext_megatron.config import ConfigError
from megacontext_megatron.telemetry.report import EVALUATION_FILE

RESULT_FILE = "result.json"
RECORD_FILE = "data.json"
TRACKER = "latest_checkpointed_iteration.txt"
HELD_OUT_SHARE = 0.08
TEXT_SYMBOLS = ord("a")
"""First symbol of orderings among bytes."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Prefixes of the data sets: to train a base and adapters, and to measure by the names of recipe.

    `inputs` are the folders of text, none for generated data.
    """

    inputs: list[str]
    train: str
    adapt: str
    measured: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What all runs share: recipe, folder, data, what runs commands, and flags added to every training."""

    recipe: Recipe
    out: Path
    data: Data
    run: Commands
    extra: tuple[str, ...] = ()

    def folder(self, seed: int) -> Path:
        """Return the folder of a seed's runs."""
        return self.out / f"seed-{seed}"


def prepare_data(recipe: Recipe, out: Path, inputs: Sequence[str]) -> Data:
    """Write all data sets to `out`, unless the same ones are there; raises ConfigError where text is too short."""
    folder = out / "data"
    record = folder / RECORD_FILE
    wanted = {"recipe": repr(recipe), "inputs": list(inputs)}
    if record.exists():
        known = json.loads(record.read_text())
        if known["wanted"] == wanted:
            return Data(**known["data"])
    text = None
    if recipe.text:
        corpus = build(inputs, folder / "corpus", recipe.longest, held_out=HELD_OUT_SHARE)
        available = (corpus.valid_tokens - 1) // recipe.longest
        if available < recipe.evaluated:
            raise ConfigError(
                f"--input: held-out files hold {available} samples of {recipe.longest} bytes, and "
                f"{recipe.evaluated} are wanted: give more text, or --set evaluated={available}."
            )
        data = Data(inputs=list(inputs), train=corpus.train, adapt=corpus.train, measured={HELD_OUT: corpus.valid})
        text = sequences.read_tokens(corpus.valid)
    else:
        data = _generated(recipe, folder)
    data.measured.update(_tasks(recipe, folder, text))
    record.write_text(json.dumps({"wanted": wanted, "data": asdict(data)}))
    return data


def _generated(recipe: Recipe, folder: Path) -> Data:
    at = recipe.adapted
    sizes = {
        "train": (recipe.batch * recipe.steps, recipe.length),
        "adapt": (recipe.batch // at * recipe.adapter_steps, recipe.length * at),
        HELD_OUT: (recipe.evaluated, recipe.longest),
    }
    for number, (name, (count, length)) in enumerate(sizes.items()):
        bodies = sequences.mixture(count, length, np.random.default_rng(number))
        sequences.write(folder / name, bodies, recipe.vocabulary)
    train, adapt, held_out = (str(folder / name) for name in sizes)
    return Data(inputs=[], train=train, adapt=adapt, measured={HELD_OUT: held_out})


def _tasks(recipe: Recipe, folder: Path, text: sequences.Tokens | None) -> dict[str, str]:
    count, length = recipe.evaluated, recipe.source(ORDERING)
    first = TEXT_SYMBOLS if recipe.text else 0
    bodies = {
        LONG_COPY: sequences.long_copy(count, length, np.random.default_rng(10), recipe.length, text),
        ORDERING: sequences.ordering(count, length, np.random.default_rng(11), first),
    }
    for name, drawn in bodies.items():
        sequences.write(folder / name, drawn, recipe.vocabulary)
    return {name: str(folder / name) for name in bodies}


def run_all(experiment: Experiment, seeds: Sequence[int], jobs: int, *, keep_checkpoints: bool) -> list[Record]:
    """Train and measure what is missing, `jobs` commands at a time; returns the records of all cells of all seeds.

    A finished measurement is kept.  Raises ConfigError, naming the log, where a command fails.
    """
    wanted = [(seed, cell) for seed in seeds for cell in cells(experiment.recipe)]
    missing = [(seed, cell) for seed, cell in wanted if _kept(experiment, seed, cell) is None]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} measurements kept", flush=True)
    # Bases first, then adapters, so that whatever a job needs is there.
    bases = list(dict.fromkeys(seed for seed, _ in missing))
    adapted = list(dict.fromkeys((seed, cell.method, cell.adapters) for seed, cell in missing if cell.model != "base"))
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            list(pool.map(lambda seed: train_base(experiment, seed), bases))
            list(pool.map(lambda item: train_adapters(experiment, *item), adapted))
            list(pool.map(lambda item: measure(experiment, *item), missing))
        except ConfigError:
            pool.shutdown(cancel_futures=True)
            raise
    if not keep_checkpoints:
        for seed in seeds:
            shutil.rmtree(experiment.folder(seed) / "models", ignore_errors=True)
    return [_record(experiment, seed, cell) for seed, cell in wanted]


def train_base(experiment: Experiment, seed: int) -> None:
    """Train a seed's base with Megatron's own rope, unless its checkpoint is there."""
    flags = {**base_flags(experiment.recipe), **training_flags(experiment.recipe, seed)}
    _train(experiment, seed, "base", [*words(flags), "--train-data-path", experiment.data.train])


def train_adapters(experiment: Experiment, seed: int, method: str, adapters: str) -> None:
    """Train a method's adapters on a seed's frozen base, unless their checkpoint is there."""
    recipe = experiment.recipe
    base = _model_folder(experiment, seed, "base")
    flags = {
        **base_flags(recipe),
        **training_flags(recipe, seed, recipe.adapted),
        **adapter_flags(recipe, method, adapters, base),
    }
    _train(experiment, seed, f"{adapters}-{method}", [*words(flags), "--train-data-path", experiment.data.adapt])


def _train(experiment: Experiment, seed: int, model: str, line: Sequence[str]) -> None:
    folder = _model_folder(experiment, seed, model)
    line = [*line, *experiment.extra]
    identity = folder / "line.json"
    if (folder / TRACKER).exists() and identity.exists() and json.loads(identity.read_text()) == line:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    places = ["--save", str(folder), "--data-cache-path", str(folder / "cache")]
    seconds = experiment.run("pretrain", [*line, *places], experiment.folder(seed) / f"{model}.log")
    identity.write_text(json.dumps(line))
    print(f"seed {seed}, {model}: {seconds:.0f} s", flush=True)


def measure(experiment: Experiment, seed: int, cell: Cell) -> None:
    """Evaluate one cell and write its result."""
    folder = experiment.folder(seed) / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Evaluations of one checkpoint write beside it, so each has a folder of its own that points at it.
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for path in _model_folder(experiment, seed, cell.model).glob("*"):
        if path.name.startswith(("iter_", TRACKER)):
            (checkpoint / path.name).symlink_to(path)
    flags = words(evaluation_flags(experiment.recipe, cell))
    data = ["--valid-data-path", experiment.data.measured[cell.data]]
    places = ["--load", str(checkpoint), "--data-cache-path", str(folder / "cache")]
    seconds = experiment.run("evaluate", [*flags, *data, *places], folder / "log")
    evaluation = json.loads((checkpoint / EVALUATION_FILE).read_text())
    shutil.rmtree(folder / "cache", ignore_errors=True)
    shutil.rmtree(checkpoint)
    result = {"identity": _identity(experiment, seed, cell), "evaluation": evaluation, "seconds": seconds}
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
    print(f"seed {seed}, {cell.name}: {evaluation['recency']:.4f}", flush=True)


def _identity(experiment: Experiment, seed: int, cell: Cell) -> list[str]:
    """Return all that a cell's result follows from: the command lines before it, its own, and the text."""
    recipe = experiment.recipe
    lines = [{**base_flags(recipe), **training_flags(recipe, seed)}]
    if cell.adapters != ZERO_SHOT:
        added = adapter_flags(recipe, cell.method, cell.adapters, Path("base"))
        lines.append({**training_flags(recipe, seed, recipe.adapted), **added})
    lines.append(evaluation_flags(recipe, cell))
    return [*(word for line in lines for word in words(line)), *experiment.extra, *experiment.data.inputs]


def _kept(experiment: Experiment, seed: int, cell: Cell) -> Record | None:
    path = experiment.folder(seed) / cell.name / RESULT_FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("identity") == _identity(experiment, seed, cell) else None


def _record(experiment: Experiment, seed: int, cell: Cell) -> Record:
    found = _kept(experiment, seed, cell)
    assert found is not None
    evaluation = found["evaluation"]
    return {
        "seed": seed,
        **asdict(cell),
        "loss": evaluation["recency"],
        "accuracy": evaluation["accuracy"]["recency"],
        "error": evaluation["errors"]["recency"],
    }


def _model_folder(experiment: Experiment, seed: int, model: str) -> Path:
    return experiment.folder(seed).resolve() / "models" / model


def _training_data(prefix: str) -> list[str]:
    return ["--train-data-path", prefix]
