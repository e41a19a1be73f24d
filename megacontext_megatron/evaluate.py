"""`python -m megacontext_megatron.evaluate --load CHECKPOINT`: what collapsed history is worth.

Computes loss and accuracy of the last H rows of held-out samples for inputs with the same targets: the newest W tokens
(recency), W rows that mix tokens and gists (mixed), the same with gists exchanged (shuffled), and all C tokens as rows
(full).  Model, tokenizer and data come from the checkpoint unless flags say otherwise; runs in one process or under
torchrun in any layout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacontext_megatron.argv import value_of
from megacontext_megatron.config import ConfigError
from megacontext_megatron.pretrain import exit_with, prepare
from megacontext_megatron.telemetry import names
from megacontext_megatron.telemetry.report import EVALUATION_FILE

FIXED_FLAGS = (
    "--use-checkpoint-args",
    "--no-load-optim",
    "--no-load-rng",
    "--exit-on-missing-checkpoint",
    "--skip-train",
)

FROM_CHECKPOINT = (
    "micro_batch_size",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_size",
    "null_tokenizer_eod_id",
    "null_tokenizer_pad_id",
    "make_vocab_size_divisible_by",
    "data_cache_path",
    "seed",
    "eod_mask_loss",
    "mc_loss_after_token",
    "transformer_impl",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "no_persist_layer_norm",
    "bf16",
    "fp16",
)
"""Arguments taken from the checkpoint in addition to those that shape the model's function."""

DATA = (
    "data_path",
    "data_args_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "per_split_data_args_path",
)
"""Arguments that name the data: all taken from the checkpoint, or, where one is typed, none."""

SPLIT = ("split", "mock_data")
"""Arguments that belong to the checkpoint's data."""


INPUTS = {
    "recency": "recency",
    "mixed": "mixed",
    "full": "full",
    "shuffled": "shuffled gists",
}
"""The inputs by name, and what the table calls them."""

DELTAS = {
    "advantage_delta": "advantage delta (mixed - recency)",
    "substitution_delta": "substitution delta (mixed - full)",
    "shuffled_delta": "shuffled delta (shuffled - mixed)",
}
"""Differences between inputs, by name, and what the table calls them; negative ones speak for what comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over samples and its standard error, None where a single sample gives none."""

    value: float
    error: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What was measured of the last `horizon` rows; what was not evaluated is absent.

    `losses` are in nats per token, by the names of INPUTS and DELTAS.  `accuracy` is the share of rows whose label is
    the most likely token, by input.  `probes` are differences in loss by metric.  `shuffled_across_samples` says
    whether shuffled gists are of other samples.
    """

    iteration: int
    samples: int
    source_length: int
    window: int
    horizon: int
    losses: dict[str, Estimate]
    accuracy: dict[str, Estimate]
    probes: dict[str, Estimate]
    bigram: float | None
    shuffled_across_samples: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything by name, None where it was not evaluated; deltas under those of telemetry.names too."""
        shape = ("iteration", "samples", "source_length", "window", "horizon", "bigram", "shuffled_across_samples")
        losses = {name: self._loss(name) for name in (*INPUTS, *DELTAS)}
        errors: dict[str, Any] = {name: each.error for name, each in self.losses.items()}
        errors["accuracy"] = {name: each.error for name, each in self.accuracy.items()}
        metrics = {
            names.ADVANTAGE.at(): losses["advantage_delta"],
            names.SUBSTITUTION.at(H=self.horizon): losses["substitution_delta"],
            names.SHUFFLED.at(): losses["shuffled_delta"],
        }
        errors["probes"] = {name: each.error for name, each in self.probes.items()}
        metrics |= {name: each.value for name, each in self.probes.items()}
        accuracy = {name: each.value for name, each in self.accuracy.items()}
        given = {name: getattr(self, name) for name in shape}
        return {**given, **losses, "accuracy": accuracy, "errors": errors, **metrics}

    def _loss(self, name: str) -> float | None:
        return self.losses[name].value if name in self.losses else None


def restored_arguments(words: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments to take from the checkpoint: those of its data too, unless the command line names data."""
    names_data = any(value_of(words, f"--{name.replace('_', '-')}") is not None for name in DATA)
    return FROM_CHECKPOINT if names_data else (*FROM_CHECKPOINT, *DATA, *SPLIT)


def launch_alone() -> None:
    """Stand in for torchrun where the command was started without it."""
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a checkpoint; prints a table and writes `evaluation.json` beside the checkpoints."""
    words = list(sys.argv[1:] if argv is None else argv)
    launch_alone()
    try:
        if value_of(words, "--load") is None and "--help" not in words and "-h" not in words:
            raise ConfigError("--load is needed: the folder of the checkpoint to evaluate.")
        prepare([*words, *FIXED_FLAGS])
        from megacontext_megatron.arguments import add_evaluation_arguments, check_rows_divide
        from megacontext_megatron.evaluation import evaluate
        from megacontext_megatron.run import parse

        args, settings = parse(add_evaluation_arguments, restored_arguments(words))
        if "full" in args.mc_eval_inputs:
            check_rows_divide(args, "--mc-source-length", settings.context.source_length)
        evaluation = evaluate(args, settings)
    except ConfigError as error:
        exit_with(error)
        return
    if args.rank == 0:
        path = Path(args.load) / EVALUATION_FILE
        path.write_text(json.dumps(evaluation.as_dict(), indent=1) + "\n")
        print_table(evaluation)
        print(f"written to {path}")
    from torch.distributed import destroy_process_group

    destroy_process_group()


def print_table(evaluation: Evaluation) -> None:
    """Print losses and accuracies as a table, with standard errors over samples."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"held-out loss of the last {evaluation.horizon} rows, iteration {evaluation.iteration}, "
        f"{evaluation.samples} samples"
    )
    for column in ("input", "rows", "tokens of history", "nats per token", "accuracy"):
        table.add_column(column, justify="left" if column == "input" else "right")
    window, source = str(evaluation.window), str(evaluation.source_length)
    lengths = {"recency": (window, window), "full": (source, source)}
    for name, label in INPUTS.items():
        if name in evaluation.losses:
            accuracy = evaluation.accuracy.get(name)
            table.add_row(
                label,
                *lengths.get(name, (window, source)),
                shown(evaluation.losses[name]),
                shown(accuracy) if accuracy else "",
            )
    if evaluation.bigram is not None:
        table.add_row("bigram, add one", "1", "1", f"{evaluation.bigram:.4f}", "")
    for name, label in DELTAS.items():
        if name in evaluation.losses:
            table.add_row(label, "", "", shown(evaluation.losses[name]), "")
    for name, delta in evaluation.probes.items():
        table.add_row(name, "", "", shown(delta), "")
    Console().print(table)


def shown(estimate: Estimate) -> str:
    """Return a mean with its standard error."""
    error = "" if estimate.error is None else f" ± {estimate.error:.4f}"
    return f"{estimate.value:.4f}{error}"


if __name__ == "__main__":
    main()
