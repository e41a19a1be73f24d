"""Group L: a training step of four layers of the GRAPE recipe, three local ones and a global one.

Arms, all Transformer Engine layers of hidden size 4096 with the same weights:

- ours: windows of 128 rows with the rotation inside on layers 1 to 3; on layer 4 no rotation, and a linear bias that is
  folded into cuDNN's attention, or, with QK-norm, one in the kernel that skips what is out of reach;
- plain: Megatron's rope on all layers, all of which see all rows;
- windows: Transformer Engine's windows and fused rope on layers 1 to 3, layer 4 without rope or bias.

How much faster than plain ours should be follows from floors, `predicted`: 790 TFLOP/s for products of matrices and of
attention, 4.3 TB/s for all else.  At 32768 rows, in ms for a layer forward and backward: weights 54.3; norms,
activations and residuals 3.1; attention to all rows 39.0; rope 0.3; a window 0.5; of 39.0 a reach leaves 12 % (ALiBi's
slopes on single tokens) 4.8.  So plain takes 386.8, ours 270.1 with the bias folded and 235.9 with reach: factors of
1.43 and 1.64.  Peers are further from their floors than ours has to be, so a run should find no less.  Against windows
the fold can gain little, since most of what is left is the same global layer: the target of 1.15 is for the reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, RotaryConfig, Settings
from scripts.benchmarks.attention_inputs import LOOK_BACK, causal_flops, window_bytes
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.inputs import LARGE, Shape
from scripts.benchmarks.layer_step import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    Size,
    attention_pass,
    carrier,
    causal_mask,
    decoder_layers,
    missing,
    one_rank,
    relative,
)
from scripts.benchmarks.options import Options
from scripts.benchmarks.peers import angles
from scripts.benchmarks.results import CEILING, Check, Comparison, at_least
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "a step of the GRAPE recipe: three local layers, one global"
LAYERS = 4
SHAPES = (Shape(rows=4096, batch=1), Shape(rows=32768, batch=1))
PRODUCTS = 790e12
"""Operations per second of large bf16 products on one H200: the rate behind every floor of products."""

REACHED = 0.122
"""Share of all pairs that a reach leaves: ALiBi's slopes of 32 heads on 32768 single tokens."""

NEGLIGIBLE = 2.0**-60
"""A factor of slopes that leaves no bias."""

Global = Literal["fold", "reach", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One model: whether the plugin's attention, whether layers 1 to 3 have windows, what layer 4 has."""

    name: str
    plugin: bool
    windows: bool
    bias: Global = "none"
    slope_scale: float = 1.0


FOLD = Arm(name="ours, folded bias", plugin=True, windows=True, bias="fold")
REACH = Arm(name="ours, reach skip", plugin=True, windows=True, bias="reach")
PLAIN = Arm(name="plain rope, all rows", plugin=False, windows=False)
WINDOWS = Arm(name="Transformer Engine's windows and rope", plugin=False, windows=True)
UNBIASED = Arm(name="ours, next to no bias", plugin=True, windows=True, bias="reach", slope_scale=NEGLIGIBLE)


def run(options: Options, found: Findings) -> None:
    """Check and time every shape, without and with QK-norm; raises GateFailed."""
    found.absent = missing()
    if found.absent:
        return
    size, watch = Size(), Stopwatch(rounds=options.rounds, budget=700.0, fewest=2)
    with one_rank("nccl"):
        for qk_norm in (False, True):
            found.require(gate(size, SHAPES[0].rows, qk_norm=qk_norm))
            for shape in SHAPES[:1] if options.quick else SHAPES[1:]:
                arms = arms_of(qk_norm=qk_norm)
                stacks = built(size, shape.rows, arms, qk_norm=qk_norm)
                found.rows.append(watch.row(case(stacks, size, shape, qk_norm=qk_norm)))
                del stacks
                torch.cuda.empty_cache()


def arms_of(*, qk_norm: bool) -> tuple[Arm, ...]:
    """Return what is timed: a reach only with QK-norm, which alone bounds scores."""
    return (FOLD, *([REACH] if qk_norm else []), PLAIN, WINDOWS)


def settings(size: Size, rows: int, arm: Arm) -> Settings:
    """Return the plugin's settings of an arm, whose rows are single tokens at places 0, 1, 2, ..."""
    from megacontext_megatron.attention_config import MEGATRON, AttentionConfig
    from megacontext_megatron.encoding_config import BiasConfig

    context, rotary = ContextConfig.tokens_only(rows), RotaryConfig(head_dim=size.head_dim)
    if not arm.plugin:
        return Settings(encoding="rope", rotary=rotary, context=context)
    on_device = size.device == "cuda"
    local, everywhere = ("triton", "triton" if arm.bias == "reach" else MEGATRON) if on_device else (MEGATRON,) * 2
    bias = BiasConfig(name="grape-a", layers=(LAYERS,), learnable_slopes=True, slope_scale=arm.slope_scale)
    return Settings(
        encoding="gaussian_rope",
        rotary=rotary,
        context=context,
        gaussian=GaussianRopeConfig(),
        megacontext=True,
        biases=(bias,),
        bias_fold=arm.bias == "fold",
        backend="triton" if on_device else "torch",
        no_rope_layers=(LAYERS,),
        attention=AttentionConfig(
            backends=(*[local] * (LAYERS - 1), everywhere), reach_skip=arm.bias == "reach" and arm != UNBIASED
        ),
    )


def stack(size: Size, rows: int, arm: Arm, *, qk_norm: bool) -> torch.nn.ModuleList:
    """Return an arm's layers on the device, built as training builds them."""
    patterns: dict[str, Any] = {}
    if arm.windows:
        patterns = {"window_size": (LOOK_BACK, 0), "window_attn_skip_freq": LAYERS, "no_rope_freq": LAYERS}
    fused = not arm.plugin and size.device == "cuda"
    return torch.nn.ModuleList(
        decoder_layers(
            size, settings(size, rows, arm), qk_norm=qk_norm, num_layers=LAYERS, apply_rope_fusion=fused, **patterns
        )
    )


def built(size: Size, rows: int, arms: tuple[Arm, ...], *, qk_norm: bool) -> dict[Arm, torch.nn.ModuleList]:
    """Return the layers of several arms with the same weights."""
    stacks = {arm: stack(size, rows, arm, qk_norm=qk_norm) for arm in arms}
    first, *others = stacks.values()
    for other in others:
        copy_weights(first, other)
    return stacks


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give layers the weights of others; raises RuntimeError if any but those of biases differ in name."""
    own = ("_extra_state", "log_slope_scale")
    missed = target.load_state_dict(source.state_dict(), strict=False)
    unknown = [key for key in (*missed.unexpected_keys, *missed.missing_keys) if not key.endswith(own)]
    if unknown:
        raise RuntimeError(f"two arms do not hold the same weights: {', '.join(unknown)}")


def positions(size: Size, rows: int, arm: Arm) -> Tensor:
    """Return what an arm takes as `rotary_pos_emb`: where single tokens lie, or Megatron's table of angles."""
    from megacontext_megatron.position.frequencies import rotary_frequencies

    if not arm.plugin:
        return angles(rotary_frequencies(RotaryConfig(head_dim=size.head_dim)).omega.to(size.device), rows)
    places = torch.arange(rows, device=size.device).unsqueeze(0)
    return carrier(places, torch.zeros_like(places))


def gate(size: Size, rows: int, *, qk_norm: bool) -> list[Check]:
    """Compare attention with the windows' arm where both must agree: a local layer, and the global one without bias.

    As a control, the bias must change the global layer.
    """
    arms = (WINDOWS, UNBIASED, FOLD, *([REACH] if qk_norm else []))
    stacks = built(size, rows, arms, qk_norm=qk_norm)
    generator = torch.Generator(size.device).manual_seed(1)
    hidden, upstream = (
        torch.randn(rows, 1, size.hidden, generator=generator, device=size.device).to(size.dtype) for _ in range(2)
    )

    def passed(arm: Arm, layer: int) -> dict[str, Tensor]:
        return attention_pass(stacks[arm][layer], hidden, positions(size, rows, arm), upstream)

    prefix = "QK-norm, " if qk_norm else ""
    local, everywhere = passed(WINDOWS, 0), passed(WINDOWS, LAYERS - 1)
    checks = agreement(passed(FOLD, 0), local, f"{prefix}local layer's ")
    checks += agreement(passed(UNBIASED, LAYERS - 1), everywhere, f"{prefix}global layer's, no bias, ")
    for arm in arms[2:]:
        moved = relative(passed(arm, LAYERS - 1)["output"], everywhere["output"])
        name = f"{prefix}control: tolerance / difference by the bias, {arm.name}"
        checks.append(Check(name=name, error=OUTPUT_TOLERANCE / moved, tolerance=0.5))
    return checks


def agreement(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> list[Check]:
    """Return the checks of an attention's output and gradients."""
    tolerances = {"output": OUTPUT_TOLERANCE, "d hidden": GRADIENT_TOLERANCE, "d weight": GRADIENT_TOLERANCE}
    return [
        Check(name=f"{prefix}{name}", error=relative(found[name], expected[name]), tolerance=tolerance)
        for name, tolerance in tolerances.items()
    ]


def case(stacks: dict[Arm, torch.nn.ModuleList], size: Size, shape: Shape, *, qk_norm: bool) -> Case:
    """Return the contenders for one number of rows."""
    hidden = torch.randn(shape.rows, 1, size.hidden, device=size.device).to(size.dtype)
    upstream = torch.randn_like(hidden)
    contenders = [
        Contender(name=arm.name, call=step(layers, hidden, positions(size, shape.rows, arm), upstream))
        for arm, layers in stacks.items()
    ]
    return Case(
        name=f"{shape.name}{', QK-norm' if qk_norm else ''}",
        contenders=contenders,
        comparisons=list(comparisons(size, shape, tuple(stacks))),
    )


def step(layers: torch.nn.ModuleList, hidden: Tensor, places: Tensor, upstream: Tensor) -> Callable[[], object]:
    """Return a call that runs all layers forward and backward with fresh gradients."""
    hidden = hidden.detach().clone().requires_grad_()
    mask = causal_mask(layers[0], hidden)

    def both_ways() -> None:
        hidden.grad = None
        layers.zero_grad(set_to_none=True)
        out = hidden
        for layer in layers:
            out, _ = layer(hidden_states=out, attention_mask=mask, rotary_pos_emb=places)
        out.backward(upstream)

    return both_ways


def comparisons(size: Size, shape: Shape, arms: tuple[Arm, ...]) -> Iterator[Comparison]:
    """Return what is reported, with targets for the large shape."""
    judged = shape.name in LARGE
    for arm in arms:
        if not arm.plugin:
            continue
        factor = round(predicted(size, shape, arm), 2)
        yield Comparison(over=PLAIN.name, under=arm.name, target=at_least(factor) if judged else None)
        ahead = at_least(1.15) if judged and arm == REACH else None
        yield Comparison(over=WINDOWS.name, under=arm.name, target=ahead)


def predicted(size: Size, shape: Shape, arm: Arm) -> float:
    """Return how many times longer than an arm of ours the plain model takes, all at their floors."""
    return floor_seconds(size, shape, PLAIN) / floor_seconds(size, shape, arm)


def floor_seconds(size: Size, shape: Shape, arm: Arm) -> float:
    """Return the floor of an arm's step in seconds.

    Bytes of norms, residuals and activations: 22 times the hidden size and 8 times the feed-forward size, twice.
    """
    width = size.groups * size.head_dim
    weights = size.hidden * (2 * size.hidden + 2 * width + 3 * size.ffn)
    rest = 6 * weights * shape.tokens / PRODUCTS + 2 * (22 * size.hidden + 8 * size.ffn) * shape.tokens / CEILING
    whole = causal_flops(shape, forward=True, backward=True) / PRODUCTS
    window = window_bytes(shape, forward=True, backward=True) / CEILING
    rope = 4 * shape.qk_bytes / CEILING
    if not arm.windows:
        return LAYERS * (rest + whole + rope)
    local = window if arm.plugin else window + rope
    return LAYERS * rest + (LAYERS - 1) * local + whole * (REACHED if arm.bias == "reach" else 1.0)
