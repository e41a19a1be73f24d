"""A run put together: parsed arguments, settings, and the four things Megatron's loop is given."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from megacontext_megatron.arguments import (
    add_arguments,
    check_divisions,
    context_config,
    refuse_unsupported,
    settings_from,
)
from megacontext_megatron.argv import APEX_EXTENSION
from megacontext_megatron.attention.layer_spec import resolved_layers
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.attention_arguments import attention_notices
from megacontext_megatron.config import ConfigError, Settings
from megacontext_megatron.context.gistnet import TENSOR_PARTIAL
from megacontext_megatron.data_checks import (
    check_answer_tokens,
    check_data,
    check_end_of_document,
    check_tokenizers,
    holds_out,
)
from megacontext_megatron.encoding_lines import encoding_lines
from megacontext_megatron.model.datasets import DatasetProvider, check_teacher
from megacontext_megatron.model.gpt import MegaContextGPTModel, build_model
from megacontext_megatron.model.guard import GistGuard
from megacontext_megatron.model.objective import TrainingObjective
from megacontext_megatron.model.parallel_groups import sum_over_context, sum_partial_gradients
from megacontext_megatron.model.step import ForwardStep, needs_mask
from megacontext_megatron.model.teaching import Teacher
from megacontext_megatron.model.validation import loss_checks
from megacontext_megatron.retrofit.adapters import check_adapters, load_adapters
from megacontext_megatron.retrofit.checkpoint import (
    check_checkpoint,
    require_checkpoint,
    restore_settings,
    starts_retrofit,
)
from megacontext_megatron.retrofit.freezing import check_trains, freeze_base
from megacontext_megatron.telemetry import flops
from megacontext_megatron.telemetry.observer import TrainingObserver
from megacontext_megatron.telemetry.probes import Prober, check_probes
from megacontext_megatron.telemetry.sinks import Sinks

Namespace = argparse.Namespace


def parse(
    add_more: Callable[[argparse.ArgumentParser], argparse.ArgumentParser] | None = None,
    from_checkpoint: Sequence[str] = (),
) -> tuple[Namespace, Settings]:
    """Parse and validate `sys.argv`, refuse what cannot be honoured, and set Megatron's global variables.

    `add_more` adds a command's own groups; `from_checkpoint` names arguments that `--use-checkpoint-args` restores in
    addition.  Raises ConfigError before any model is built.
    """
    from megatron.training.arguments import parse_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import rebuild_tokenizer, set_global_variables

    destinations: dict[str, str] = {}

    def extended(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_arguments(add_more(parser) if add_more else parser)
        destinations.update({option: action.dest for action in parser._actions for option in action.option_strings})
        return parser

    args = parse_args(extended)
    require_checkpoint(args)
    if args.use_checkpoint_args:
        names = {destinations.get(word.split("=")[0]) for word in sys.argv[1:]}
        typed = {name: value for name, value in vars(args).items() if name in names}
        load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
        load_args_from_checkpoint(args)
        restore_settings(args, from_checkpoint, typed)
    refuse_unsupported(args)
    if args.seq_length is None:
        raise ConfigError("--seq-length is needed: the rows of a context.")
    if args.eval_interval is None and not args.skip_train:
        raise ConfigError("--eval-interval is needed, also with --eval-iters 0: Megatron counts evaluations by it.")
    check_divisions(args, context_config(args))
    if args.mc_encoding is not None:
        _seam_defaults(args)
    _validate(args)
    _announce_fusion(args)
    settings = settings_from(args)
    if settings.retrofit is not None and not args.skip_train:
        check_trains(settings)
    # As it is saved with a checkpoint: what follows from other flags could follow otherwise later.
    args.mc_gist_hidden_size = settings.gist.hidden_size if settings.gist.learned else None
    check_data(args)
    check_probes(args, settings, held_out=holds_out(args))
    # Writers make their folders, so they come after the last refusal; two checks need the tokenizer.
    rebuild_tokenizer(args)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_tokenizers(args)
    check_end_of_document(args)
    check_answer_tokens(args)
    _announce_padding(args)
    check_teacher(args, settings)
    check_checkpoint(args)
    if args.retrofit_adapters and args.skip_train:
        raise ConfigError("--retrofit-adapters starts a training: evaluate the checkpoint of one.")
    if args.retrofit_adapters:
        check_adapters(args, Path(args.retrofit_adapters))
    set_global_variables(args, build_tokenizer=False)
    return args, settings


def _validate(args: Namespace) -> None:
    """Run Megatron's own validation; what it asserts becomes a ConfigError that says what was asserted."""
    from megatron.training.arguments import validate_args

    try:
        validate_args(args, {})
    except AssertionError as error:
        asserted = traceback.extract_tb(error.__traceback__)[-1].line or "an assertion"
        raise ConfigError(f"Megatron refuses these flags: {str(error) or asserted}.") from error


def _announce_fusion(args: Namespace) -> None:
    """Say what the absence of NVIDIA Apex, which one fusion of the output layer needs, turns off in other layers."""
    absent = find_spec(APEX_EXTENSION) is None and not args.gradient_accumulation_fusion
    if absent and args.transformer_impl == "transformer_engine" and args.rank == 0:
        print(
            "> NVIDIA Apex is not installed: --no-gradient-accumulation-fusion is set, for Transformer Engine's layers "
            "too, whose weight gradients round to the parameters' type in every micro-batch before they are added up",
            flush=True,
        )


def _seam_defaults(args: Namespace) -> None:
    """Turn off Megatron's fused rope, which would rotate by slot, and give a length no encoding here reads."""
    if args.apply_rope_fusion and args.rank == 0:
        print(f"> {args.mc_encoding}: apply_rope_fusion is set False, rotation follows each row's span", flush=True)
    args.apply_rope_fusion = False
    # Restored from a checkpoint of another encoding, Megatron's own argument would name that one.
    args.position_embedding_type = "rope"
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.mc_source_length or args.seq_length


def _announce_padding(args: Namespace) -> None:
    """Say where another tensor-parallel size would pad the vocabulary differently, which no checkpoint survives."""
    from megatron.training import get_tokenizer

    tokenizer: Any = get_tokenizer()
    multiple = args.make_vocab_size_divisible_by
    alone = -(-tokenizer.vocab_size // multiple) * multiple
    if args.rank == 0 and args.padded_vocab_size != alone:
        print(
            f"> the vocabulary is padded to {args.padded_vocab_size} under --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} and would be to {alone} without: checkpoints of this run cannot change "
            "it, unless --make-vocab-size-divisible-by is raised",
            flush=True,
        )


def transformer_config(args: Namespace, settings: Settings) -> MegaContextTransformerConfig:
    """Return Megatron's transformer config of parsed arguments with the settings aboard."""
    from megatron.training.arguments import core_transformer_config_from_args

    config = cast(
        MegaContextTransformerConfig, core_transformer_config_from_args(args, config_class=MegaContextTransformerConfig)
    )
    config.mc_settings = settings
    if _layers_differ(settings, config.num_layers):
        config.hetereogenous_dist_checkpoint = True
    return config


def _layers_differ(settings: Settings, num_layers: int) -> bool:
    """Return whether some layers hold parameters that others lack, so that their checkpoint keys differ."""
    if settings.gaussian is None:
        return False
    turned = settings.gaussian.learnable_sigma != "none" or settings.rotary.by_layer is not None
    partly = turned and 0 < len(settings.no_rope_layers) < num_layers
    alone = any(len(bias.layers) < num_layers or bias.fire_shared for bias in settings.biases)
    return partly or alone or settings.slopes_by_query(1)


def _teacher(args: Namespace, settings: Settings) -> Teacher | None:
    """Return what the run learns from beside the text, None where that is nothing."""
    from megatron.training import get_tokenizer

    if settings.objective.teacher == "none":
        return None
    return Teacher(
        settings=settings,
        vocabulary=int(cast(Any, get_tokenizer()).vocab_size),
        padded=args.padded_vocab_size // args.tensor_model_parallel_size,
        needs_mask=needs_mask(args, settings),
    )


def _whole_gradients(finalize: Callable[..., None]) -> Callable[..., None]:
    """Return Megatron's finalize_model_grads, after which gradients of shared out blocks are added up."""

    def finalize_and_sum(model: Sequence[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        sum_partial_gradients(model, TENSOR_PARTIAL)

    return finalize_and_sum


def _gist_guard(settings: Settings, micro_batches: int) -> GistGuard | None:
    mixes = settings.megacontext and settings.context.plan != "recency"
    if not mixes or settings.watch.guards == "off":
        return None
    return GistGuard(settings.context, micro_batches, settings.watch.guards)


def gist_line(settings: Settings) -> str:
    """Return one line that says what gists are and what is trained beside the next-token loss."""
    gist, objective = settings.gist, settings.objective
    kind = f"GistNet, {gist.layers} layers of {gist.hidden_size}, {gist.pooling} pooling" if gist.learned else "means"
    moves = ", moving its spans" if gist.span_head else ""
    weights = {name: getattr(objective, name) for name in ("advantage", "kl", "contrast", "pooling")}
    weights |= {f"predict-level{level}": weight for level, weight in enumerate(settings.prediction.weights, start=1)}
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight) or "none"
    return f"gists: {kind}{moves} | terms beside next-token loss: {terms} | phase: {objective.phase}"


class Run:
    """The four callables of a training run: data sets, model provider, forward step, and its observer."""

    def __init__(self, args: Namespace, settings: Settings) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import get_tensorboard_writer, get_timers, get_wandb_writer

        self._args, self._settings = args, settings
        self._printed = False
        if settings.gist.learned:
            flops.install(settings)
        self.datasets = DatasetProvider(args, settings)
        self.objective = TrainingObjective(
            settings=settings, over_context=sum_over_context, consumed=lambda: args.consumed_train_samples
        )
        track = "A" if settings.megacontext else "off"
        self._observer = TrainingObserver(
            args,
            settings,
            lambda: Sinks(args.save, get_tensorboard_writer(), get_wandb_writer(), track),
            Prober(args, settings, self.datasets),
            lambda: self.objective.idle_parameters,
        )
        self._step = ForwardStep(
            settings=settings,
            micro_batch_size=args.micro_batch_size,
            eval_micro_batch_size=args.eval_micro_batch_size,
            needs_mask=needs_mask(args, settings),
            per_token_loss=args.calculate_per_token_loss,
            timers=get_timers(),
            objective=self.objective,
            teacher=_teacher(args, settings),
            observe=self._observer.hear,
            observe_gists=self._observer.watch.hear_gists,
            observe_moves=self._observer.watch.hear_moves,
            guard=_gist_guard(settings, get_num_microbatches()),
            check=loss_checks(not_finite=args.check_for_nan_in_loss_and_grad, spiky=args.check_for_spiky_loss),
        )
        self.forward_step = self._step.__call__

    def finish(self) -> None:
        """Write the last report, which an early exit (a signal, `--exit-duration-in-mins`) has left on its way."""
        self._observer.finish()

    def model_provider(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """Build one stage's model, as Megatron's get_model asks for it."""
        from megatron.core.distributed import finalize_model_grads

        args = self._args
        config = config or transformer_config(args, self._settings)
        config.finalize_model_grads_func = self._observer.finalizing(_whole_gradients(finalize_model_grads))
        # Saved with the arguments in every checkpoint.
        args.mc_layers = [layer.as_row() for layer in resolved_layers(config)]
        self._print_layers()
        model = build_model(
            config,
            args.padded_vocab_size,
            args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        if self._settings.retrofit is not None and not args.skip_train:
            self._retrofit(model)
        return model

    def _retrofit(self, model: torch.nn.Module) -> None:
        """Freeze the base; a run that starts from one asks its checkpoint for the base alone."""
        args = self._args
        trained = freeze_base(model, self._settings)
        cast(MegaContextGPTModel, model).expects_adapters = not starts_retrofit(args)
        if starts_retrofit(args) and args.retrofit_adapters:
            load_adapters(model, Path(args.retrofit_adapters))
        if args.rank == 0:
            print(f"> retrofit: the base is frozen, {len(trained)} tensors of this stage train", flush=True)

    def _print_layers(self) -> None:
        if self._args.rank != 0 or self._printed:
            return
        self._printed = True
        args = self._args
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        for line in encoding_lines(self._settings, args.num_attention_heads, groups, args.num_layers):
            print(f"> {line}", flush=True)
        print("> layer | encoding | rotary | window | bias | core attention", flush=True)
        for row in self._args.mc_layers:
            print("> " + " | ".join(row), flush=True)
        for line in attention_notices(args, self._settings.biases, self._settings.attention):
            print(f"> {line}", flush=True)
        if self._settings.megacontext:
            print(f"> {gist_line(self._settings)}", flush=True)
