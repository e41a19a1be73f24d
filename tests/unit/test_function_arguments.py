"""Which of Megatron's arguments a checkpoint brings along: what a model computes, not how it is run."""

import argparse

import pytest

from megacontext_megatron.retrofit.checkpoint import function_arguments

HOW_IT_RUNS = (
    "attention_backend",
    "cp_comm_type",
    "fp8",
    "fused_residual_rmsnorm",
    "moe_permute_fusion",
    "moe_router_fusion",
    "recompute_granularity",
    "transformer_impl",
    "use_te_activation_func",
)
WHAT_IT_COMPUTES = ("qk_layernorm", "normalization", "softmax_type", "window_size", "moe_router_topk")


@pytest.mark.parametrize("name", HOW_IT_RUNS)
def test_a_kernel_of_the_machine_that_trained_is_not_restored(name: str) -> None:
    assert name not in function_arguments(argparse.Namespace(**{name: True}))


@pytest.mark.parametrize("name", WHAT_IT_COMPUTES)
def test_a_setting_of_the_model_is_restored(name: str) -> None:
    assert function_arguments(argparse.Namespace(**{name: True})) == {name}
