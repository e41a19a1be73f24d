"""What working contexts do not support of Megatron's own requests, each by name and with its reason."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

Namespace = argparse.Namespace


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A request of Megatron's that working contexts do not support; `asked` reads parsed arguments."""

    flag: str
    asked: Callable[[Namespace], bool]
    why: str


def _given(dest: str) -> Callable[[Namespace], bool]:
    return lambda args: bool(getattr(args, dest, None))


_WHOLE_ROWS = "a sample here is one working context, whose rows have no document boundaries to restart at"
_ITEM_ORDER = "the variants of a raw sample must arrive together and in order"
_ONE_MODEL = "only Megatron's GPTModel of standard attention layers carries span metadata"
_LOCAL = "only Transformer Engine layers compute in it, and span metadata runs on local layers so far"
_GRAPHS = "captured graphs have not been shown to update span metadata"

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
    Refusal(flag="--spec", asked=_given("spec"), why="the plugin builds the layer spec itself"),
    Refusal(flag="--qk-l2-norm", asked=_given("qk_l2_norm"), why="the plugin builds the layer spec itself"),
    *(
        Refusal(flag=f"--{name.replace('_', '-')}", asked=_given(name), why="the plugin builds the layer spec itself")
        for name in ("kitchen_config_file", "kitchen_recipe_number", "use_kitchen_attention")
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
)

SPAN_REFUSALS = (
    Refusal(
        flag="--transformer-impl",
        asked=lambda a: a.transformer_impl != "local",
        why="span metadata runs on Megatron's local layers so far; add --transformer-impl local",
    ),
    Refusal(flag="--fp8-format", asked=_given("fp8"), why=_LOCAL),
    Refusal(flag="--fp4-format", asked=_given("fp4"), why=_LOCAL),
    Refusal(
        flag="--attention-backend",
        asked=lambda a: a.attention_backend.name in ("flash", "fused"),
        why="core attention of the local layers is dense and unfused",
    ),
    Refusal(
        flag="--cp-comm-type",
        asked=lambda a: a.cp_comm_type not in (None, ["p2p"]),
        why="the local layers gather keys over the context-parallel group",
    ),
    Refusal(
        flag="--fp32-residual-connection",
        asked=lambda a: a.fp32_residual_connection and (a.bf16 or a.fp16),
        why="the norms of the local layers run in the parameters' type",
    ),
    Refusal(
        flag="--apply-layernorm-1p",
        asked=_given("layernorm_zero_centered_gamma"),
        why="the norms of --transformer-impl local have no zero-centred weights",
    ),
)
"""Refusals of runs in which the plugin's encoding is active."""
