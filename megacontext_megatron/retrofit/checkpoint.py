"""The checkpoint contract: which settings a checkpoint fixes, and what happens where a run differs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacontext_megatron.config import ConfigError
from megacontext_megatron.encoding_flags import AdditiveFlags, BiasFlags, GrapeFlags, RotaryFlags
from megacontext_megatron.retrofit.encoding_parameters import encoding_defaults, encoding_parameters

Namespace = argparse.Namespace

ROTARY_SETTINGS = (
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "no_rope_freq",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "yarn_original_max_position_embeddings",
    "mrope_section",
)
PATTERN_SETTINGS = ("window_size", "window_attn_skip_freq")
GAUSSIAN_SETTINGS = (
    "gaussian_rope_sigma",
    "gaussian_rope_learnable_sigma",
    "gaussian_rope_sides",
    "gaussian_rope_renorm",
    "gaussian_rope_phase",
    "gaussian_rope_log_width_bias",
)
ENCODING_SETTINGS = tuple(
    field.name for group in (RotaryFlags, GrapeFlags, BiasFlags, AdditiveFlags) for field in dataclasses.fields(group)
)
RETROFIT_SETTINGS = ("retrofit", "retrofit_lora_rank", "retrofit_lora_length")
CONTEXT_SETTINGS = ("mc_block_size", "mc_max_level")
GIST_SETTINGS = (
    "mc_gist_kind",
    "mc_gist_layers",
    "mc_gist_hidden_size",
    "mc_gist_pooling",
    "mc_gist_span_head",
)
MODEL_SETTINGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "qk_layernorm",
    "attention_output_gate",
    "softmax_type",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "openai_gelu",
    "layernorm_zero_centered_gamma",
    "use_mup",
    "add_bias_linear",
    "add_qkv_bias",
    "untie_embeddings_and_output_weights",
    "num_experts",
)
EXPERT_SETTINGS = (
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
)
"""With MODEL_SETTINGS: what weights are made for. Megatron drops weights that a run has no use for without a word."""
NOT_THE_FUNCTION = (
    "recompute_",
    "fp8",
    "fp4",
    "cuda_graph",
    "cpu_offloading",
    "fine_grained",
    "cp_comm",
    "tp_comm",
    "moe_token_dispatcher",
    "moe_permute_fusion",
    "moe_router_fusion",
    "moe_enable_deepep",
    "moe_flex_dispatcher",
    "fused_residual",
    "use_te_activation",
    "symmetric_ar",
    "attention_backend",
    "transformer_impl",
    "pipeline_",
    "num_layers_in_",
    "distribute_saved",
    "use_kitchen",
    "kitchen_",
    "config_logger",
    "inference_",
)
"""Prefixes of transformer settings that change how a model is run rather than what it computes."""
RESUME_SETTINGS = ("megacontext", "mc_variants", "mc_source_length", "seq_length")
"""Fixed for a run that continues another's data order; free for one that only takes its weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRun:
    """The arguments a checkpoint was saved with, and where it lies."""

    path: Path
    args: Namespace

    @property
    def encoding(self) -> str:
        """The checkpoint's encoding; one without plugin arguments counts as the stock encoding it names."""
        return getattr(self.args, "mc_encoding", None) or getattr(self.args, "position_embedding_type", "unknown")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A setting in which a run and a checkpoint differ."""

    name: str
    saved: Any
    asked: Any

    def __str__(self) -> str:
        """Return the difference as flag: saved value, asked value."""
        flag = {"add_bias_linear": "--disable-bias-linear"}.get(self.name, f"--{self.name.replace('_', '-')}")
        saved, asked = self.saved, self.asked
        if self.name == "add_bias_linear":
            saved, asked = not saved, not asked
        return f"{flag}: checkpoint {saved}, this run {asked}"


def checkpoint_path(folder: str, step: int | None = None) -> Path | None:
    """Return the folder of the iteration that Megatron would load from `folder`, None where there is none.

    Raises ConfigError for a tracker that names nothing readable, and for another format than torch_dist.
    """
    from megatron.core import dist_checkpointing

    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    word = tracker.read_text().strip()
    if word != "release" and not word.isdecimal():
        raise ConfigError(f"{tracker} holds {word!r} instead of an iteration number: restore or remove it.")
    if word == "release" and step is not None:
        raise ConfigError(f"{tracker} names a release, from which --ckpt-step {step} cannot choose: leave it out.")
    path = Path(folder) / ("release" if word == "release" else f"iter_{int(word if step is None else step):07d}")
    if not path.is_dir():
        raise ConfigError(
            f"{path} does not exist, though {tracker if step is None else f'--ckpt-step {step}'} names it."
        )
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ConfigError(f"{path} is not a torch_dist checkpoint: convert it with Megatron's tools first.")
    return path


def require_checkpoint(args: Namespace) -> None:
    """Refuse `--load` or `--pretrained-checkpoint` without a checkpoint: Megatron would train from random weights.

    A first launch of a job that saves where it loads from is let through, with a line that says so.
    """
    if args.load is not None and checkpoint_path(args.load, args.ckpt_step) is not None:
        return
    if args.pretrained_checkpoint:
        if checkpoint_path(args.pretrained_checkpoint, args.ckpt_step) is None:
            raise ConfigError(f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no checkpoint.")
        return
    if args.load is None:
        return
    same = args.save is not None and Path(args.save).resolve() == Path(args.load).resolve()
    needed = args.ckpt_step is not None or args.finetune or args.use_checkpoint_args or args.exit_on_missing_checkpoint
    if not same or needed:
        raise ConfigError(
            f"--load {args.load} holds no checkpoint, and training would start from random weights: correct the path, "
            "or leave --load out (a new job that resumes itself gives --load and --save the same folder)."
        )
    if args.rank == 0:
        print(f"> --load and --save name {args.load}, which holds no checkpoint yet: starting a new run", flush=True)


def saved_run(folder: str | None, step: int | None = None) -> SavedRun | None:
    """Read the arguments of the checkpoint in `folder`, None where there is none."""
    from megatron.core import dist_checkpointing

    path = None if folder is None else checkpoint_path(folder, step)
    if path is None:
        return None
    common = dist_checkpointing.load_common_state_dict(str(path))
    if "args" not in common:
        raise ConfigError(f"{path} holds no arguments to compare this run with.")
    return SavedRun(path=path, args=common["args"])


def source_of(args: Namespace) -> SavedRun | None:
    """Return the checkpoint a run starts from: `--load`, or else `--pretrained-checkpoint`."""
    return saved_run(args.load, args.ckpt_step) or saved_run(args.pretrained_checkpoint, args.ckpt_step)


def restore_settings(args: Namespace, more: Sequence[str], typed: Mapping[str, Any]) -> None:
    """Give a run under `--use-checkpoint-args` its checkpoint's encoding, model function and fixed settings.

    Megatron restores some of its own arguments and knows only `rope`.  `more` names further arguments to restore.  What
    was typed, by name, keeps its value, Megatron's own arguments included; a difference is then refused like any other.
    """
    saved = source_of(args)
    if saved is None:
        raise ConfigError("--use-checkpoint-args needs --load or --pretrained-checkpoint.")
    names = {*GAUSSIAN_SETTINGS, *CONTEXT_SETTINGS, *RESUME_SETTINGS, *ROTARY_SETTINGS, *PATTERN_SETTINGS}
    names |= {*ENCODING_SETTINGS, *RETROFIT_SETTINGS}
    names |= {"mc_recent_tokens", "mc_horizon", "mc_plan", "mc_level2_prob", "mc_eod_policy"}
    if typed.get("mc_gist_kind") != "mean":
        names |= set(GIST_SETTINGS)
    names |= function_arguments(args) | set(more)
    was = getattr(saved.args, "mc_encoding", None)
    if "mc_encoding" not in typed and typed.get("position_embedding_type", was) == was:
        names.add("mc_encoding")
    for name in names:
        if hasattr(saved.args, name):
            setattr(args, name, getattr(saved.args, name))
    if "mc_encoding" in names and not hasattr(saved.args, "mc_encoding"):
        args.mc_encoding = None
    for name, value in typed.items():
        setattr(args, name, value)


def function_arguments(args: Namespace) -> set[str]:
    """Return the arguments that shape what a model computes: its transformer config without layout and precision."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    layout = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    names = {field.name for field in dataclasses.fields(TransformerConfig)} - layout
    return {name for name in names if hasattr(args, name) and not name.startswith(NOT_THE_FUNCTION)}


def differences(args: Namespace, saved: SavedRun, *, resumes: bool) -> list[Difference]:
    """Return the fixed settings in which a run differs from a checkpoint, those of a resumed run included if asked."""
    asked_encoding = args.mc_encoding or args.position_embedding_type
    if asked_encoding != saved.encoding:
        found = [Difference(name="position_embedding_type", saved=saved.encoding, asked=asked_encoding)]
        shared: tuple[str, ...] = ROTARY_SETTINGS
    else:
        found = []
        shared = (*ROTARY_SETTINGS, *PATTERN_SETTINGS)
        if args.mc_encoding is not None or getattr(saved.args, "mc_encoding", None) is not None:
            shared += (*GAUSSIAN_SETTINGS, *ENCODING_SETTINGS)
    if args.megacontext and getattr(saved.args, "megacontext", False):
        shared += (*CONTEXT_SETTINGS, *GIST_SETTINGS)
    if resumes:
        shared += (*RESUME_SETTINGS, *RETROFIT_SETTINGS)
    return found + _compared(args, saved, shared)


def misfits(args: Namespace, saved: SavedRun) -> list[Difference]:
    """Return the settings in which a run's model has other parameters than a checkpoint's, so that none can load."""
    if args.moe_use_upcycling:
        return []
    names = MODEL_SETTINGS + (EXPERT_SETTINGS if args.num_experts else ())
    if starts_retrofit(args):
        # What a retrofit adds is what its base does not have.
        return _compared(args, saved, names)
    if args.mc_encoding is not None and args.gaussian_rope_learnable_sigma != "none":
        names += ("gaussian_rope_learnable_sigma", "no_rope_freq")
        names += ("mc_max_level",) if args.gaussian_rope_learnable_sigma != "layer" else ()
    if args.mc_encoding is not None and args.gaussian_rope_log_width_bias:
        names += ("gaussian_rope_log_width_bias",)
    if args.mc_gist_kind == "gistnet":
        # GistNet has a weight for each place of a block.
        names += (*GIST_SETTINGS, "mc_block_size")
    return [*_compared(args, saved, names), *_absent(args, saved)]


def _absent(args: Namespace, saved: SavedRun) -> list[Difference]:
    """Return what a run's encoding needs parameters for, and the checkpoint has none or others for."""
    asked = encoding_parameters(args)
    known = encoding_parameters(argparse.Namespace(**{**encoding_defaults(), **vars(saved.args)}))
    return [
        Difference(name=name, saved=known.get(name), asked=value)
        for name, value in asked.items()
        if value != known.get(name)
    ]


def _compared(args: Namespace, saved: SavedRun, names: Sequence[str]) -> list[Difference]:
    """Return the differences in settings that the checkpoint records, and in the plugin's where it has none of them."""
    own = {
        **encoding_defaults(),
        "gaussian_rope_learnable_sigma": "none",
        "gaussian_rope_log_width_bias": False,
        "mc_gist_kind": "mean",
        "mc_gist_span_head": False,
    }
    missing = object()
    found = []
    for name in names:
        was, now = _read(saved.args, name, own.get(name, missing)), _read(args, name, None)
        if was is not missing and _comparable(was) != _comparable(now):
            found.append(Difference(name=name, saved=was, asked=now))
    return found


def starts_retrofit(args: Namespace) -> bool:
    """Return whether a run puts adapters on a base, rather than going on with a retrofit."""
    fresh = args.load is None or checkpoint_path(args.load, args.ckpt_step) is None
    return bool(args.retrofit) and fresh


def _read(args: Namespace, name: str, default: Any) -> Any:
    """Return an argument, and where heads are not grouped as many query groups as heads: Megatron sets that late."""
    if name == "num_query_groups" and hasattr(args, name) and not getattr(args, "group_query_attention", False):
        return args.num_attention_heads
    return getattr(args, name, default)


def _comparable(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return frozenset(value)
    return tuple(value) if isinstance(value, list) else value


def _check_base(args: Namespace, saved: SavedRun) -> None:
    """Refuse to retrofit what has parameters of the plugin already: a retrofit would start them anew."""
    was = argparse.Namespace(**{**encoding_defaults(), **vars(saved.args)})
    held = [f"--{name.replace('_', '-')}" for name in encoding_parameters(was)]
    for name, plain in (("gaussian_rope_learnable_sigma", "none"), ("gaussian_rope_log_width_bias", False)):
        held += [f"--{name.replace('_', '-')}"] if getattr(was, name, plain) != plain else []
    held += ["--mc-gist-kind gistnet"] if getattr(was, "mc_gist_kind", "mean") == "gistnet" else []
    if held:
        raise ConfigError(
            f"--retrofit needs a base without parameters of the plugin, and {saved.path} was trained with "
            f"{', '.join(held)}: go on with it by --load, or --finetune it."
        )


def check_checkpoint(args: Namespace) -> None:
    """Refuse a checkpoint of another configuration, before a model is built.

    `--finetune` prints each difference instead, unless the weights do not fit, and Megatron then resets consumed
    samples.  Raises ConfigError.
    """
    saved = source_of(args)
    if saved is None:
        return
    was = getattr(saved.args, "padded_vocab_size", args.padded_vocab_size)
    if was != args.padded_vocab_size:
        raise ConfigError(
            f"the vocabulary of {saved.path} is padded to {was}, this run's to {args.padded_vocab_size}: padding grows "
            "with --tensor-model-parallel-size, so choose --vocab-size and --make-vocab-size-divisible-by such that "
            f"--make-vocab-size-divisible-by times every --tensor-model-parallel-size divides {was}."
        )
    if starts_retrofit(args):
        _check_base(args, saved)
    fresh = args.finetune or args.load is None or checkpoint_path(args.load, args.ckpt_step) is None
    unfit = misfits(args, saved)
    found = [each for each in differences(args, saved, resumes=not fresh) if each not in unfit]
    if refused := unfit if fresh else [*unfit, *found]:
        listed = "; ".join(str(difference) for difference in refused)
        otherwise = "" if unfit else ", or --finetune to start a new run from its weights"
        raise ConfigError(f"{saved.path} was trained with other settings ({listed}): use the checkpoint's{otherwise}.")
    for difference in found:
        if args.rank == 0:
            print(f"> finetuning with another {difference}", flush=True)
    consumed = 0 if fresh else getattr(saved.args, "consumed_train_samples", 0)
    if consumed % args.mc_variants:
        raise ConfigError(
            f"{saved.path} has consumed {consumed} samples, which is not a multiple of --mc-variants "
            f"{args.mc_variants}: resume with the --mc-variants it was trained with, or use --finetune."
        )
