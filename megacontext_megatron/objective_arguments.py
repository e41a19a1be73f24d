"""From flags to the settings of gists, objective, prediction, probes and curriculum; refuses what does not fit."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any, cast

from megacontext_megatron.config import (
    ConfigError,
    ContextConfig,
    CurriculumStage,
    GistConfig,
    ObjectiveConfig,
    PredictionConfig,
    WatchConfig,
)
from megacontext_megatron.flags import GistFlags, ObjectiveFlags, PredictionFlags, WatchFlags

Namespace = argparse.Namespace

LEAST_GUARD_AFTER = 2
"""Iterations before GistNet's first layers can have a gradient: its last one moves first."""

GREATEST_DEFAULT_WIDTH = 512
"""GistNet is no wider than this unless its flag says so."""


def _given(args: Namespace, flags: type, config: type, prefix: str) -> dict[str, Any]:
    """Return the values of a group's flags that are fields of `config`, without the prefix of their names."""
    fields = {f.name for f in dataclasses.fields(config)}
    given = {f.name.removeprefix(prefix): getattr(args, f.name) for f in dataclasses.fields(flags)}
    return {name: value for name, value in given.items() if name in fields}


def _refuse_changed(args: Namespace, flags: type, needs: str, *, but: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(flags):
        if field.name not in but and getattr(args, field.name) != field.default:
            raise ConfigError(f"--{field.name.replace('_', '-')} has no effect without {needs}.")


def gist_config(args: Namespace) -> GistConfig:
    """Return the settings of gists; raises ConfigError for flags that have no effect or cannot be honoured."""
    if args.mc_gist_kind == "mean":
        _refuse_changed(args, GistFlags, "--mc-gist-kind gistnet")
    elif args.mc_plan == "recency":
        raise ConfigError("--mc-gist-kind gistnet has no effect with --mc-plan recency, which collapses nothing.")
    if args.mc_gist_span_head:
        _check_span_head(args)
    width = args.mc_gist_hidden_size
    if width is None:
        width = min(args.hidden_size, GREATEST_DEFAULT_WIDTH)
    given = {**_given(args, GistFlags, GistConfig, "mc_gist_"), "hidden_size": width}
    return GistConfig(hidden=args.hidden_size, **given)


def _check_span_head(args: Namespace) -> None:
    if args.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--mc-gist-span-head with --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} is not supported: the gradients of places would have to travel "
            "from every stage to the first; use one stage."
        )
    if args.gaussian_rope_phase == "megatron":
        raise ConfigError("--mc-gist-span-head moves centres off the integers: use --gaussian-rope-phase exact.")
    if args.gaussian_rope_sigma == "none":
        raise ConfigError("--mc-gist-span-head has no sigma to scale with --gaussian-rope-sigma none.")
    skipped = args.no_rope_freq
    if skipped == 1 or (isinstance(skipped, list) and all(skipped)):
        raise ConfigError("--mc-gist-span-head moves what no layer reads: --no-rope-freq leaves all without rotary.")


def objective_config(args: Namespace, context: ContextConfig) -> ObjectiveConfig:
    """Return the settings of the objective; raises ConfigError for terms that would have nothing to act on."""
    given = {
        f.name: getattr(args, f"mc_loss_{f.name}", getattr(args, f"mc_{f.name}", None))
        for f in dataclasses.fields(ObjectiveConfig)
    }
    given["after_token"] = tuple(given["after_token"] or ())
    objective = ObjectiveConfig(**cast(dict[str, Any], given))
    for name in ("advantage", "kl", "contrast", "pooling", "gist_rows"):
        if not 0 <= getattr(objective, name) < math.inf:
            flag, value = f"--mc-loss-{name.replace('_', '-')}", getattr(objective, name)
            raise ConfigError(f"{flag} {value} must be a finite number that is not negative.")
    for token in objective.after_token:
        if token < 0:
            raise ConfigError(f"--mc-loss-after-token {token} is no token id: give the tokenizer's own.")
    if objective.advantage and context.variants < 2:
        raise ConfigError(
            "--mc-loss-advantage compares variants of a sample: give --mc-variants 2 or more, the first of which is "
            "the recency baseline."
        )
    _check_gist_terms(args, objective, context)
    _check_teacher(args, objective, context)
    return objective


def _check_gist_terms(args: Namespace, objective: ObjectiveConfig, context: ContextConfig) -> None:
    learned = args.mc_gist_kind == "gistnet"
    for flag, on in (("--mc-loss-contrast", objective.contrast), ("--mc-loss-pooling", objective.pooling)):
        if on and not learned:
            raise ConfigError(f"{flag} trains gists: it needs --mc-gist-kind gistnet.")
    if objective.phase != "substitution" and not objective.pooling:
        raise ConfigError(f"--mc-phase {objective.phase} needs --mc-loss-pooling, the term that its gists learn from.")
    scheduled = objective.phase == "pooling-then-substitution"
    if objective.pooling_samples < 0 or objective.pooling_samples % context.variants:
        raise ConfigError(
            f"--mc-pooling-samples {objective.pooling_samples} must be a positive multiple of --mc-variants "
            f"{context.variants}."
        )
    if scheduled != bool(objective.pooling_samples):
        raise ConfigError(
            "--mc-phase pooling-then-substitution and --mc-pooling-samples, at which it goes over, need each other."
        )
    if objective.phase == "pooling" and objective.contrast:
        raise ConfigError("--mc-loss-contrast has no effect with --mc-phase pooling, which leaves it out throughout.")
    if objective.phase == "pooling" and args.mc_gist_span_head:
        raise ConfigError(
            "--mc-gist-span-head would never learn with --mc-phase pooling, whose rows give gists no gradient: use "
            "--mc-phase pooling-then-substitution or substitution."
        )
    if objective.gist_rows != ObjectiveFlags().mc_loss_gist_rows and context.plan == "recency":
        raise ConfigError("--mc-loss-gist-rows has no effect without gists: every row is a token.")


def _check_teacher(args: Namespace, objective: ObjectiveConfig, context: ContextConfig) -> None:
    if objective.kl and objective.teacher == "none":
        raise ConfigError("--mc-loss-kl needs a teacher: give --mc-teacher forward, or cache with --mc-teacher-path.")
    if objective.pooling and objective.teacher != "cache":
        raise ConfigError(
            "--mc-loss-pooling regresses on cached states: give --mc-teacher cache and --mc-teacher-path."
        )
    if objective.teacher != "none" and not (objective.kl or objective.pooling):
        raise ConfigError(
            f"--mc-teacher {objective.teacher} teaches nothing without --mc-loss-kl or --mc-loss-pooling."
        )
    writes = hasattr(args, "mc_teacher_samples")
    if not writes and (objective.teacher == "cache") != (objective.teacher_path is not None):
        raise ConfigError("--mc-teacher cache and --mc-teacher-path, the folder of the cache, need each other.")
    if objective.teacher == "forward":
        _check_second_forward(args, context)


def _check_second_forward(args: Namespace, context: ContextConfig) -> None:
    if context.window == context.source_length:
        raise ConfigError(
            "--mc-teacher forward would teach the model what it sees itself: --seq-length is all of --mc-source-length."
        )
    if args.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--mc-teacher forward runs the model twice a micro-batch, which pipeline stages cannot: use --mc-teacher "
            "cache, or --pipeline-model-parallel-size 1."
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--mc-teacher forward with --context-parallel-size {args.context_parallel_size} is not supported: the "
            "last rows of the full context lie on other ranks than those of the window; use --mc-teacher cache."
        )
    ranks = args.tensor_model_parallel_size if args.sequence_parallel else 1
    if context.source_length % ranks:
        raise ConfigError(
            f"--mc-source-length {context.source_length} must be a multiple of --tensor-model-parallel-size {ranks} "
            "under --sequence-parallel, over which --mc-teacher forward shares out its rows."
        )


def prediction_config(args: Namespace, context: ContextConfig) -> PredictionConfig:
    """Return the settings of gist prediction; raises ConfigError where there is nothing to predict."""
    prediction = PredictionConfig(**_given(args, PredictionFlags, PredictionConfig, "mc_predict_"))
    if not prediction.active:
        _refuse_changed(args, PredictionFlags, "--mc-predict-level1 or --mc-predict-level2")
        return prediction
    if context.plan == "recency":
        raise ConfigError("--mc-predict-level1 and -level2 have no gists to predict with --mc-plan recency.")
    if args.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--mc-predict-level1 and -level2 are not supported with --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size}: the last stage has no gists to compare with."
        )
    for level, weight in enumerate(prediction.weights, start=1):
        if not 0 <= weight < math.inf:
            raise ConfigError(f"--mc-predict-level{level} {weight} must be a finite number that is not negative.")
        if weight and level > context.max_level:
            raise ConfigError(f"--mc-predict-level{level} needs --mc-max-level {level}: there are no such gists.")
        width = context.block_size**level
        if weight and context.source_length < 2 * width:
            raise ConfigError(
                f"--mc-predict-level{level} predicts the next {width} tokens, of which --mc-source-length "
                f"{context.source_length} holds no two spans."
            )
    return prediction


def watch_config(args: Namespace) -> WatchConfig:
    """Return the settings of probes and guards; raises ConfigError for values without a meaning."""
    watch = WatchConfig(**_given(args, WatchFlags, WatchConfig, "mc_"))
    if watch.probe_interval < 0 or watch.guard_after < 0:
        raise ConfigError("--mc-probe-interval and --mc-guard-after must not be negative.")
    if args.mc_gist_kind == "gistnet" and watch.guards != "off" and watch.guard_after < LEAST_GUARD_AFTER:
        raise ConfigError(
            f"--mc-guard-after {watch.guard_after} is too soon for --mc-gist-kind gistnet, whose last layer starts at "
            f"0 and lets no gradient through at first: use {LEAST_GUARD_AFTER} or more."
        )
    if watch.probe_samples < 1:
        raise ConfigError(f"--mc-probe-samples {watch.probe_samples} must be at least 1.")
    return watch


def curriculum_stages(args: Namespace, context: ContextConfig) -> tuple[CurriculumStage, ...]:
    """Return the stages of `--mc-curriculum`; raises ConfigError naming the stage that cannot be honoured."""
    stages = tuple(_stage(word, context) for word in args.mc_curriculum or ())
    if stages and context.plan == "recency":
        raise ConfigError("--mc-curriculum has no effect with --mc-plan recency, which collapses nothing.")
    if list(stages) != sorted(stages, key=lambda stage: stage.samples) or len({s.samples for s in stages}) < len(
        stages
    ):
        raise ConfigError("--mc-curriculum must name its stages in order of their samples, each number once.")
    if stages and stages[0].samples != 0:
        raise ConfigError(f"--mc-curriculum must begin with a stage at 0 samples, not at {stages[0].samples}.")
    for stage in stages:
        if stage.samples % context.variants:
            raise ConfigError(
                f"--mc-curriculum stage at {stage.samples} contexts would split a sample's --mc-variants "
                f"{context.variants}: use a multiple of it."
            )
        _check_stage(stage, context)
    return stages


def _stage(word: str, context: ContextConfig) -> CurriculumStage:
    parts = word.split(":")
    try:
        samples, history = int(parts[0]), int(parts[1])
        probability = float(parts[2]) if len(parts) > 2 else context.level2_prob
    except (ValueError, IndexError):
        parts = []
    if not 2 <= len(parts) <= 3:
        raise ConfigError(f"--mc-curriculum {word} is no stage: write SAMPLES:TOKENS or SAMPLES:TOKENS:LEVEL2_PROB.")
    if len(parts) == 3 and context.plan == "heuristic":
        raise ConfigError(f"--mc-curriculum {word} names a probability, which --mc-plan heuristic does not read.")
    if len(parts) == 3 and context.max_level < 2:
        raise ConfigError(f"--mc-curriculum {word} names a probability of level 2, which --mc-max-level 1 rules out.")
    return CurriculumStage(samples=samples, history=history, level2_prob=probability)


def _check_stage(stage: CurriculumStage, context: ContextConfig) -> None:
    k = context.block_size
    if stage.history % k or not context.window < stage.history <= context.source_length:
        raise ConfigError(
            f"--mc-curriculum stage of {stage.history} tokens: stages cover a multiple of --mc-block-size {k}, more "
            f"than --seq-length {context.window} and at most --mc-source-length {context.source_length}."
        )
    try:
        stage.of(context)
    except ConfigError as error:
        raise ConfigError(f"--mc-curriculum stage of {stage.history} tokens: {error}") from error
