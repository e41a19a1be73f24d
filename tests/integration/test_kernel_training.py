"""A training whose queries and keys the kernel finishes is the one without it, to the rounding of fp32.

The kernel is refused on the CPU, where Triton only interprets it; here the ranks choose it behind the command's back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, recording
from tests.launch import TrainResult, train
from tests.small import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, largest, small_flags

STEPS = 3
LAYERS = 2
MICRO_BATCHES = 2
FEW_ROWS = {
    "seq_length": 32,
    "mc_source_length": 128,
    "mc_block_size": 4,
    "mc_recent_tokens": 8,
    "mc_horizon": 8,
    "global_batch_size": 4,
    "train_iters": STEPS,
    "lr_decay_iters": STEPS,
    "save_interval": None,
    "eval_interval": 1000,
    "eval_iters": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "a width per level": {"gaussian_rope_learnable_sigma": "level"},
    "a width per head, normed": {"gaussian_rope_learnable_sigma": "head", "qk_layernorm": True},
    "normed, given widths": {"gaussian_rope_learnable_sigma": None, "qk_layernorm": True, "rotary_percent": 0.5},
    "a logarithm of widths": {"gaussian_rope_learnable_sigma": None, "gaussian_rope_log_width_bias": True},
    "gated": {"gaussian_rope_learnable_sigma": "level", "attention_output_gate": True},
    "normed by another norm": {
        "gaussian_rope_learnable_sigma": "level",
        "qk_layernorm": True,
        "normalization": "LayerNorm",
    },
}
UNSPLIT = ("gated", "normed by another norm")
"""Models whose projection Megatron splits itself."""


def through_kernel(*, kernel: bool, fault: str = "") -> Callable[[], dict[str, Any]]:
    """Choose the kernel, or not; return what counts its launches and holds the gradients of positions.

    The fault `places` gives the kernel centres twice as far apart, `widths` spreads a hundredth too large.
    """
    from megacontext_megatron import arguments
    from megacontext_megatron.kernels import gaussian, rotary

    # The interpreter takes time by the program, so a program takes all rows.
    for tile in ("_WHOLE_ROWS", "_SUMMING", "_BY_GROUP"):
        setattr(rotary, tile, getattr(rotary, tile)._replace(rows=64))
    mutations.spread_parameters()
    positional = recording.positional_gradients()
    launches: list[str] = []
    real = gaussian.split_span_rotary

    def counted(mixed: Any, head_dim: int, places: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append("split")
        if fault == "places":
            places = dataclasses.replace(places, doubled_centre=2 * places.doubled_centre + 1)
        if fault == "widths":
            places = dataclasses.replace(places, sigma=places.sigma * 1.01)
        return real(mixed, head_dim, places, *args, **kwargs)

    whole = gaussian.span_rotary

    def counted_whole(*args: Any, **kwargs: Any) -> Any:
        launches.append("whole")
        return whole(*args, **kwargs)

    gaussian.split_span_rotary, gaussian.span_rotary = counted, counted_whole
    arguments.rotary_backend = lambda *_: "triton" if kernel else "torch"
    return lambda: {"launches": launches, "positional": positional()}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainResult]:
    """Return what trains a model of MODELS with or without the kernel, once for each way."""

    @functools.cache
    def run(model: str, *, kernel: bool, fault: str = "", recompute: bool = False) -> TrainResult:
        again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        flags = small_flags(corpus, **{**FEW_ROWS, **MODELS[model], **(again if recompute else {})})
        folder = tmp_path_factory.mktemp("kernel")
        kwargs = {"kernel": kernel, "fault": fault}
        return train(flags, workdir=folder, before=through_kernel, before_kwargs=kwargs).check()

    return run


def slopes(result: TrainResult) -> list[float]:
    """Return the gradients of all positional parameters in all steps, in the order of names."""
    return [value for step in result.values[0]["positional"] for name in sorted(step) for value in step[name]]


def distance(result: TrainResult, expected: TrainResult) -> float:
    """Return how many tolerances the losses or gradient norms of two runs differ by."""
    assert len(result.losses) == len(expected.losses) == STEPS
    loss = largest(result.losses, expected.losses) / LOSS_TOLERANCE
    return max(loss, largest(result.grad_norms, expected.grad_norms) / GRAD_NORM_TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
def test_training_through_the_kernel_is_the_same(trained: Callable[..., TrainResult], model: str) -> None:
    plain, fused = trained(model, kernel=False), trained(model, kernel=True)
    assert plain.values[0]["launches"] == []
    kind = "whole" if model in UNSPLIT else "split"
    assert fused.values[0]["launches"] == [kind] * (STEPS * MICRO_BATCHES * LAYERS)
    assert distance(fused, plain) <= 1
    found, expected = slopes(fused), slopes(plain)
    parameters = {"level": 2, "head": 4, None: 0}[MODELS[model]["gaussian_rope_learnable_sigma"]]
    parameters += bool(MODELS[model].get("gaussian_rope_log_width_bias"))
    assert len(found) == len(expected) == STEPS * LAYERS * parameters
    size = max(map(abs, expected), default=0.0)
    assert all(abs(x - y) <= GRAD_NORM_TOLERANCE * size for x, y in zip(found, expected, strict=True))


def test_recomputation_gives_the_same_bits(trained: Callable[..., TrainResult]) -> None:
    once, again = (trained("a width per level", kernel=True, recompute=recompute) for recompute in (False, True))
    assert again.values[0]["launches"] == 2 * once.values[0]["launches"]
    assert again.losses == once.losses
    assert again.grad_norms == once.grad_norms
    assert slopes(again) == slopes(once)


@pytest.mark.parametrize("fault", ["places", "widths"])
def test_the_comparison_would_tell(trained: Callable[..., TrainResult], fault: str) -> None:
    model = "a width per level"
    assert distance(trained(model, kernel=True, fault=fault), trained(model, kernel=False)) > 10
