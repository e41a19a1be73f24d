"""Flags and settings: the plugin's argument groups, what they refuse, and the settings they become."""

from __future__ import annotations

import argparse
import dataclasses
import math
from importlib.util import find_spec

from megatron.training.argument_utils import ArgumentGroupFactory

from megacontext_megatron.attention_arguments import attention_config
from megacontext_megatron.bias_arguments import additive_config, bias_configs, check_fold, retrofit_config
from megacontext_megatron.config import (
    ENCODINGS,
    STOCK_ENCODINGS,
    ConfigError,
    ContextConfig,
    GaussianRopeConfig,
    RotaryBackend,
    RotaryConfig,
    Settings,
)
from megacontext_megatron.encoding_arguments import (
    damps,
    refuse_idle_flags,
    refuse_senseless_numbers,
    rotary_config,
    rotary_name,
)
from megacontext_megatron.encoding_flags import ENCODING_FLAGS
from megacontext_megatron.flags import (
    RUN_FLAGS,
    ContextFlags,
    EvaluationFlags,
    GistFlags,
    ObjectiveFlags,
    PositionFlags,
    PredictionFlags,
    TeacherFlags,
    WatchFlags,
)
from megacontext_megatron.layer_patterns import check_layer_patterns, layers_without_rope, windowed_layers
from megacontext_megatron.objective_arguments import (
    curriculum_stages,
    gist_config,
    objective_config,
    prediction_config,
    watch_config,
)
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.refusals import REFUSALS, SPAN_REFUSALS

Namespace = argparse.Namespace


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the plugin's groups to Megatron's parser and return it."""
    for flags, title in {**RUN_FLAGS, **ENCODING_FLAGS}.items():
        ArgumentGroupFactory(flags).build_group(parser, title=title)
    # A mistyped flag is answered with the usage line, which would otherwise list several hundred flags first.
    parser.usage = "%(prog)s FLAGS    (--help lists them)"
    for action in parser._actions:
        _escape_percent(action)
    return parser


def flag_table() -> str:
    """Return the plugin's flags as a Markdown table: flag, values, default, meaning."""
    parser = argparse.ArgumentParser(add_help=False)
    kinds = (*RUN_FLAGS, *ENCODING_FLAGS, EvaluationFlags, TeacherFlags)
    groups = [ArgumentGroupFactory(flags).build_group(parser) for flags in kinds]
    lines = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for group in groups:
        for action in group._group_actions:
            if action.dest == "mc_encoding":
                continue
            values = ", ".join(map(str, action.choices)) if action.choices else _kind(action)
            default = "" if action.default in (None, False) else f"`{action.default}`"
            lines.append(f"| `{action.option_strings[0]}` | {values} | {default} | {action.help} |")
    return "\n".join(lines)


def _kind(action: argparse.Action) -> str:
    return "switch" if action.nargs == 0 else getattr(action.type, "__name__", "")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group that only the evaluate command knows and return the parser."""
    ArgumentGroupFactory(EvaluationFlags).build_group(parser, title="evaluation")
    return parser


def add_teacher_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group that only the teacher command knows and return the parser."""
    ArgumentGroupFactory(TeacherFlags).build_group(parser, title="teacher")
    return parser


def _escape_percent(action: argparse.Action) -> None:
    """Make one help text printable: argparse formats it with %, and Megatron 0.19 has one with a bare percent sign."""
    if action.help is None:
        return
    try:
        _ = action.help % {**vars(action), "prog": ""}
    except (ValueError, TypeError, KeyError):
        action.help = action.help.replace("%", "%%")


def refuse_unsupported(args: Namespace) -> None:
    """Raise ConfigError for the first request that working contexts do not support."""
    spans = args.mc_encoding is not None
    for refusal in (*REFUSALS, *(SPAN_REFUSALS if spans else ())):
        if refusal.asked(args):
            raise ConfigError(f"{refusal.flag} is not supported with megacontext_megatron: {refusal.why}.")
    if args.mc_encoding is not None and args.mc_encoding not in (*ENCODINGS, *STOCK_ENCODINGS):
        raise ConfigError(f"--mc-encoding {args.mc_encoding} is unknown: use --position-embedding-type.")
    if args.megacontext and not spans:
        raise ConfigError(
            "--megacontext needs --position-embedding-type: gaussian_rope, rope at the centres of rows, or another "
            "one of the support matrix."
        )
    if not spans and (args.position_bias or args.grape_a or args.retrofit):
        raise ConfigError("--position-bias, --grape-a and --retrofit need a --position-embedding-type (or none).")
    for group in (ContextFlags, GistFlags, ObjectiveFlags, PredictionFlags, WatchFlags):
        _refuse_without_effect(args, group, "--megacontext", on=args.megacontext)
    turned = rotary_name(args) is not None
    _refuse_without_effect(
        args, PositionFlags, "--position-embedding-type gaussian_rope", on=damps(args), but=_OF_ALL_SPANS
    )
    if args.gaussian_rope_phase != PositionFlags().gaussian_rope_phase and not turned:
        raise ConfigError("--gaussian-rope-phase has no effect without a rotary --position-embedding-type over spans.")
    if args.gaussian_rope_log_width_bias and not spans:
        raise ConfigError("--gaussian-rope-log-width-bias has no effect without --megacontext.")
    refuse_idle_flags(args)
    refuse_senseless_numbers(args)
    _refuse_idle_settings(args)
    if args.mc_backend != "auto" and not turned:
        raise ConfigError(
            f"--mc-backend {args.mc_backend} has no effect without a rotary --position-embedding-type over spans."
        )


_OF_ALL_SPANS = ("mc_encoding", "gaussian_rope_phase", "gaussian_rope_log_width_bias")
"""Fields of PositionFlags that other encodings of rows with spans read too."""


def _refuse_idle_settings(args: Namespace) -> None:
    """Refuse settings of plans that the chosen plan does not read."""
    typical = ContextFlags()
    if args.mc_plan in ("recency", "heuristic") and args.mc_level2_prob != typical.mc_level2_prob:
        raise ConfigError(f"--mc-level2-prob has no effect with --mc-plan {args.mc_plan}.")
    if args.mc_plan == "recency" and args.mc_eod_policy != typical.mc_eod_policy:
        raise ConfigError("--mc-eod-policy has no effect with --mc-plan recency, which collapses nothing.")


def _refuse_without_effect(args: Namespace, group: type, switch: str, *, on: bool, but: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(group):
        if not on and field.name not in but and getattr(args, field.name) != field.default:
            raise ConfigError(f"--{field.name.replace('_', '-')} has no effect without {switch}.")


def context_config(args: Namespace) -> ContextConfig:
    """Return the context settings of parsed arguments; raises ConfigError naming the flags that do not fit."""
    if not args.megacontext:
        return ContextConfig.tokens_only(args.seq_length)
    if args.mc_source_length is None:
        raise ConfigError("--megacontext needs --mc-source-length, the tokens of history in each raw sample.")
    prefix = "mc_"
    fields = {f.name for f in dataclasses.fields(ContextConfig)}
    given = {f.name.removeprefix(prefix): getattr(args, f.name) for f in dataclasses.fields(ContextFlags)}
    return ContextConfig(window=args.seq_length, **{name: given[name] for name in fields & given.keys()})


def gaussian_config(args: Namespace, context: ContextConfig) -> GaussianRopeConfig | None:
    """Return how rows' spans act on positions, None where Megatron's own code runs a stock encoding.

    Encodings that do not damp have a spread of 0 everywhere.
    """
    if args.mc_encoding is None:
        return None
    prefix = "gaussian_rope_"
    config = GaussianRopeConfig(
        **{
            f.name.removeprefix(prefix): getattr(args, f.name)
            for f in dataclasses.fields(PositionFlags)
            if f.name.startswith(prefix)
        }
    )
    if not damps(args):
        config = dataclasses.replace(config, sigma="none")
    if config.learnable_sigma != "none" and config.sigma == "none":
        raise ConfigError("--gaussian-rope-learnable-sigma has nothing to scale with --gaussian-rope-sigma none.")
    learned = {
        "--gaussian-rope-learnable-sigma": config.learnable_sigma != "none",
        "--gaussian-rope-log-width-bias": config.log_width_bias,
    }
    per_level = config.learnable_sigma in ("level", "head") and context.plan != "recency"
    if per_level and context.max_level > 1 and context.eligible()[1] == 0:
        raise ConfigError(
            f"--gaussian-rope-learnable-sigma {config.learnable_sigma} would learn a level 2 that no context has: use "
            "--mc-max-level 1, or a --mc-source-length that holds a whole collapsible span of --mc-block-size squared "
            "tokens."
        )
    for flag, on in learned.items():
        if on and context.plan == "recency":
            raise ConfigError(
                f"{flag} would get no gradient: every row is a token without --megacontext and a --mc-plan that "
                "collapses."
            )
    return config


def rotary_backend(args: Namespace, gaussian: GaussianRopeConfig | None, rotary: RotaryConfig) -> RotaryBackend:
    """Return what rotates queries and keys: what was asked for, else the kernel where it runs and covers the flags."""
    fusable = rotary.by_layer is not None or rotary_frequencies(rotary).fusable
    covered = gaussian is not None and gaussian.fusable and fusable
    if args.mc_backend == "triton" and gaussian is not None and not fusable:
        raise ConfigError(
            "--mc-backend triton has no factor on cos and sin and no start window, which this rotary encoding needs: "
            "use torch or auto."
        )
    installed = find_spec("triton") is not None
    if args.mc_backend == "triton" and not installed:
        raise ConfigError("--mc-backend triton needs the package triton, which is not installed: use torch or auto.")
    if args.mc_backend != "auto":
        return args.mc_backend
    return "triton" if covered and rotary_name(args) and installed and not args.cpu else "torch"


def settings_from(args: Namespace) -> Settings:
    """Return the settings of arguments that Megatron has validated; raises ConfigError naming flags that do not fit."""
    check_layer_patterns(args)
    context = context_config(args)
    gaussian = gaussian_config(args, context)
    rotary = rotary_config(args, context)
    if rotary.by_layer is not None and gaussian is not None and not gaussian.fusable:
        raise ConfigError(
            f"--gaussian-rope-phase megatron and --gaussian-rope-renorm rms are not computed with the frequencies of "
            f"{rotary_name(args)}: leave them out."
        )
    everywhere = tuple(range(1, args.num_layers + 1))
    skipped = layers_without_rope(args.no_rope_freq, args.num_layers)
    unrotated = everywhere if gaussian is not None and rotary_name(args) is None else skipped
    biases = bias_configs(args, context, windowed_layers(args))
    check_fold(args, context, biases, unrotated)
    return Settings(
        encoding=args.mc_encoding or args.position_embedding_type,
        rotary=rotary,
        context=context,
        gaussian=gaussian,
        biases=biases,
        additive=additive_config(args, context),
        retrofit=retrofit_config(args),
        gist=gist_config(args),
        objective=objective_config(args, context),
        prediction=prediction_config(args, context),
        watch=watch_config(args),
        curriculum=curriculum_stages(args, context),
        megacontext=args.megacontext,
        seed=args.seed,
        backend=rotary_backend(args, gaussian, rotary),
        no_rope_layers=unrotated,
        bias_fold=args.bias_fold,
        attention=attention_config(args, biases),
    )


def check_divisions(args: Namespace, context: ContextConfig) -> None:
    """Refuse micro-batches that split a raw sample's variants, and rows that CP or TP cannot share out.

    Reads arguments as they were typed, because Megatron's validation asserts some of this.  Raises ConfigError.
    """
    for flag in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, flag)
        if size is not None and size % context.variants:
            raise ConfigError(
                f"--{flag.replace('_', '-')} {size} must be a multiple of --mc-variants {context.variants}: a "
                "micro-batch holds all variants of its raw samples."
            )
    check_rows_divide(args, "--seq-length", args.seq_length)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.mc_encoding is not None and groups is not None and groups % args.tensor_model_parallel_size:
        raise ConfigError(
            f"--num-query-groups {groups} must be a multiple of --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size}."
        )


def check_rows_divide(args: Namespace, flag: str, rows: int) -> None:
    """Refuse a number of rows that context parallel or sequence parallel ranks cannot share out evenly."""
    cp = args.context_parallel_size
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    chunks = math.lcm(2 * cp if cp > 1 else 1, cp * tp)
    if rows % chunks:
        raise ConfigError(
            f"{flag} {rows} must be a multiple of {chunks}, which --context-parallel-size {cp} and "
            f"--sequence-parallel over --tensor-model-parallel-size {tp} need."
        )
