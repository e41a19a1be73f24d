"""What working contexts do not support of Megatron's own requests, each by name and with its reason."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megacontext_megatron.encoding_config import LINEAR_BIASES

Namespace = argparse.Namespace


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A request of Megatron's that working contexts do not support; `asked` reads parsed arguments.

    `flag` starts with the flag that is to blame; the value or the company that makes it so may follow.
    """

    flag: str
    asked: Callable[[Namespace], bool]
    why: str


def _is_window(size: Sequence[int]) -> bool:
    return len(size) == 2 and size[0] >= 0 and size[1] == 0


def _given(dest: str) -> Callable[[Namespace], bool]:
    return lambda args: bool(getattr(args, dest, None))


def _on_te(args: Namespace) -> bool:
    return args.transformer_impl == "transformer_engine"


def _bends_bias(args: Namespace) -> bool:
    """Return whether a bias is asked for that is not linear in the distance."""
    biases = {*args.position_bias, *(["grape-a"] if args.grape_a else []), *args.retrofit}
    linear = {*LINEAR_BIASES, "alibi-lora", "stretch", "damping"}
    return bool(biases - linear) or ("grape-a" in biases and args.grape_a_gate not in ("none", "q"))


def _folding(name: str, asked: Callable[[Namespace], bool], why: str) -> Refusal:
    return Refusal(flag=f"--bias-fold with --{name}", asked=lambda a: a.bias_fold and asked(a), why=why)


def _adds_up(args: Namespace) -> bool:
    return not {"cope", "grape-ap", "fox"}.isdisjoint(args.position_bias)


def _package_missing() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return not HAVE_TE


def _without_package(also: Callable[[Namespace], bool]) -> Refusal:
    return Refusal(
        flag="--transformer-impl transformer_engine, the default, without Transformer Engine",
        asked=lambda a: _on_te(a) and also(a) and _package_missing(),
        why="the package transformer_engine cannot be imported here; install it with "
        "`bash scripts/environment.sh te`, or add --transformer-impl local",
    )


_WHOLE_ROWS = "a sample here is one working context, whose rows have no document boundaries to restart at"
_ITEM_ORDER = "the variants of a raw sample must arrive together and in order"
_ONE_MODEL = "only Megatron's GPTModel of standard attention layers carries span metadata"
_SPEC = "the plugin builds the layer spec itself"
_LEFT_OUT = "the plugin's layer spec has no such MLP, so that it would be left out silently"
_GRAPHS = "captured graphs have not been shown to update span metadata"

CP_COMM_TYPES = ("p2p", "a2a", "all_gather", "a2a+p2p")
"""How Transformer Engine's attention exchanges rows over context-parallel ranks."""


def _cp_types(args: Namespace) -> list[str]:
    """Return the exchange of every layer; one for all where the number of layers is not known yet."""
    types = list(args.cp_comm_type or ["p2p"])
    return types * (args.num_layers or 1) if len(types) == 1 else types


def _splits_rows(args: Namespace) -> bool:
    return _on_te(args) and args.context_parallel_size > 1


CONTEXT_PARALLEL_REFUSALS = (
    Refusal(
        flag="--cp-comm-type",
        asked=lambda a: _splits_rows(a) and not set(_cp_types(a)) <= set(CP_COMM_TYPES),
        why=f"it takes {', '.join(CP_COMM_TYPES)}",
    ),
    Refusal(
        flag="--cp-comm-type for some layers",
        asked=lambda a: _splits_rows(a) and bool(a.num_layers) and len(_cp_types(a)) != a.num_layers,
        why="it names one exchange for all layers, or one for each of --num-layers",
    ),
    Refusal(
        flag="--softmax-type with --context-parallel-size",
        asked=lambda a: _splits_rows(a) and a.softmax_type != "vanilla" and set(_cp_types(a)) != {"a2a"},
        why="Transformer Engine has it over context-parallel ranks for --cp-comm-type a2a alone",
    ),
)
"""Refusals of ways to exchange rows that Transformer Engine would reject in the first step."""

FOLD_REFUSALS = (
    _folding("retrofit", _given("retrofit"), "a frozen base never loses a channel"),
    _folding(
        "softmax-type",
        lambda a: a.softmax_type != "vanilla",
        "a number that a row's biases share is left out, which a softmax with a sink would see",
    ),
    _folding("fp16", _given("fp16"), "gradients in the channels it writes would leave its range; use --bf16"),
    _folding(
        "attention-output-gate",
        _given("attention_output_gate"),
        "Megatron splits and norms gated heads in one go, before the channels can be left out",
    ),
    _folding("qk-clip", _given("qk_clip"), "weights would be clipped for what the bias adds to logits"),
    _folding(
        "attention-backend unfused",
        lambda a: a.attention_backend.name == "unfused" and _on_te(a),
        "Transformer Engine's unfused attention rounds scores to the model's dtype; leave the flag out",
    ),
)
"""Refusals of what cannot be had with linear biases in channels of queries and keys."""

REFUSALS = (
    Refusal(
        flag="--mtp-num-layers",
        asked=_given("mtp_num_layers"),
        why="multi-token prediction would read the token after a gist's first token as its target",
    ),
    Refusal(flag="--reset-position-ids", asked=_given("reset_position_ids"), why=_WHOLE_ROWS),
    Refusal(flag="--reset-attention-mask", asked=_given("reset_attention_mask"), why=_WHOLE_ROWS),
    Refusal(
        flag="--dataloader-inter-document-masking", asked=_given("dataloader_inter_document_masking"), why=_WHOLE_ROWS
    ),
    Refusal(
        flag="--logits-load-dir", asked=_given("logits_load_dir"), why="cached logits belong to slots, not to rows"
    ),
    Refusal(flag="--sft", asked=_given("sft"), why="packed fine-tuning samples have no source tokens to collapse"),
    Refusal(flag="--fim-data", asked=_given("fim_data"), why="fill-in-the-middle reorders the tokens blocks stand for"),
    Refusal(flag="--perform-rl-step", asked=_given("perform_rl_step"), why="its samples are not working contexts"),
    Refusal(flag="--cuda-graph-impl", asked=lambda a: getattr(a, "cuda_graph_impl", "none") != "none", why=_GRAPHS),
    Refusal(flag="--enable-cuda-graph", asked=_given("enable_cuda_graph"), why=_GRAPHS),
    Refusal(flag="--external-cuda-graph", asked=_given("external_cuda_graph"), why=_GRAPHS),
    Refusal(flag="--optimizer-cuda-graph", asked=_given("optimizer_cuda_graph"), why=_GRAPHS),
    Refusal(
        flag="--overlap-moe-expert-parallel-comm",
        asked=_given("overlap_moe_expert_parallel_comm"),
        why="its schedule prepares inputs after another micro-batch has arrived",
    ),
    Refusal(flag="--use-megatron-fsdp", asked=_given("use_megatron_fsdp"), why="positional parameters stay in fp32"),
    Refusal(flag="--use-torch-fsdp2", asked=_given("use_torch_fsdp2"), why="positional parameters stay in fp32"),
    Refusal(flag="--hybrid-layer-pattern", asked=_given("hybrid_layer_pattern"), why=_ONE_MODEL),
    Refusal(flag="--hybrid-override-pattern", asked=_given("hybrid_override_pattern"), why=_ONE_MODEL),
    Refusal(flag="--is-hybrid-model", asked=_given("is_hybrid_model"), why=_ONE_MODEL),
    Refusal(flag="--multi-latent-attention", asked=_given("multi_latent_attention"), why=_ONE_MODEL),
    Refusal(
        flag="--heterogeneous-layers-config-path",
        asked=_given("heterogeneous_layers_config_path"),
        why=_ONE_MODEL,
    ),
    Refusal(
        flag="--heterogeneous-layers-config-encoded-json",
        asked=_given("heterogeneous_layers_config_encoded_json"),
        why=_ONE_MODEL,
    ),
    Refusal(flag="--experimental-attention-variant", asked=_given("experimental_attention_variant"), why=_ONE_MODEL),
    *(
        Refusal(flag=f"--{name.replace('_', '-')}", asked=_given(name), why=_SPEC)
        for name in ("spec", "qk_l2_norm", "kitchen_config_file", "kitchen_recipe_number", "use_kitchen_attention")
    ),
    *(
        Refusal(flag=f"--{name.replace('_', '-')}", asked=_given(name), why=_LEFT_OUT)
        for name in ("use_transformer_engine_op_fuser", "use_grouped_gemm_for_dense_mlp")
    ),
    Refusal(
        flag="--attention-backend local",
        asked=lambda a: a.attention_backend.name == "local",
        why="Megatron has it for --spec local alone; --transformer-impl local with --mc-global-backend megatron has "
        "the dense attention it means",
    ),
    Refusal(flag="--flash-decode", asked=_given("flash_decode"), why="its kernel rotates keys by their slot"),
    Refusal(
        flag="--fused-single-qkv-rope",
        asked=_given("fused_single_qkv_rope"),
        why="its kernel rotates queries and keys by their slot",
    ),
    Refusal(
        flag="--dataloader-type",
        asked=lambda a: getattr(a, "dataloader_type", None) in ("cyclic", "external"),
        why=_ITEM_ORDER,
    ),
    Refusal(flag="--full-validation", asked=_given("full_validation"), why=_ITEM_ORDER),
    Refusal(flag="--multiple-validation-sets", asked=_given("multiple_validation_sets"), why=_ITEM_ORDER),
    Refusal(flag="--hybrid-context-parallel", asked=_given("hybrid_context_parallel"), why=_ITEM_ORDER),
    Refusal(flag="--dynamic-context-parallel", asked=_given("dynamic_context_parallel"), why=_ITEM_ORDER),
    Refusal(flag="--phase-transition-iterations", asked=_given("phase_transition_iterations"), why=_ITEM_ORDER),
    Refusal(
        flag="--inprocess-restart", asked=_given("inprocess_restart"), why="the command is not wrapped for restarts"
    ),
    Refusal(flag="--log-straggler", asked=_given("log_straggler"), why="the forward step is not timed for it"),
    Refusal(
        flag="--transformer-impl",
        asked=lambda a: a.transformer_impl not in ("local", "transformer_engine"),
        why="training runs on local or transformer_engine layers",
    ),
    Refusal(
        flag="--transformer-impl transformer_engine with --cpu",
        asked=lambda a: a.cpu and _on_te(a),
        why="Transformer Engine has no kernels for the CPU; leave the flag out",
    ),
    Refusal(flag="--seed", asked=lambda a: a.seed < 0, why="plans are drawn from the seed, which must not be negative"),
    Refusal(
        flag="--dist-ckpt-strictness",
        asked=lambda a: a.dist_ckpt_strictness not in ("assume_ok_unexpected", "raise_unexpected", "raise_all"),
        why="weights missing from a checkpoint would stay random",
    ),
    Refusal(
        flag="--non-persistent-ckpt-type",
        asked=_given("non_persistent_ckpt_type"),
        why="a resumed run is checked against its checkpoint before it starts, which a node-local one does not allow",
    ),
    Refusal(
        flag="--ckpt-format",
        asked=lambda a: getattr(a, "ckpt_format", "torch_dist") != "torch_dist",
        why="only torch_dist checkpoints hold what a resumed run is checked against",
    ),
    _without_package(lambda a: a.mc_encoding is None),
)

SPAN_REFUSALS = (
    Refusal(
        flag="--mc-backend triton with --cpu",
        asked=lambda a: a.mc_backend == "triton" and a.cpu,
        why="the kernel runs on a GPU; leave the flag out",
    ),
    *(
        Refusal(
            flag=f"--mc-backend triton with --gaussian-rope-{name} {value}",
            asked=lambda a, name=name, value=value: (
                a.mc_backend == "triton" and getattr(a, f"gaussian_rope_{name}") == value
            ),
            why="the kernel does not compute it; use --mc-backend torch or auto",
        )
        for name, value in (("phase", "megatron"), ("renorm", "rms"))
    ),
    Refusal(
        flag="--gaussian-rope-log-width-bias with --transformer-impl transformer_engine",
        asked=lambda a: a.gaussian_rope_log_width_bias and _on_te(a),
        why="the dense attention of --transformer-impl local alone takes keys that are wider than values",
    ),
    Refusal(
        flag="--position-bias other than alibi and grape-a (also --grape-a-gate k or qk and --retrofit slow-bands) "
        "with --transformer-impl transformer_engine",
        asked=lambda a: _on_te(a) and _bends_bias(a),
        why="the dense attention of --transformer-impl local alone adds a bias that is not linear in the distance",
    ),
    *FOLD_REFUSALS,
    Refusal(
        flag="--use-distributed-optimizer with --retrofit",
        asked=lambda a: bool(a.retrofit) and a.use_distributed_optimizer,
        why="Megatron's cannot save a rank on which nothing trains; leave it out, adapters are small",
    ),
    Refusal(
        flag="--deterministic-mode with --grapem-contextual or --position-bias cope, grape-ap or fox",
        asked=lambda a: a.deterministic_mode and not a.cpu and (a.grapem_contextual or _adds_up(a)),
        why="they add up over rows, for which PyTorch has no deterministic kernel on a GPU",
    ),
    Refusal(
        flag="--grapem-contextual with --transformer-impl transformer_engine",
        asked=lambda a: _on_te(a) and a.grapem_contextual,
        why="its layers norm an attention's input inside the projection, where steps cannot be read; add "
        "--transformer-impl local",
    ),
    Refusal(
        flag="--transformer-impl transformer_engine without --bf16 or --fp16",
        asked=lambda a: _on_te(a) and not (a.bf16 or a.fp16),
        why="Transformer Engine multiplies fp32 matrices in TF32 and has neither flash nor fused attention for them; "
        "add --bf16, or --transformer-impl local to train in fp32",
    ),
    Refusal(
        flag="--fp8-format with --transformer-impl local",
        asked=lambda a: bool(a.fp8) and not _on_te(a),
        why="only Transformer Engine layers compute in it",
    ),
    Refusal(flag="--fp4-format", asked=_given("fp4"), why="span metadata has not been shown to train with it"),
    *(
        Refusal(
            flag=f"--{name.replace('_', '-')}",
            asked=_given(name),
            why="attention in 8 bits has not been shown to keep what positions do to queries and keys",
        )
        for name in ("fp8_dot_product_attention", "fp8_multi_head_attention")
    ),
    Refusal(
        flag="--tp-comm-overlap",
        asked=_given("tp_comm_overlap"),
        why="its communication buffers have not been shown to work with span metadata",
    ),
    Refusal(
        flag="--cpu-offloading-num-layers",
        asked=_given("cpu_offloading_num_layers"),
        why="it has not been shown to keep queries and keys that the gradients of positions still read",
    ),
    Refusal(
        flag="--te-precision-config-file",
        asked=_given("te_precision_config_file"),
        why="layers of several precisions have not been shown to train with span metadata",
    ),
    Refusal(
        flag="--fine-grained-activation-offloading",
        asked=_given("fine_grained_activation_offloading"),
        why="it releases queries and keys that the gradients of positions still read",
    ),
    Refusal(
        flag="--attention-backend with --transformer-impl local",
        # --cpu asks for the unfused itself, and has nothing else.
        asked=lambda a: not _on_te(a) and a.attention_backend.name not in ("auto", "unfused" if a.cpu else "auto"),
        why="it chooses among Transformer Engine's; on local layers --mc-global-backend and --mc-window-backend do, "
        "megatron for dense attention",
    ),
    Refusal(
        flag="--attention-backend unfused with --context-parallel-size",
        asked=lambda a: a.attention_backend.name == "unfused" and _on_te(a) and a.context_parallel_size > 1,
        why="Transformer Engine's unfused attention sees one rank's rows alone; leave the flag out",
    ),
    Refusal(
        flag="--window-size other than ROWS,0",
        asked=lambda a: a.window_size is not None and not _is_window(a.window_size),
        why="a row sees rows before it (127,0 is a window of 128 rows); leave the flag out where all of them are seen",
    ),
    Refusal(
        flag="--cp-comm-type with --transformer-impl local",
        asked=lambda a: a.cp_comm_type not in (None, ["p2p"]) and not _on_te(a),
        why="the local layers gather keys over the context-parallel group",
    ),
    *CONTEXT_PARALLEL_REFUSALS,
    Refusal(
        flag="--fp32-residual-connection",
        asked=lambda a: a.fp32_residual_connection and (a.bf16 or a.fp16),
        why="the norms of the layers run in the parameters' type",
    ),
    *(
        Refusal(
            flag=f"--{flag} with --transformer-impl local",
            asked=lambda a, name=name: not _on_te(a) and bool(getattr(a, name)),
            why=f"the norms of the local layers {lack}",
        )
        for flag, name, lack in (
            ("apply-layernorm-1p", "layernorm_zero_centered_gamma", "have no zero-centred weights"),
            ("fused-residual-rmsnorm", "fused_residual_rmsnorm", "leave the residual alone"),
        )
    ),
    _without_package(lambda a: True),
)
"""Refusals of runs in which the plugin's encoding is active.  What is asked for of Transformer Engine is judged before
whether the package is there."""
