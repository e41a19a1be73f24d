"""Evaluation of a checkpoint: every input of evaluate, run through the model, as means with standard errors."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any, cast

from megatron.core import mpu
from megatron.training import get_tokenizer
from megatron.training.checkpointing import load_checkpoint
from megatron.training.training import get_model, initialize_megatron
from torch import Tensor

from megacontext_megatron.config import ConfigError, ContextConfig, Settings
from megacontext_megatron.data.bigram import GREATEST_VOCABULARY, add_one_nll, pair_counts
from megacontext_megatron.data.manifest import read_manifest
from megacontext_megatron.evaluate import Estimate, Evaluation
from megacontext_megatron.model.datasets import dataset_config, present_splits
from megacontext_megatron.model.measures import Measure
from megacontext_megatron.model.measuring import LastRowSums, Measurer
from megacontext_megatron.run import Run
from megacontext_megatron.telemetry import names
from megacontext_megatron.telemetry.probes import measures, paired


def evaluate(args: argparse.Namespace, settings: Settings) -> Evaluation:
    """Load the checkpoint that parsed arguments name and evaluate every input; collective over all ranks."""
    initialize_megatron()
    run = Run(args, settings)
    model = get_model(run.model_provider, wrap_with_ddp=False)
    iteration, _ = load_checkpoint(model, None, None)
    raw = run.datasets.held_out(args.mc_eval_samples)
    if raw is None:
        raise ConfigError("there is no held-out data: give --valid-data-path, or a --split with a second part.")
    measurer = Measurer(
        args=args,
        settings=settings,
        datasets=run.datasets,
        raw=raw,
        samples=args.mc_eval_samples,
        micro_batch_size=args.micro_batch_size,
    )
    taken = whole_steps(args) * samples_a_step(args)
    sums = {}
    for name, (context, measure) in inputs(args, settings).items():
        sums[name] = measurer(model, context, measure)
    if not next(iter(sums.values())).count.any():
        raise ConfigError(
            f"none of the last {settings.context.horizon} rows of {taken} samples counts: no token of "
            f"--mc-loss-after-token {settings.objective.after_token} is among them, or all are masked."
        )
    return Evaluation(
        iteration=int(iteration),
        samples=taken,
        source_length=settings.context.source_length,
        window=settings.context.window,
        horizon=settings.context.horizon,
        losses=losses_and_deltas(sums),
        accuracy={name: ratio(each.hits, each.count) for name, each in sums.items() if settings.gaussian is not None},
        probes=probed(measurer, model) if args.mc_eval_probes else {},
        bigram=bigram(args, settings, raw) if args.mc_eval_bigram else None,
        shuffled_across_samples=args.micro_batch_size > 1 if "shuffled" in sums else None,
    )


def inputs(args: argparse.Namespace, settings: Settings) -> dict[str, tuple[ContextConfig, Measure]]:
    """Return context and measure of each input that `--mc-eval-inputs` asks for; without history there is only one.

    Raises ConfigError where none is left.
    """
    vocabulary = None if settings.gaussian is None else int(cast(Any, get_tokenizer()).vocab_size)
    plain = Measure(vocabulary=vocabulary)
    contexts = contexts_to_evaluate(settings)
    found = {name: (context, plain) for name, context in contexts.items()}
    if "mixed" in found:
        found["shuffled"] = contexts["mixed"], dataclasses.replace(plain, shuffled=True)
    asked = {name: each for name, each in found.items() if name in args.mc_eval_inputs}
    if not asked:
        raise ConfigError(f"--mc-eval-inputs {' '.join(args.mc_eval_inputs)}: this checkpoint has only {list(found)}.")
    if "shuffled" in asked and args.micro_batch_size == 1 and args.rank == 0:
        print("> shuffled gists are of other places of the same sample: give --micro-batch-size 2 to take another's")
    return asked


def contexts_to_evaluate(settings: Settings) -> dict[str, ContextConfig]:
    """Return the context of each input by name; a run without collapsed history has only one."""
    context = settings.context
    if context.source_length == context.window:
        return {"recency": context}
    recency = dataclasses.replace(context, variants=1, plan="recency")
    full = dataclasses.replace(recency, window=context.source_length)
    if any(bias.name == "grape-ap" for bias in settings.biases):
        print("> no mixed contexts: --position-bias grape-ap is not defined for gists")
        return {"recency": recency, "full": full}
    try:
        mixed = dataclasses.replace(recency, plan="random" if context.plan == "recency" else context.plan)
    except ConfigError as error:
        print(f"> no mixed contexts: {error}")
        return {"recency": recency, "full": full}
    return {"recency": recency, "mixed": mixed, "full": full}


def probed(measurer: Measurer, model: list[Any]) -> dict[str, Estimate]:
    """Return what probes of mixed contexts show, by metric; raises ConfigError where there are none."""
    args, settings = measurer.args, measurer.settings
    mixed = contexts_to_evaluate(settings).get("mixed")
    if mixed is None:
        raise ConfigError("--mc-eval-probes has no mixed contexts to probe: this checkpoint's rows are all tokens.")
    asked = measures(args, settings)
    # An input of its own.
    asked.pop(names.SHUFFLED.at())
    return {name: ratio(each.loss, each.count) for name, each in paired(measurer, model, mixed, asked).items()}


def losses_and_deltas(sums: dict[str, LastRowSums]) -> dict[str, Estimate]:
    """Return the mean loss of every input, and the differences between inputs, whose samples are paired."""
    deltas = {
        "advantage_delta": ("mixed", "recency"),
        "substitution_delta": ("mixed", "full"),
        "shuffled_delta": ("shuffled", "mixed"),
    }
    found = {name: ratio(each.loss, each.count) for name, each in sums.items()}
    for name, (left, right) in deltas.items():
        if left in sums and right in sums:
            found[name] = ratio(sums[left].loss - sums[right].loss, sums[left].count)
    return found


def ratio(totals: Tensor, counts: Tensor) -> Estimate:
    """Return the sum of totals over the sum of counts, [samples] each, and its standard error over samples.

    The error is that of a ratio estimator, sd(t - r n) / (mean(n) sqrt(samples)); None for fewer than two samples.
    """
    value = float(totals.sum() / counts.sum())
    samples = len(totals)
    if samples < 2:
        return Estimate(value=value, error=None)
    spread = (totals - value * counts).std()
    return Estimate(value=value, error=float(spread / counts.mean()) / math.sqrt(samples))


def samples_a_step(args: argparse.Namespace) -> int:
    """Return how many samples all data-parallel ranks take at a time: a micro-batch each."""
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


def bigram(args: argparse.Namespace, settings: Settings, raw: Any) -> float:
    """Return the loss of an add-one bigram model of the training data on the same targets."""
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
