"""`python -m megacontext_megatron.evaluate --load CHECKPOINT`: what collapsed history is worth.

Computes the loss of the last H rows of held-out samples for three inputs with the same targets: the newest W tokens
(recency), W rows that mix tokens and gists (mixed), and all C tokens as rows (full).  Model, tokenizer and data come
from the checkpoint unless flags say otherwise; runs in one process or under torchrun in any layout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacontext_megatron.argv import value_of
from megacontext_megatron.config import NLL_LAST, ConfigError, ContextConfig, Settings
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Losses in nats per token of the last `horizon` rows; None for what was not evaluated."""

    iteration: int
    samples: int
    source_length: int
    window: int
    horizon: int
    recency: float
    mixed: float | None
    full: float | None
    bigram: float | None

    @property
    def advantage_delta(self) -> float | None:
        """Mixed minus recency: negative where collapsed history helps."""
        return None if self.mixed is None else self.mixed - self.recency

    @property
    def substitution_delta(self) -> float | None:
        """Mixed minus full: what gists lose against the tokens they stand for."""
        return None if self.mixed is None or self.full is None else self.mixed - self.full

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and both deltas, under their own names and under those of telemetry.names."""
        deltas = {"advantage_delta": self.advantage_delta, "substitution_delta": self.substitution_delta}
        metrics = {
            names.ADVANTAGE.at(): self.advantage_delta,
            names.SUBSTITUTION.at(H=self.horizon): self.substitution_delta,
        }
        return {**dataclasses.asdict(self), **deltas, **metrics}


def contexts_to_evaluate(context: ContextConfig) -> dict[str, ContextConfig]:
    """Return the context of each input by name; a run without collapsed history has only one."""
    if context.source_length == context.window:
        return {"recency": context}
    recency = dataclasses.replace(context, variants=1, plan="recency")
    full = dataclasses.replace(recency, window=context.source_length)
    try:
        mixed = dataclasses.replace(recency, plan="random" if context.plan == "recency" else context.plan)
    except ConfigError as error:
        print(f"> no mixed contexts: {error}")
        return {"recency": recency, "full": full}
    return {"recency": recency, "mixed": mixed, "full": full}


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
        from megacontext_megatron.run import parse

        args, settings = parse(add_evaluation_arguments, restored_arguments(words))
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


def evaluate(args: argparse.Namespace, settings: Settings) -> Evaluation:
    """Load the checkpoint that parsed arguments name and evaluate every input; collective over all ranks."""
    from megatron.core.datasets.utils import Split
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.training import get_model, initialize_megatron

    from megacontext_megatron.run import Run

    initialize_megatron()
    run = Run(args, settings)
    model = get_model(run.model_provider, wrap_with_ddp=False)
    iteration, _ = load_checkpoint(model, None, None)
    raw = run.datasets.held_out(args.mc_eval_samples)
    if raw is None:
        raise ConfigError("there is no held-out data: give --valid-data-path, or a --split with a second part.")
    losses = {}
    for name, context in contexts_to_evaluate(settings.context).items():
        data = run.datasets.contexts(raw, context, Split.valid)
        losses[name] = last_rows_loss(args, dataclasses.replace(settings, context=context), model, data)
    return Evaluation(
        iteration=int(iteration),
        samples=whole_steps(args) * samples_a_step(args),
        source_length=settings.context.source_length,
        window=settings.context.window,
        horizon=settings.context.horizon,
        recency=losses["recency"],
        mixed=losses.get("mixed"),
        full=losses.get("full"),
        bigram=bigram(args, settings, raw) if args.mc_eval_bigram else None,
    )


def samples_a_step(args: argparse.Namespace) -> int:
    """Return how many samples all data-parallel ranks take at a time: a micro-batch each."""
    from megatron.core import mpu

    return args.micro_batch_size * mpu.get_data_parallel_world_size()


def whole_steps(args: argparse.Namespace) -> int:
    """Return how many steps `--mc-eval-samples` fill; raises ConfigError for none."""
    steps = args.mc_eval_samples // samples_a_step(args)
    if steps < 1:
        raise ConfigError(
            f"--mc-eval-samples {args.mc_eval_samples} is less than a micro-batch on each data-parallel rank: ask for "
            f"at least {samples_a_step(args)}."
        )
    return steps


def last_rows_loss(args: argparse.Namespace, settings: Settings, model: list[Any], data: Any) -> float:
    """Return the mean loss of the last H rows over held-out contexts, one for each sample; collective."""
    import torch
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config
    from megatron.training import get_timers

    from megacontext_megatron.model.losses import variant_names
    from megacontext_megatron.model.parallel_groups import pipeline_group, row_group
    from megacontext_megatron.model.step import ForwardStep

    size = args.micro_batch_size
    for chunk in model:
        get_model_config(chunk).mc_settings = settings
        chunk.eval()
    step = ForwardStep(
        settings=settings,
        micro_batch_size=size,
        eval_micro_batch_size=size,
        needs_mask=args.transformer_impl == "local" and args.context_parallel_size == 1,
        per_token_loss=args.calculate_per_token_loss,
        timers=get_timers(),
    )
    iterators = [iter(loader(args, data)) for _ in model]
    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=step.__call__,
            data_iterator=iterators if len(model) > 1 else iterators[0],
            model=model,
            num_microbatches=whole_steps(args),
            seq_length=settings.context.window,
            micro_batch_size=size,
            forward_only=True,
        )
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    if reports:
        key = NLL_LAST.format(H=settings.context.horizon, variant=variant_names(settings.context)[0])
        total = torch.stack([report[key] for report in reports]).double().sum(dim=0)
        torch.distributed.all_reduce(total, group=row_group())
    last = mpu.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(total, src=last, group=pipeline_group())
    return float(total[0] / total[1])


def loader(args: argparse.Namespace, data: Any) -> Any:
    """Return a data loader over this data-parallel rank's held-out contexts, in Megatron's order."""
    import torch
    from megatron.core import mpu
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    sampler = MegatronPretrainingSampler(
        total_samples=args.mc_eval_samples,
        consumed_samples=0,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
    )
    return torch.utils.data.DataLoader(data, batch_sampler=sampler)


def bigram(args: argparse.Namespace, settings: Settings, raw: Any) -> float:
    """Return the loss of an add-one bigram model of the training data on the same targets."""
    from megacontext_megatron.data.bigram import GREATEST_VOCABULARY, add_one_nll, pair_counts
    from megacontext_megatron.data.manifest import read_manifest
    from megacontext_megatron.model.datasets import dataset_config, present_splits

    config: Any = dataset_config(args, settings.context)
    if config.mock or not present_splits(config)[0]:
        raise ConfigError("--mc-eval-bigram needs training data: give --train-data-path, or --data-path and --split.")
    if config.blend is not None:
        (prefixes, _), share = config.blend, config.split_matrix[0]
    else:
        (prefixes, _), share = config.blend_per_split[0], (0.0, 1.0)
    manifest = read_manifest(prefixes[0])
    vocabulary = manifest.tokenizer.vocab_size if manifest else args.vocab_size
    if vocabulary > GREATEST_VOCABULARY:
        raise ConfigError(
            f"--mc-eval-bigram counts pairs of tokens, which {vocabulary} token ids are too many for: leave it out "
            f"beyond {GREATEST_VOCABULARY}."
        )
    samples = [raw[i] for i in range(whole_steps(args) * samples_a_step(args))]
    return add_one_nll(pair_counts(prefixes, vocabulary, share), samples, settings.context.horizon)


def print_table(evaluation: Evaluation) -> None:
    """Print the losses as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"held-out loss of the last {evaluation.horizon} rows, iteration {evaluation.iteration}, "
        f"{evaluation.samples} samples"
    )
    table.add_column("input")
    table.add_column("rows", justify="right")
    table.add_column("tokens of history", justify="right")
    table.add_column("nats per token", justify="right")
    window, source = str(evaluation.window), str(evaluation.source_length)
    rows = [
        ("recency", window, window, evaluation.recency),
        ("mixed", window, source, evaluation.mixed),
        ("full", source, source, evaluation.full),
        ("bigram, add one", "1", "1", evaluation.bigram),
        ("advantage delta (mixed - recency)", "", "", evaluation.advantage_delta),
        ("substitution delta (mixed - full)", "", "", evaluation.substitution_delta),
    ]
    for name, rows_used, tokens, loss in rows:
        if loss is not None:
            table.add_row(name, rows_used, tokens, f"{loss:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
