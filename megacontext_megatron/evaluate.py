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
from megacontext_megatron.config import ConfigError, ContextConfig, Settings
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
    "make_vocab_size_divisible_by",
    "data_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "split",
    "data_cache_path",
    "mock_data",
    "seed",
    "eod_mask_loss",
    "transformer_impl",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "no_persist_layer_norm",
    "bf16",
    "fp16",
    "norm_epsilon",
    "qk_layernorm",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
)
"""Arguments taken from the checkpoint in addition to those `--use-checkpoint-args` restores."""


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
    plan = "random" if context.plan == "recency" else context.plan
    mixed = dataclasses.replace(context, variants=1, plan=plan)
    return {
        "recency": dataclasses.replace(mixed, plan="recency"),
        "mixed": mixed,
        "full": dataclasses.replace(mixed, window=context.source_length, plan="recency"),
    }


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
        from megacontext_megatron.arguments import add_evaluation_arguments
        from megacontext_megatron.run import parse

        args, settings = parse(add_evaluation_arguments, FROM_CHECKPOINT)
        evaluation = evaluate(args, settings)
    except ConfigError as error:
        exit_with(error)
        return
    if args.rank == 0:
        path = Path(args.load) / EVALUATION_FILE
        path.write_text(json.dumps(evaluation.as_dict(), indent=1) + "\n")
        print_table(evaluation)
        print(f"written to {path}")


def evaluate(args: argparse.Namespace, settings: Settings) -> Evaluation:
    """Load the checkpoint that parsed arguments name and evaluate every input; collective over all ranks."""
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.training import get_model, initialize_megatron

    from megacontext_megatron.run import Run

    initialize_megatron()
    run = Run(args, settings)
    model = get_model(run.model_provider, wrap_with_ddp=False)
    iteration, _ = load_checkpoint(model, None, None)
    raw = held_out(args, settings)
    losses = {
        name: last_rows_loss(args, dataclasses.replace(settings, context=context), model, raw)
        for name, context in contexts_to_evaluate(settings.context).items()
    }
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


def held_out(args: argparse.Namespace, settings: Settings) -> Any:
    """Build Megatron's validation set at C tokens a sample on every rank that reads tokens."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

    from megacontext_megatron.model.datasets import dataset_config

    kind = MockGPTDataset if args.mock_data else GPTDataset
    config = dataset_config(args, settings.context)
    sizes = [1, args.mc_eval_samples, 1]
    valid = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()[1]
    if valid is None:
        raise ConfigError("there is no held-out data: give --valid-data-path, or a --split with a second part.")
    return valid


def samples_a_step(args: argparse.Namespace) -> int:
    """Return how many samples all data-parallel ranks take at a time: a micro-batch each."""
    from megatron.core import mpu

    return args.micro_batch_size * mpu.get_data_parallel_world_size()


def whole_steps(args: argparse.Namespace) -> int:
    """Return how many steps `--mc-eval-samples` fill; raises ConfigError for none."""
    steps = args.mc_eval_samples // samples_a_step(args)
    if steps == 0:
        raise ConfigError(
            f"--mc-eval-samples {args.mc_eval_samples} is less than a micro-batch on each data-parallel rank: ask for "
            f"at least {samples_a_step(args)}."
        )
    return steps


def last_rows_loss(args: argparse.Namespace, settings: Settings, model: list[Any], raw: Any) -> float:
    """Return the mean loss of the last H rows over the held-out samples, with one context for each; collective."""
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
        timers=get_timers(),
    )
    iterators = [iter(loader(args, settings, raw)) for _ in model]
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
        key = f"nll last {settings.context.horizon} {variant_names(settings.context)[0]}"
        total = torch.stack([report[key] for report in reports]).double().sum(dim=0)
        torch.distributed.all_reduce(total, group=row_group())
    last = mpu.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(total, src=last, group=pipeline_group())
    return float(total[0] / total[1])


def loader(args: argparse.Namespace, settings: Settings, raw: Any) -> Any:
    """Return a data loader over this data-parallel rank's held-out contexts, in Megatron's order."""
    import torch
    from megatron.core import mpu
    from megatron.core.datasets.utils import Split
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    from megacontext_megatron.data.samples import SampleIdentity, WorkingContextDataset
    from megacontext_megatron.model.datasets import ContextPlanner

    context = settings.context
    eod = raw.config.tokenizer.eod if context.eod_policy == "no-cross" else None
    identity = SampleIdentity(seed=settings.seed, split=Split.valid.value, eod=eod)
    sampler = MegatronPretrainingSampler(
        total_samples=args.mc_eval_samples,
        consumed_samples=0,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
    )
    data = WorkingContextDataset(raw, context, identity, ContextPlanner(context))
    return torch.utils.data.DataLoader(data, batch_sampler=sampler)


def bigram(args: argparse.Namespace, settings: Settings, raw: Any) -> float:
    """Return the loss of an add-one bigram model of the training data on the same targets."""
    from megatron.training.utils import get_blend_and_blend_per_split

    from megacontext_megatron.data.bigram import add_one_nll, pair_counts
    from megacontext_megatron.data.manifest import read_manifest

    blend, per_split = get_blend_and_blend_per_split(args)
    training = per_split[0] if per_split else blend
    if training is None:
        raise ConfigError("--mc-eval-bigram needs training data: give --data-path or --train-data-path.")
    prefixes = training[0]
    manifest = read_manifest(prefixes[0])
    vocabulary = manifest.tokenizer.vocab_size if manifest else args.vocab_size
    samples = (raw[i] for i in range(whole_steps(args) * samples_a_step(args)))
    texts = ([*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in samples)
    return add_one_nll(pair_counts(prefixes, vocabulary), map(_as_array, texts), settings.context.horizon)


def _as_array(text: list[int]) -> Any:
    import numpy as np

    return np.array(text, dtype=np.int64)


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
