"""What the flags of encodings become: rotary rules, score biases, additive embeddings, adapters, and their refusals."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping

from megacontext_megatron.config import ConfigError, ContextConfig, RotaryConfig
from megacontext_megatron.encoding_config import (
    LINEAR_BIASES,
    ROTARY_ENCODINGS,
    ClexConfig,
    FrequencyRule,
    GrapeMConfig,
    LayerFrequencies,
    LinearRule,
    Llama3Rule,
    LongRopeRule,
    MultiscaleConfig,
    NtkRule,
    SectionRule,
    YarnRule,
)
from megacontext_megatron.encoding_flags import AdditiveFlags, BiasFlags, GrapeFlags, RetrofitFlags, RotaryFlags
from megacontext_megatron.position.rules import rotary_width

Namespace = argparse.Namespace

LLAMA3_LENGTH = 8192
"""Tokens that Llama 3 was trained on before its stretch."""

STRETCHED = ("linear", "ntk", "dynamic_ntk", "yarn", "resonance_yarn", "longrope")
WITH_LENGTH = ("dynamic_ntk", "yarn", "resonance_yarn", "longrope", "llama3", "clex")


def rotary_name(args: Namespace) -> str | None:
    """Return the rotary encoding whose frequencies a run turns by, None where nothing is rotated by the plugin."""
    if args.mc_encoding == "gaussian_rope":
        return args.gaussian_rope_base
    return args.mc_encoding if args.mc_encoding in (*ROTARY_ENCODINGS, "grapem") else None


def damps(args: Namespace) -> bool:
    """Return whether rows are damped by their spread: gaussian_rope, or a base that is retrofitted with it."""
    return args.mc_encoding == "gaussian_rope" or "damping" in args.retrofit


def stretch_rule(args: Namespace) -> str | None:
    """Return the rule that stretches a run's frequencies, by its name among the rotary encodings."""
    name = rotary_name(args)
    return args.rope_stretch_rule if name == "rope" else name


def refuse_idle_flags(args: Namespace) -> None:
    """Refuse flags of encodings that nothing of this run would read; raises ConfigError."""
    read = {**_rotary_readers(args), **_other_readers(args)}
    for group in (RotaryFlags, GrapeFlags, BiasFlags, AdditiveFlags, RetrofitFlags):
        for field in dataclasses.fields(group):
            default = field.default_factory() if callable(field.default_factory) else field.default
            reader = read.get(field.name)
            if reader is None or getattr(args, field.name) == default:
                continue
            on, needed = reader
            if not on:
                raise ConfigError(f"--{field.name.replace('_', '-')} has no effect without {needed}.")


Reader = tuple[bool, str]


def _rotary_readers(args: Namespace) -> dict[str, Reader]:
    name, rule = rotary_name(args), stretch_rule(args)

    def of(*names: str) -> Reader:
        return rule in names, f"--position-embedding-type {' or '.join(names)}"

    yarn, fixed = of("yarn", "resonance_yarn"), name not in (None, "multiscale", "clex", "grapem")
    return {
        "gaussian_rope_base": (args.mc_encoding == "gaussian_rope", "--position-embedding-type gaussian_rope"),
        "rope_stretch": (rule in STRETCHED, f"--rope-stretch-rule, or --position-embedding-type {_any(STRETCHED)}"),
        "rope_stretch_rule": (name == "rope", "--position-embedding-type rope or gaussian_rope"),
        "rope_original_length": of(*WITH_LENGTH),
        "rope_resonance": (fixed, "a rotary --position-embedding-type whose frequencies are fixed"),
        **dict.fromkeys(("yarn_mscale", "yarn_mscale_all_dim", "yarn_attention_factor", "yarn_deepseek"), yarn),
        **{
            f"longrope_{field}": of("longrope")
            for field in ("short_factors", "long_factors", "select", "start_tokens", "attention_factor")
        },
        **{f"llama3_{field}": of("llama3") for field in ("low_factor", "high_factor")},
        **{f"multiscale_{field}": of("multiscale") for field in ("low", "high")},
        **{f"clex_{field}": of("clex") for field in ("hidden_factor", "activation", "max_t")},
        "axial_axes": of("axial"),
        "mrope_interleaved_sections": of("mrope"),
        **{field.name: of("grapem") for field in dataclasses.fields(GrapeFlags)},
    }


def _other_readers(args: Namespace) -> dict[str, Reader]:
    biases = {*args.position_bias, *(["grape-a"] if args.grape_a else [])}

    def bias(name: str) -> Reader:
        return name in biases, f"--position-bias {name}"

    sloped = bool(biases & {"alibi", "grape-a", "grape-ap"}), "--position-bias alibi, grape-a or grape-ap"
    lora = "alibi-lora" in args.retrofit, "--retrofit alibi-lora"
    slow = "slow-bands" in (*biases, *args.retrofit), "--position-bias slow-bands"
    return {
        "grape_a_gate": bias("grape-a"),
        "grape_a_learnable": bias("grape-a"),
        "bias_slope_scale": sloped,
        "bias_fold": (
            bool(biases & LINEAR_BIASES),
            "a bias that is linear: --grape-a, --position-bias alibi or grape-a",
        ),
        **{f"t5_{field}": bias("t5") for field in ("num_buckets", "max_distance")},
        **{f"fire_{field}": bias("fire") for field in ("hidden_size", "num_layers", "length", "shared")},
        **{f"cope_{field}": bias("cope") for field in ("positions", "count")},
        "slow_band_periods": slow,
        "sinusoidal_scale": (args.mc_encoding == "sinusoidal", "--position-embedding-type sinusoidal"),
        "learned_absolute_interpolate": (
            args.mc_encoding == "learned_absolute" and args.megacontext,
            "--position-embedding-type learned_absolute and --megacontext",
        ),
        "retrofit_lora_rank": lora,
        "retrofit_lora_length": lora,
        "retrofit_adapters": (bool(args.retrofit), "--retrofit"),
    }


def _any(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _refuse_idle_yarn(args: Namespace, rule: str | None) -> None:
    """Refuse Megatron's own flags of YaRN where no YaRN reads them."""
    for name in ("beta_fast", "beta_slow", "correction_range_round_to_int", "original_max_position_embeddings"):
        known = ("yarn", "resonance_yarn") if name != "original_max_position_embeddings" else WITH_LENGTH
        if args.mc_encoding is not None and getattr(args, f"yarn_{name}") is not None and rule not in known:
            raise ConfigError(f"--yarn-{name.replace('_', '-')} has no effect without --position-embedding-type yarn.")


def rotary_config(args: Namespace, context: ContextConfig) -> RotaryConfig:
    """Return the rotary frequencies of parsed arguments; raises ConfigError naming flags that do not fit."""
    name, rule = rotary_name(args), stretch_rule(args)
    _refuse_idle_yarn(args, rule)
    by_name = None if rule is None else RULES.get(rule)
    made = None if by_name is None else by_name(args)
    by_layer = None if name is None else layer_frequencies(args, name)
    if (made or by_layer) and (args.rotary_seq_len_interpolation_factor or args.use_rope_scaling):
        raise ConfigError(
            f"--rotary-seq-len-interpolation-factor and --use-rope-scaling scale plain rope, not {rule}: use the "
            "encoding's own flags."
        )
    if args.rope_stretch is not None and not args.rope_stretch >= 1.0:
        raise ConfigError(f"--rope-stretch {args.rope_stretch} must be at least 1.")
    if isinstance(by_layer, ClexConfig) and context.source_length <= by_layer.original_length:
        raise ConfigError(
            f"--position-embedding-type clex has nothing to learn for {context.source_length} tokens of history: "
            f"--rope-original-length {by_layer.original_length} must be less."
        )
    depends = isinstance(made, LongRopeRule) or by_layer is not None or rule == "dynamic_ntk"
    config = RotaryConfig(
        head_dim=args.kv_channels,
        base=args.rotary_base,
        percent=args.rotary_percent,
        interleaved=args.rotary_interleaved,
        interpolation=args.rotary_seq_len_interpolation_factor,
        llama3_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
        rule=made,
        resonance=args.rope_resonance or rule in ("resonance", "resonance_yarn"),
        by_layer=by_layer,
        length=context.source_length if depends else 0,
    )
    _check_pairs(config)
    rotated = rotary_width(config)
    if args.mc_encoding is not None and name is not None and (rotated % 2 or not rotated):
        raise ConfigError(
            f"--kv-channels {config.head_dim} with --rotary-percent {config.percent} rotates {rotated} channels of a "
            "head, and rotary turns pairs of them."
        )
    return config


def _check_pairs(config: RotaryConfig) -> None:
    pairs = rotary_width(config) // 2
    match config.rule:
        case LongRopeRule(short_factors=short, long_factors=long):
            for flag, factors in (("--longrope-short-factors", short), ("--longrope-long-factors", long)):
                if len(factors) != pairs or min(factors) <= 0:
                    raise ConfigError(f"{flag} takes {pairs} positive numbers, one for each rotary pair of a head.")
        case SectionRule(axes=axes, sections=sections) if sections:
            if sum(sections) != pairs:
                raise ConfigError(
                    f"--mrope-section {list(sections)} must add up to the {pairs} rotary pairs of a head."
                )
        case SectionRule(axes=axes) if pairs % axes:
            raise ConfigError(f"--axial-axes {axes} must divide the {pairs} rotary pairs of a head.")
        case _:
            pass


POSITIVE = (
    *("rope_original_length", "yarn_beta_fast", "yarn_beta_slow", "llama3_low_factor", "llama3_high_factor"),
    *("multiscale_low", "multiscale_high", "clex_hidden_factor", "clex_max_t", "axial_axes", "grapem_log_freq_scale"),
    *("bias_slope_scale", "fire_hidden_size", "fire_length", "cope_positions", "slow_band_periods"),
    *("sinusoidal_scale", "retrofit_lora_rank", "retrofit_lora_length"),
)
"""Flags whose numbers must be greater than 0."""


def refuse_senseless_numbers(args: Namespace) -> None:
    """Refuse numbers that no encoding can be computed with; raises ConfigError."""
    for name in POSITIVE:
        value = getattr(args, name)
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(number > 0 for number in numbers):
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be greater than 0.")
    if args.llama3_low_factor >= args.llama3_high_factor:
        raise ConfigError(
            f"--llama3-low-factor {args.llama3_low_factor} must be less than --llama3-high-factor "
            f"{args.llama3_high_factor}."
        )


def _factor(args: Namespace) -> float:
    if args.rope_stretch is None:
        raise ConfigError(f"--rope-stretch is needed for {stretch_rule(args)}: the factor by which history grows.")
    return args.rope_stretch


def _length(args: Namespace) -> int:
    length = args.rope_original_length or args.yarn_original_max_position_embeddings
    if length is None:
        raise ConfigError(
            f"--rope-original-length is needed for {stretch_rule(args)}: the tokens of history its base was trained on."
        )
    return length


def _yarn(args: Namespace) -> YarnRule:
    if args.yarn_deepseek and args.yarn_mscale_all_dim is None:
        raise ConfigError("--yarn-deepseek needs --yarn-mscale-all-dim, by which it scales the softmax.")
    if args.yarn_deepseek and args.yarn_attention_factor is not None:
        raise ConfigError("--yarn-attention-factor is of cos and sin, which have no factor with --yarn-deepseek.")
    rounded = args.yarn_correction_range_round_to_int
    return YarnRule(
        factor=_factor(args),
        original_length=_length(args),
        beta_fast=32.0 if args.yarn_beta_fast is None else args.yarn_beta_fast,
        beta_slow=1.0 if args.yarn_beta_slow is None else args.yarn_beta_slow,
        truncate=True if rounded is None else rounded,
        mscale=args.yarn_mscale,
        mscale_all_dim=args.yarn_mscale_all_dim,
        attention_factor=args.yarn_attention_factor,
        deepseek=args.yarn_deepseek,
    )


def _longrope(args: Namespace) -> LongRopeRule:
    return LongRopeRule(
        factor=_factor(args),
        original_length=_length(args),
        short_factors=tuple(args.longrope_short_factors),
        long_factors=tuple(args.longrope_long_factors),
        select=args.longrope_select,
        start_tokens=args.longrope_start_tokens,
        attention_factor=args.longrope_attention_factor,
    )


def _llama3(args: Namespace) -> Llama3Rule:
    return Llama3Rule(
        factor=args.rope_scaling_factor,
        original_length=args.rope_original_length or LLAMA3_LENGTH,
        low=args.llama3_low_factor,
        high=args.llama3_high_factor,
    )


def _mrope(args: Namespace) -> SectionRule:
    if not args.mrope_section:
        raise ConfigError("--mrope-section is needed for mrope: the rotary pairs of each axis.")
    sections = tuple(args.mrope_section)
    return SectionRule(axes=len(sections), sections=sections, interleaved_sections=args.mrope_interleaved_sections)


RULES: Mapping[str, Callable[[Namespace], FrequencyRule]] = {
    "linear": lambda args: LinearRule(factor=_factor(args)),
    "ntk": lambda args: NtkRule(factor=_factor(args)),
    "dynamic_ntk": lambda args: NtkRule(factor=_factor(args), original_length=_length(args)),
    "yarn": _yarn,
    "resonance_yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "mrope": _mrope,
    "axial": lambda args: SectionRule(axes=args.axial_axes),
}
"""Frequency rules by the name of their encoding; others keep plain rope's."""


def layer_frequencies(args: Namespace, name: str) -> LayerFrequencies | None:
    """Return what layers find themselves of their frequencies; raises ConfigError for flags that contradict."""
    match name:
        case "multiscale":
            return MultiscaleConfig(low=args.multiscale_low, high=args.multiscale_high)
        case "clex":
            return ClexConfig(
                original_length=_length(args),
                hidden_factor=args.clex_hidden_factor,
                activation=args.clex_activation,
                max_t=args.clex_max_t,
            )
        case "grapem":
            return _grapem(args)
        case _:
            return None


def _grapem(args: Namespace) -> GrapeMConfig:
    if args.grapem_per_head and args.grapem_share_across_heads:
        raise ConfigError("--grapem-per-head and --grapem-share-across-heads contradict: give one of them.")
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.grapem_per_head and groups % args.tensor_model_parallel_size:
        raise ConfigError(
            f"--grapem-per-head needs --num-query-groups {groups} to be a multiple of --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size}."
        )
    return GrapeMConfig(
        learnable=args.grapem_learnable_freq,
        per_head=args.grapem_per_head,
        log_freq_scale=args.grapem_log_freq_scale,
        contextual=args.grapem_contextual,
    )
