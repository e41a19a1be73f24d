"""Group J: forward and backward of one Transformer Engine layer, with our attention and with plain fused rope."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, LearnableSigma, RotaryConfig, Settings
from scripts.benchmarks import peers
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.inputs import FIRST_TOKEN, Shape
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import OURS, Check, Comparison, Target, at_most
from scripts.benchmarks.timing import Case, Contender, Stopwatch

TITLE = "one layer's step"
PLAIN = "plain fused rope"
LEARNED = "ours, sigma learned per level"
SHAPES = (Shape(rows=4096, batch=1), Shape(rows=32768, batch=1))
BLOCK_SIZE = 32

OUTPUT_TOLERANCE = 2.0**-6
"""Of attention's output: q and k round to bf16 in two ways, and the plain table errs by 1e-3 at place 4096."""

GRADIENT_TOLERANCE = 2.0**-5
"""Of gradients, in which those roundings stand twice: forward and backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Width of the layer and whose linear layers it is made of."""

    hidden: int = 4096
    ffn: int = 14336
    query_heads: int = 32
    groups: int = 8
    impl: str = "transformer_engine"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.query_heads


def run(options: Options, found: Findings) -> None:
    """Check and time every shape, without and with QK-norm; raises GateFailed."""
    found.absent = missing()
    if found.absent:
        return
    size, watch = Size(), Stopwatch(rounds=options.rounds, budget=500.0, fewest=3)
    with one_rank("nccl"):
        for qk_norm in (False, True):
            found.require(gate(Layers.built(size, qk_norm=qk_norm), SHAPES[0].rows))
            for shape in SHAPES[:1] if options.quick else SHAPES:
                layers = Layers.built(size, qk_norm=qk_norm, learned=not qk_norm)
                found.rows.append(watch.row(case(layers, shape, qk_norm)))
                del layers
                torch.cuda.empty_cache()


def missing() -> str:
    """Return why layers cannot be built here, empty if they can."""
    try:
        peers.fused()
    except peers.Absent as absent:
        return str(absent)
    return ""


class one_rank:
    """A context in which this process is a whole Megatron job of one rank."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        """Set up process groups and random states."""
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        torch.distributed.init_process_group(self._backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)

    def __exit__(self, *_: object) -> None:
        """Take them down."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def settings(size: Size, gaussian: GaussianRopeConfig | None) -> Settings:
    """Return the plugin's settings of a layer with Gaussian rope, or with Megatron's rope where `gaussian` is None."""
    context = ContextConfig(window=4096, source_length=32768, block_size=BLOCK_SIZE, recent_tokens=512)
    return Settings(
        encoding="rope" if gaussian is None else "gaussian_rope",
        rotary=RotaryConfig(head_dim=size.head_dim),
        context=context,
        gaussian=gaussian,
        megacontext=gaussian is not None,
        backend="triton" if size.device == "cuda" else "torch",
    )


def decoder_layers(size: Size, chosen: Settings, *, qk_norm: bool, **more: Any) -> list[torch.nn.Module]:
    """Return decoder layers on the device, one if not told otherwise, built as training builds them.

    `more` goes to their config.
    """
    from megatron.core.transformer.spec_utils import build_module

    from megacontext_megatron.attention.layer_spec import decoder_block_spec
    from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig

    on_device = size.device == "cuda"
    sizes: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": size.hidden,
        "ffn_hidden_size": size.ffn,
        "num_attention_heads": size.query_heads,
        "num_query_groups": size.groups,
        "kv_channels": size.head_dim,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": on_device,
        "bias_dropout_fusion": on_device,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": size.dtype is torch.bfloat16,
        "params_dtype": size.dtype,
        "apply_rope_fusion": chosen.gaussian is None and size.impl == "transformer_engine",
        "qk_layernorm": qk_norm,
        "transformer_impl": size.impl,
        "use_cpu_initialization": not on_device,
        "mc_settings": chosen,
    }
    config = MegaContextTransformerConfig(**{**sizes, **more})
    spec = decoder_block_spec(config)
    assert spec.layer_specs is not None
    made = (build_module(each, config=config, layer_number=number) for number, each in enumerate(spec.layer_specs, 1))
    return [cast(torch.nn.Module, each).to(size.device).train() for each in made]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of one comparison by contender, with the same weights."""

    size: Size
    layers: dict[str, torch.nn.Module]

    @classmethod
    def built(cls, size: Size, *, qk_norm: bool, learned: bool = False) -> Layers:
        """Build the plain layer and ours, and with `learned` ours with learned spreads as well."""
        [plain] = decoder_layers(size, settings(size, None), qk_norm=qk_norm)
        made = {PLAIN: plain}
        kinds: dict[str, LearnableSigma] = {OURS: "none", **({LEARNED: "level"} if learned else {})}
        for name, kind in kinds.items():
            chosen = settings(size, GaussianRopeConfig(learnable_sigma=kind))
            [made[name]] = decoder_layers(size, chosen, qk_norm=qk_norm)
            copy_weights(plain, made[name])
        return cls(size=size, layers=made)

    def positions(self, name: str, rows: int) -> Tensor:
        """Return what a contender takes as `rotary_pos_emb`: mixed contexts for ours, a table for the plain layer."""
        if name == PLAIN:
            return self.table(rows)
        gist = torch.rand(1, rows, device=self.size.device) < 0.3
        width = torch.where(gist, BLOCK_SIZE, 1)
        return carrier(FIRST_TOKEN + width.cumsum(1) - width, gist.long())

    def table(self, rows: int) -> Tensor:
        """Return Megatron's table of angles for places 0, 1, 2, ..."""
        from megacontext_megatron.position.frequencies import rotary_frequencies

        omega = rotary_frequencies(RotaryConfig(head_dim=self.size.head_dim)).omega
        return peers.angles(omega.to(self.size.device), rows)


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give a layer another's weights; raises RuntimeError if any but learned spreads differ in name."""
    missed = target.load_state_dict(source.state_dict(), strict=False)
    unknown = [*missed.unexpected_keys, *(key for key in missed.missing_keys if not key.endswith("log_scale"))]
    if unknown := [key for key in unknown if not key.endswith("_extra_state")]:
        raise RuntimeError(f"the two layers do not hold the same weights: {', '.join(unknown)}")


def carrier(start: Tensor, level: Tensor) -> Tensor:
    """Return the tensor in which rows' places [b, s] reach the layers: the one place that packs it."""
    from megacontext_megatron.spans.metadata import SpanMetadata

    return SpanMetadata.of_nodes(start, level, BLOCK_SIZE).pack(GaussianRopeConfig().sigma)


def gate(layers: Layers, rows: int) -> list[Check]:
    """Compare our attention with the plain one where they must agree: single tokens at places 0, 1, 2, ...

    The output, and the gradients of the input and of the projection's weight; as a control, wrong places must differ.
    """
    size = layers.size
    places = torch.arange(rows, device=size.device).unsqueeze(0)
    generator = torch.Generator(size.device).manual_seed(1)
    hidden, upstream = (
        torch.randn(rows, 1, size.hidden, generator=generator, device=size.device).to(size.dtype) for _ in range(2)
    )
    tokens, doubled = (carrier(start, torch.zeros_like(places)) for start in (places, 2 * places))
    expected = attention_pass(layers.layers[PLAIN], hidden, layers.table(rows), upstream)
    found = attention_pass(layers.layers[OURS], hidden, tokens, upstream)
    wrong = attention_pass(layers.layers[OURS], hidden, doubled, upstream)
    tolerances = {"output": OUTPUT_TOLERANCE, "d hidden": GRADIENT_TOLERANCE, "d weight": GRADIENT_TOLERANCE}
    checks = [
        Check(name=f"attention's {name}", error=relative(found[name], expected[name]), tolerance=tolerance)
        for name, tolerance in tolerances.items()
    ]
    moved = relative(wrong["output"], expected["output"])
    control = Check(
        name="control: tolerance / difference of doubled places", error=OUTPUT_TOLERANCE / moved, tolerance=0.5
    )
    return [*checks, control]


def attention_pass(module: Any, hidden: Tensor, positions: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Return the self attention's output, and the gradients of its input and of its projection's weight."""
    attention, hidden = module.self_attention, hidden.detach().clone().requires_grad_()
    weight = attention.linear_qkv.weight
    out, _ = attention(hidden, causal_mask(module, hidden), rotary_pos_emb=positions)
    gradients = torch.autograd.grad(out, [hidden, weight], upstream)
    return {"output": out.detach(), "d hidden": gradients[0], "d weight": gradients[1]}


def causal_mask(module: Any, hidden: Tensor) -> Tensor | None:
    """Return the mask that layers without Transformer Engine ask for, None for those with it."""
    if module.config.transformer_impl == "transformer_engine":
        return None
    rows = hidden.shape[0]
    return torch.ones(rows, rows, dtype=torch.bool, device=hidden.device).triu(1)[None, None]


def relative(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference relative to that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def case(layers: Layers, shape: Shape, qk_norm: bool) -> Case:
    """Return the contenders for one number of rows."""
    size = layers.size
    hidden = torch.randn(shape.rows, 1, size.hidden, device=size.device).to(size.dtype)
    upstream = torch.randn_like(hidden)
    contenders = [
        Contender(name=name, call=step(module, hidden, layers.positions(name, shape.rows), upstream))
        for name, module in layers.layers.items()
    ]
    return Case(
        name=f"{shape.name}{', QK-norm' if qk_norm else ''}",
        contenders=contenders,
        comparisons=list(_comparisons(list(layers.layers), at_most(1.0))),
    )


def step(module: Any, hidden: Tensor, positions: Tensor, upstream: Tensor) -> Callable[[], object]:
    """Return a call that runs a layer forward and backward with fresh gradients."""
    hidden = hidden.detach().clone().requires_grad_()
    mask = causal_mask(module, hidden)

    def both_ways() -> None:
        hidden.grad = None
        module.zero_grad(set_to_none=True)
        out, _ = module(hidden_states=hidden, attention_mask=mask, rotary_pos_emb=positions)
        out.backward(upstream)

    return partial(both_ways)


def _comparisons(names: list[str], target: Target) -> Iterator[Comparison]:
    yield Comparison(over=OURS, under=PLAIN, target=target)
    if LEARNED in names:
        yield Comparison(over=LEARNED, under=PLAIN)
