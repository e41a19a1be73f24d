"""What the flags of score biases, additive encodings and retrofits become, and their refusals."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any

from megacontext_megatron.config import ConfigError, ContextConfig
from megacontext_megatron.encoding_config import (
    ADDITIVE_ENCODINGS,
    SPARE_CHANNELS,
    AdditiveConfig,
    BiasConfig,
    RetrofitConfig,
)
from megacontext_megatron.position.linear_biases import alibi_slopes
from megacontext_megatron.position.table_biases import t5_buckets

Namespace = argparse.Namespace


def bias_configs(args: Namespace, context: ContextConfig, windowed: tuple[int, ...]) -> tuple[BiasConfig, ...]:
    """Return the score biases and their layers; `windowed` are the layers with a sliding window.

    Raises ConfigError for what is not defined or does not run.
    """
    everywhere = tuple(range(1, args.num_layers + 1))
    layers: dict[Any, tuple[int, ...]] = dict.fromkeys(args.position_bias, everywhere)
    if args.grape_a:
        if "grape-a" in layers:
            raise ConfigError("--grape-a and --position-bias grape-a contradict: give one of them.")
        layers["grape-a"] = tuple(layer for layer in everywhere if layer not in windowed)
        if not layers["grape-a"]:
            raise ConfigError("--grape-a puts its bias on layers without a window, and --window-size leaves none.")
    if "slow-bands" in args.retrofit and "slow-bands" not in layers:
        layers["slow-bands"] = everywhere
    _check_biases(args, context, set(layers))
    return tuple(
        BiasConfig(
            name=name,
            layers=those,
            learnable_slopes=args.grape_a_learnable,
            gate=args.grape_a_gate,
            slope_scale=args.bias_slope_scale,
            t5_buckets=args.t5_num_buckets,
            t5_max_distance=args.t5_max_distance,
            fire_hidden=args.fire_hidden_size,
            fire_layers=args.fire_num_layers,
            fire_length=args.fire_length,
            fire_shared=args.fire_shared,
            cope_positions=args.cope_positions,
            cope_count=args.cope_count or "entry",
            periods=tuple(args.slow_band_periods),
        )
        for name, those in layers.items()
    )


def _check_biases(args: Namespace, context: ContextConfig, names: set[str]) -> None:
    collapses = context.plan != "recency"
    if "grape-ap" in names and collapses:
        raise ConfigError("--position-bias grape-ap is not defined for gists: use --mc-plan recency.")
    if "cope" in names and args.gaussian_rope_log_width_bias:
        raise ConfigError(
            "--position-bias cope reads queries as wide as values: leave --gaussian-rope-log-width-bias out."
        )
    if "cope" in names and collapses and args.cope_count is None:
        raise ConfigError("--cope-count is needed where contexts collapse: whether a gist counts as one entry or wide.")
    for name in sorted(names & {"cope", "grape-ap"}):
        if args.context_parallel_size > 1:
            raise ConfigError(
                f"--position-bias {name} is not supported with --context-parallel-size {args.context_parallel_size}: "
                "it adds up over all keys of a row."
            )
    if args.fire_shared and args.pipeline_model_parallel_size > 1:
        raise ConfigError("--fire-shared is not supported with --pipeline-model-parallel-size: stages would differ.")
    if "t5" in names:
        t5_buckets(args.t5_num_buckets, args.t5_max_distance)


FOLDED_NATS = 2.0**14
"""Greatest score that a folded bias may make: the tensor cores' fp32 sums round it by about 2e-3."""
FOLDED_HEAD_DIM = 16
"""Least channels of a head of which the spare ones may be part."""


def check_fold(
    args: Namespace, context: ContextConfig, biases: Sequence[BiasConfig], unrotated: Collection[int]
) -> None:
    """Refuse a --bias-fold that spare channels cannot carry; `unrotated` are the layers without rotary.

    Raises ConfigError.
    """
    if not args.bias_fold:
        return
    linear = [bias for bias in biases if bias.linear]
    gated = [bias for bias in biases if bias.name == "grape-a" and not bias.linear]
    if gated:
        raise ConfigError(
            f"--bias-fold is not supported with --grape-a-gate {gated[0].gate}: a gate of keys differs between the "
            "query heads that share them; gate queries (q) or nothing."
        )
    layers = {layer for bias in linear for layer in bias.layers}
    turned = sorted(layers - set(unrotated))
    if turned:
        raise ConfigError(
            f"--bias-fold needs layers without rotary, and {_numbered(turned)} would rotate the channels it writes: "
            "name them in --no-rope-freq, or put the bias on others by --grape-a and --window-size."
        )
    for bias in biases:
        both = sorted(layers & set(bias.layers))
        if not bias.linear and both:
            raise ConfigError(
                f"--bias-fold is not supported with --position-bias {bias.name}, which is not linear in the distance, "
                f"on {_numbered(both)}: leave one of them out."
            )
    if args.kv_channels < FOLDED_HEAD_DIM:
        raise ConfigError(
            f"--bias-fold takes {SPARE_CHANNELS} channels of each head, and --kv-channels {args.kv_channels} leaves "
            f"too few for content: give {FOLDED_HEAD_DIM} or more."
        )
    steepest = max(alibi_slopes(args.num_attention_heads)) * sum(bias.slope_scale for bias in linear)
    if steepest * context.source_length / 2 > FOLDED_NATS:
        raise ConfigError(
            f"--bias-fold over {context.source_length} tokens of history makes scores of "
            f"{steepest * context.source_length / 2:.0f} nats, of more than {FOLDED_NATS:.0f}, whose rounding shows: "
            "lower --bias-slope-scale."
        )


def _numbered(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def additive_config(args: Namespace, context: ContextConfig) -> AdditiveConfig | None:
    """Return the embedding of places that rows get, None for none; raises ConfigError for a table that is too short."""
    if args.mc_encoding not in ADDITIVE_ENCODINGS:
        return None
    if args.mc_gist_span_head:
        raise ConfigError(
            f"--mc-gist-span-head moves places that --position-embedding-type {args.mc_encoding} has added to the rows "
            "by then: use a rotary encoding."
        )
    length = args.max_position_embeddings or context.source_length
    if args.mc_encoding == "learned_absolute" and length < context.source_length:
        raise ConfigError(
            f"--max-position-embeddings {length} is less than the {context.source_length} tokens of history, whose "
            "places a learned table cannot extrapolate: raise it."
        )
    return AdditiveConfig(
        name=args.mc_encoding,
        length=length,
        scale=args.sinusoidal_scale,
        interpolate=args.learned_absolute_interpolate,
    )


def retrofit_config(args: Namespace) -> RetrofitConfig | None:
    """Return what is added to a frozen base, None where nothing is frozen; raises ConfigError without a base."""
    if not args.retrofit:
        return None
    if args.mc_encoding != "rope":
        raise ConfigError("--retrofit adds to a base trained with rope: give --position-embedding-type rope.")
    if not args.pretrained_checkpoint and not args.load:
        raise ConfigError("--retrofit needs --pretrained-checkpoint, the base, or --load to go on with a retrofit.")
    if ("stretch" in args.retrofit) != (args.rope_stretch is not None):
        raise ConfigError("--retrofit stretch and --rope-stretch belong together: give both or neither.")
    return RetrofitConfig(
        parts=tuple(dict.fromkeys(args.retrofit)),
        lora_rank=args.retrofit_lora_rank,
        lora_length=args.retrofit_lora_length,
    )
