"""A training whose attention runs in the plugin's kernels is the one in dense attention, to the rounding of fp32.

The kernels are refused on the CPU, where Triton only interprets them; here the ranks choose them behind the command's
back, and so for the layouts that exchange rows.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, recording
from tests.launch import TrainResult, train
from tests.small import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, largest, small_flags

STEPS = 2
VALIDATION = re.compile(r"lm loss value: (\S+)")
POSITIONAL_TOLERANCE = 1e-4
"""Of positional gradients, relative to the largest: sums over all scores, whose terms cancel."""

FEW_ROWS = {
    "seq_length": 32,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "mc_source_length": 128,
    "mc_block_size": 4,
    "mc_recent_tokens": 8,
    "mc_horizon": 8,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "train_iters": STEPS,
    "lr_decay_iters": STEPS,
    "save_interval": None,
    "eval_interval": 1000,
    "eval_iters": 0,
    "gaussian_rope_learnable_sigma": None,
    "window_size": "5,0",
    "window_attn_skip_freq": 2,
    "no_rope_freq": 2,
    "grape_a": True,
    "grape_a_learnable": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "learned slopes": {},
    "three quarters of the channels": {"rotary_percent": 0.75},
    "slopes by query": {"grape_a_gate": "q"},
    "learned widths": {"gaussian_rope_learnable_sigma": "level"},
    "reach": {"qk_layernorm": True, "mc_reach_skip": True, "bias_slope_scale": 4.0},
    "spare channels": {"bias_fold": True},
    "a window everywhere": {"window_attn_skip_freq": None, "grape_a": None, "position_bias": ["grape-a"]},
}
"""Each with a window and rotary on the first layer, and a linear bias on the second."""

INSIDE = {"learned slopes", "slopes by query", "spare channels"}
"""Models whose windows rotate queries and keys themselves: nothing of their places learns, no norm comes between."""


def through_kernels(*, kernel: bool, fault: str = "") -> Callable[[], dict[str, Any]]:
    """Choose the kernels, or dense attention; return what was launched and the gradients of positions.

    The fault `window` looks one row less far back, `slopes` makes them a hundredth steeper.
    """
    from megacontext_megatron import arguments, attention_arguments
    from megacontext_megatron.kernels import linear_bias_attention, window_attention

    mutations.spread_parameters()
    positional = recording.positional_gradients()
    launches: list[str] = []

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        @functools.wraps(real)
        def launch(*given: Any, **named: Any) -> Any:
            launches.append(name)
            if fault == "window" and name == "window_attention":
                given = (*given[:3], given[3] - 1, *given[4:])
            if fault == "slopes" and name == "linear_bias_attention":
                steeper = linear_bias_attention.LinearBias(
                    slopes=given[4].slopes * 1.01, doubled_centre=given[4].doubled_centre
                )
                given = (*given[:4], steeper)
            return real(*given, **named)

        setattr(module, name, launch)

    counted(window_attention, "window_attention")
    counted(window_attention, "split_window_attention")
    counted(window_attention, "attend_rows")
    counted(linear_bias_attention, "linear_bias_attention")
    chosen = "triton" if kernel else "megatron"
    attention_arguments.backend_of = lambda need: chosen
    arguments.rotary_backend = lambda *_: "triton" if kernel else "torch"
    return lambda: {"launches": launches, "positional": positional()}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainResult]:
    """Return what trains a model of MODELS with or without the kernels, once for each way."""

    @functools.cache
    def run(model: str, *, kernel: bool, fault: str = "", ranks: int = 1, layout: tuple[Any, ...] = ()) -> TrainResult:
        skip = {} if kernel else {"mc_reach_skip": None}
        flags = small_flags(corpus, **{**FEW_ROWS, **MODELS[model], **skip, **dict(layout)})
        kwargs = {"kernel": kernel, "fault": fault}
        folder = tmp_path_factory.mktemp("kernels")
        return train(flags, ranks, workdir=folder, before=through_kernels, before_kwargs=kwargs).check()

    return run


def slopes(result: TrainResult) -> list[float]:
    """Return the gradients of all positional parameters in all steps, in the order of names."""
    return [value for step in result.values[0]["positional"] for name in sorted(step) for value in step[name]]


def distance(result: TrainResult, expected: TrainResult) -> float:
    """Return how many tolerances the losses or gradient norms of two runs differ by."""
    assert len(result.losses) == len(expected.losses) == STEPS
    loss = largest(result.losses, expected.losses) / LOSS_TOLERANCE
    return max(loss, largest(result.grad_norms, expected.grad_norms) / GRAD_NORM_TOLERANCE)


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=() if model == "reach" else pytest.mark.full) for model in MODELS]
)
def test_training_through_the_kernels_is_the_same(trained: Callable[..., TrainResult], model: str) -> None:
    plain, fused = trained(model, kernel=False), trained(model, kernel=True)
    assert plain.values[0]["launches"] == []
    windows = "split_window_attention" if model in INSIDE else "window_attention"
    both = {"linear_bias_attention"} | ({windows} if model != "a window everywhere" else set())
    assert set(fused.values[0]["launches"]) == both
    assert distance(fused, plain) <= 1
    found, expected = slopes(fused), slopes(plain)
    assert found
    assert len(found) == len(expected)
    size = max(map(abs, expected))
    worst = max(abs(x - y) for x, y in zip(found, expected, strict=True))
    assert worst <= POSITIONAL_TOLERANCE * size, (worst, size)


def yarn_in_the_kernel() -> Callable[[], list[float]]:
    """Choose the kernel; return by what each layer's norms are told that scores can grow."""
    from megacontext_megatron import attention_arguments
    from megacontext_megatron.attention.kernel_attention import LinearBiasAttention

    gains: list[float] = []
    real = LinearBiasAttention.attach_norms

    def attached(self: Any, *norms: Any, rotated: bool, gain: float) -> None:
        gains.append(gain)
        real(self, *norms, rotated=rotated, gain=gain)

    LinearBiasAttention.attach_norms = attached  # pyright: ignore[reportAttributeAccessIssue]
    attention_arguments.backend_of = lambda need: "triton"
    return lambda: gains


def test_the_reach_knows_by_what_yarn_multiplies_scores(corpus: Path, tmp_path: Path) -> None:
    yarn = {"position_embedding_type": "yarn", "rope_stretch": 64, "rope_original_length": 64}
    biased = {"position_bias": ["alibi"], "grape_a": None, "grape_a_learnable": None, "window_size": None}
    whole = {"window_attn_skip_freq": None, "train_iters": 1, "qk_layernorm": True, "mc_reach_skip": True}
    flags = small_flags(corpus, **{**FEW_ROWS, **yarn, **biased, **whole})
    result = train(flags, workdir=tmp_path, before=yarn_in_the_kernel).check()
    factor = 0.1 * math.log(64) + 1
    assert result.values[0] == [pytest.approx(factor**2), 1.0]


@pytest.mark.full
def test_windows_rotate_themselves_when_evaluated_too(trained: Callable[..., TrainResult]) -> None:
    evaluated = (("eval_interval", STEPS), ("eval_iters", 1))
    fused, plain = (trained("learned slopes", kernel=kernel, layout=evaluated) for kernel in (True, False))
    assert set(fused.values[0]["launches"]) == {"split_window_attention", "linear_bias_attention"}
    found, expected = (list(map(float, VALIDATION.findall(result.log))) for result in (fused, plain))
    assert found
    assert largest(found, expected) <= LOSS_TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "axis"),
    [
        ("learned slopes", "context_parallel_size"),
        ("slopes by query", "context_parallel_size"),
        ("reach", "tensor_model_parallel_size"),
    ],
)
def test_ranks_that_share_rows_or_heads_train_as_in_dense_attention(
    trained: Callable[..., TrainResult], model: str, axis: str
) -> None:
    fused, plain = (trained(model, kernel=kernel, ranks=2, layout=((axis, 2),)) for kernel in (True, False))
    assert ("attend_rows" in fused.values[0]["launches"]) == (axis == "context_parallel_size")
    assert distance(fused, plain) <= 1


@pytest.mark.full
@pytest.mark.parametrize("again", [{"recompute_granularity": "selective"}])
def test_recomputation_gives_the_same_bits(trained: Callable[..., TrainResult], again: dict[str, Any]) -> None:
    once = trained("learned slopes", kernel=True)
    twice = trained("learned slopes", kernel=True, layout=tuple(again.items()))
    assert len(twice.values[0]["launches"]) == 2 * len(once.values[0]["launches"])
    assert twice.losses == once.losses
    assert twice.grad_norms == once.grad_norms
    assert slopes(twice) == slopes(once)


@pytest.mark.full
@pytest.mark.parametrize(("model", "fault"), [("learned widths", "window"), ("learned slopes", "slopes")])
def test_the_comparison_would_tell(trained: Callable[..., TrainResult], model: str, fault: str) -> None:
    assert distance(trained(model, kernel=True, fault=fault), trained(model, kernel=False)) > 10
