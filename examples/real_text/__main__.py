"""`python -m examples.real_text`: make the corpus, train and evaluate every arm with every seed, and report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from examples.real_text import report
from examples.real_text.documents import SUFFIXES, build
from examples.real_text.recipe import ARMS, FULL, Recipe, evaluation_flags
from examples.real_text.running import Run, run_all
from megacontext_megatron.config import PLANS, ConfigError

_SIZES = {
    "source_length": "C: bytes of history; shorter documents are left out",
    "rows": "W: rows of a context",
    "block_size": "K: rows of one level in a gist of the next",
    "recent_tokens": "newest bytes that never collapse",
    "horizon": "H: last rows that are compared",
    "layers": "layers of the model",
    "hidden": "width of the model",
    "heads": "attention heads",
    "steps": "optimizer steps of every training",
    "batch_tokens": "raw bytes in a step",
    "evaluated": "held-out samples at most",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    typical = Recipe()
    made = argparse.ArgumentParser(
        prog="python -m examples.real_text",
        description=__doc__,
        epilog="Flags behind -- go to every training. Results are kept: a repeated command runs what is missing, and "
        "runs of another --source-length with the same --out come into the same report.",
    )
    add = made.add_argument
    add("--input", nargs="+", metavar="FOLDER", dest="inputs", help="folders of text, or the word stdlib")
    add("--suffixes", nargs="+", default=SUFFIXES, help=f"files to take from folders (default: {' '.join(SUFFIXES)})")
    add("--out", type=Path, required=True, help="folder of corpora, runs and the report")
    add("--arms", type=_names, default=ARMS, help=f"with commas between (default: {','.join(ARMS)})")
    add("--seeds", type=_numbers, default=(1, 2, 3), help="with commas between (default: 1,2,3)")
    add("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    for name, meaning in _SIZES.items():
        default = getattr(typical, name)
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{meaning} (default: {default})")
    add(
        "--plan",
        choices=[plan for plan in PLANS if plan != "recency"],
        default=typical.plan,
        help="which blocks collapse where models are evaluated",
    )
    add(
        "--training-plan",
        choices=[plan for plan in PLANS if plan != "recency"],
        default=typical.training_plan,
        help="the same in training",
    )
    add("--learning-rate", type=float, default=typical.learning_rate, help=f"default: {typical.learning_rate}")
    add("--init-std", type=float, default=typical.init_std, help=f"default: {typical.init_std}")
    add("--held-out", type=float, default=0.08, help="fraction of the files (default: 0.08)")
    add("--cpu", action="store_true", help="run without a GPU")
    add("--keep-checkpoints", action="store_true", help="keep them after the evaluation")
    add("--report", action="store_true", help="only write the report of the results in --out")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; 0, 1 where a run failed, 2 for a request that cannot be honoured."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    asked = parser().parse_args(own)
    try:
        failed = [] if asked.report else train(asked, tuple(more))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.write(asked.out))
    for sentence in failed:
        print(f"failed: {sentence}", file=sys.stderr)
    return int(bool(failed))


def train(asked: argparse.Namespace, more: tuple[str, ...]) -> list[str]:
    """Make the corpus and run every arm with every seed; returns a sentence for each run that failed."""
    if not asked.inputs:
        raise ConfigError("--input is needed: folders of text.")
    fields = {field.name for field in dataclasses.fields(Recipe)} & vars(asked).keys()
    on_te = not asked.cpu and find_spec("transformer_engine") is not None
    recipe = Recipe(
        **{name: getattr(asked, name) for name in fields},
        transformer_impl="transformer_engine" if on_te else "local",
        more=more,
    )
    folder = asked.out.resolve() / f"c{recipe.source_length}"
    corpus = build(
        asked.inputs, folder / "corpus", recipe.source_length, held_out=asked.held_out, suffixes=asked.suffixes
    )
    if recipe.raw_tokens > corpus.train_tokens:
        print(f"> {recipe.raw_tokens:,} tokens of training repeat the {corpus.train_tokens:,} there are")
    evaluation_flags(recipe, FULL, corpus, folder)
    runs = [
        Run(recipe=recipe, corpus=corpus, arm=arm, seed=seed, folder=folder / f"{arm}-{seed}")
        for arm in sorted(asked.arms, key=ARMS.index)
        for seed in asked.seeds
    ]
    return run_all(runs, asked.jobs, keep_checkpoints=asked.keep_checkpoints)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ARMS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(ARMS)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
