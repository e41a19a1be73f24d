"""Probes: what an intervention on mixed contexts costs on their last H rows, held-out samples being the same."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from megacontext_megatron.attention_config import MEGATRON
from megacontext_megatron.config import ConfigError, ContextConfig, Settings
from megacontext_megatron.model.datasets import DatasetProvider
from megacontext_megatron.model.measures import Measure
from megacontext_megatron.model.measuring import LastRowSums, Measurer
from megacontext_megatron.telemetry import names

BLUR_FACTORS = (0.0, 0.5, 1.0, 2.0)
"""What spreads are scaled by; the loss at 1 is what all others are compared with."""

LEAST_MICRO_BATCH = 2
"""Contexts a micro-batch, where there are enough samples: gists are exchanged between its samples."""

Namespace = argparse.Namespace


def measures(args: Namespace, settings: Settings) -> dict[str, Measure]:
    """Return the interventions by the name of their metric."""
    permuted = names.PERMUTED if masks_by_place(args, settings) else names.PERMUTED_ROW_CAUSAL
    found = {names.SHUFFLED.at(): Measure(shuffled=True)}
    if not settings.attention.reach_skip:
        # What is out of reach is told from places that rise from row to row.
        found[permuted.at()] = Measure(permuted=True)
    if settings.gaussian is not None and settings.gaussian.sigma != "none":
        found |= {names.BLUR.at(factor=f"{factor:g}"): Measure(sigma_factor=factor) for factor in BLUR_FACTORS}
    return found


def masks_by_place(args: Namespace, settings: Settings) -> bool:
    """Return whether attention takes a mask that compares places: Megatron's dense one, without windows or fusion."""
    fused = args.masked_softmax_fusion and (args.fp16 or args.bf16)
    biased = any(settings.biased(layer) for layer in range(1, args.num_layers + 1))
    whole = args.context_parallel_size == 1 and args.window_size is None
    dense = args.transformer_impl == "local" and settings.attention.backends_of(args.num_layers) == {MEGATRON}
    return dense and whole and not fused and not biased


def paired(
    measurer: Measurer, model: Sequence[torch.nn.Module], context: ContextConfig, asked: dict[str, Measure]
) -> dict[str, LastRowSums]:
    """Return by metric the loss of the last H rows of mixed contexts minus that without an intervention; collective.

    `context` is of one variant.  Counts are those of both, and hits are left out.
    """
    plain = measurer(model, context)
    found = {}
    for name, measure in asked.items():
        changed = plain if measure == Measure() else measurer(model, context, measure)
        found[name] = replace(changed, loss=changed.loss - plain.loss, hits=torch.zeros_like(plain.hits))
    return found


def micro_batch_size(args: Namespace) -> int:
    """Return how many samples of `--mc-probe-samples` a data-parallel rank takes at a time in training.

    Raises ConfigError where they cannot be shared out.
    """
    ranks = args.data_parallel_size
    group = 1
    if args.virtual_pipeline_model_parallel_size is not None:
        group = args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size
    for size in range(max(args.micro_batch_size, LEAST_MICRO_BATCH), 0, -1):
        steps = args.mc_probe_samples // (size * ranks)
        if steps and steps % group == 0:
            return size
    raise ConfigError(
        f"--mc-probe-samples {args.mc_probe_samples} cannot be shared out: this layout needs a multiple of "
        f"{ranks * group}."
    )


def check_probes(args: Namespace, settings: Settings, *, held_out: bool) -> None:
    """Refuse probes in training that have nothing to read or nobody to tell; `held_out`: there is validation data.

    Raises ConfigError.
    """
    interval = settings.watch.probe_interval
    if not interval:
        return
    if settings.context.plan == "recency":
        raise ConfigError("--mc-probe-interval has nothing to probe with --mc-plan recency: every row is a token.")
    if interval % args.log_interval:
        raise ConfigError(
            f"--mc-probe-interval {interval} must be a multiple of --log-interval {args.log_interval}, with whose "
            "reports probes are written."
        )
    if not held_out:
        raise ConfigError(
            "--mc-probe-interval has no held-out data to probe with: give --valid-data-path, or a --split with a "
            "second part."
        )
    micro_batch_size(args)


class Prober:
    """Runs the probes of a training run, on the same held-out samples every time."""

    def __init__(self, args: Namespace, settings: Settings, datasets: DatasetProvider) -> None:
        self._args, self._settings, self._datasets = args, settings, datasets
        self._measurer: Measurer | None = None

    def due(self, iteration: int) -> bool:
        """Return whether an iteration, counted from 1, is probed."""
        interval = self._settings.watch.probe_interval
        return interval > 0 and iteration % interval == 0

    def __call__(self, model: Sequence[torch.nn.Module]) -> dict[str, float]:
        """Return the probes' metrics in nats per token; collective over all ranks.

        Samples none of whose last H rows counts leave no metric.
        """
        if self._measurer is None:
            self._measurer = self._first()
        context = replace(self._settings.context, variants=1)
        found = paired(self._measurer, model, context, measures(self._args, self._settings))
        values = {name: float(each.loss.sum() / each.count.sum()) for name, each in found.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _first(self) -> Measurer:
        samples = self._settings.watch.probe_samples
        return Measurer(
            args=self._args,
            settings=self._settings,
            datasets=self._datasets,
            raw=self._datasets.held_out(samples),
            samples=samples,
            micro_batch_size=micro_batch_size(self._args),
        )
