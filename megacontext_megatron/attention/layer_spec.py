"""Layer specs: Megatron's own, with our attention and with what stacks without Transformer Engine lack.

Of a Transformer Engine layer only the attention module is exchanged: its fused linear layers and norms stay, and so
does its core attention unless another backend was chosen; queries and keys reach it finished.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from megacontext_megatron.attention.biased_attention import BiasedAttention
from megacontext_megatron.attention.core_attention import GatheredKeyAttention
from megacontext_megatron.attention.folded_bias import bias_fold
from megacontext_megatron.attention.kernel_attention import LinearBiasAttention, WindowAttention
from megacontext_megatron.attention.library_attention import CudnnAttention, FlashAttention4, FlexAttention
from megacontext_megatron.attention.norm import NormBuilder, PortableNorm, without_extra_state
from megacontext_megatron.attention.self_attention import SpanSelfAttention
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.attention.windows import rotates_inside, window_of
from megacontext_megatron.attention_config import MEGATRON
from megacontext_megatron.config import ENCODINGS, Settings
from megacontext_megatron.encoding_config import SPARE_CHANNELS


def decoder_block_spec(config: MegaContextTransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the spec of this stage's layers for the settings that `config` carries."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=_on_te(config), normalization=config.normalization, vp_stage=vp_stage
    )
    first = get_transformer_layer_offset(config, vp_stage=vp_stage) + 1
    spec.layer_specs = [_adapted(layer, config, number) for number, layer in enumerate(spec.layer_specs or (), first)]
    spec.layer_norm = _norm(spec.layer_norm, config)
    return spec


def _on_te(config: MegaContextTransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


def _adapted(layer: ModuleSpec, config: MegaContextTransformerConfig, number: int) -> ModuleSpec:
    layer = copy.deepcopy(layer)
    parts = cast(TransformerLayerSubmodules, layer.submodules)
    attention = cast(ModuleSpec, parts.self_attention)
    inner = cast(SelfAttentionSubmodules, attention.submodules)
    if config.settings.gaussian is not None:
        attention.module = SpanSelfAttention
    parts.input_layernorm = _norm(parts.input_layernorm, config)
    parts.pre_mlp_layernorm = _norm(parts.pre_mlp_layernorm, config)
    if config.qk_layernorm:
        inner.q_layernorm = _norm(inner.q_layernorm, config)
        inner.k_layernorm = _norm(inner.k_layernorm, config)
    inner.core_attention = _core(config, number) or inner.core_attention
    return layer


def _core(config: MegaContextTransformerConfig, number: int) -> Any:
    """Return what builds a layer's core attention, None for Megatron's own choice."""
    backend = config.settings.attention.backend_of(number)
    adds_bias = _adds_bias(config, number)
    if backend == "triton":
        return LinearBiasAttention if adds_bias or window_of(config, number) is None else WindowAttention
    if backend != MEGATRON:
        return {"cudnn": CudnnAttention, "flash4": FlashAttention4, "flex": FlexAttention}[backend]
    if adds_bias:
        return BiasedAttention
    return GatheredKeyAttention if not _on_te(config) and config.context_parallel_size > 1 else None


def _adds_bias(config: MegaContextTransformerConfig, number: int) -> bool:
    """Return whether a layer's attention adds a bias to scores, rather than finding it in queries and keys."""
    return config.settings.biased(number) and bias_fold(config, number) is None


def _norm(build: Any, config: MegaContextTransformerConfig) -> Any:
    """Return what builds a norm in place of `build`, which is Megatron's choice; none stays none."""
    if build is None or build is IdentityOp:
        return build
    return without_extra_state(cast(NormBuilder, build)) if _on_te(config) else PortableNorm


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedLayer:
    """What one layer really does; `window` is (left, right) in rows or None."""

    layer: int
    encoding: str
    rotary: str
    window: tuple[int, int] | None
    bias: str
    backend: str

    def as_row(self) -> tuple[str, ...]:
        """Return the printable cells."""
        window = "full" if self.window is None else f"{self.window[0]},{self.window[1]}"
        return str(self.layer), self.encoding, self.rotary, window, self.bias, self.backend


def resolved_layers(config: MegaContextTransformerConfig) -> list[ResolvedLayer]:
    """Return the resolved table of all layers (counted from 1) of a model."""
    settings = config.settings
    return [
        ResolvedLayer(
            layer=number,
            encoding="none" if _unplaced(settings, number) else settings.encoding,
            rotary=_rotary(settings, number),
            window=window_of(config, number),
            bias=_bias(config, number),
            backend=_core_attention(config, number),
        )
        for number in range(1, config.num_layers + 1)
    ]


def _unplaced(settings: Settings, layer_number: int) -> bool:
    """Return whether a layer has no encoding of its own; an additive one is in the rows of all layers."""
    return settings.additive is None and layer_number in settings.no_rope_layers


def _bias(config: MegaContextTransformerConfig, layer_number: int) -> str:
    """Return the biases of a layer, and where its spare channels hold them."""
    found = " + ".join(_biases(config.settings, layer_number)) or "none"
    if not config.settings.folded(layer_number):
        return found
    return f"{found}, {'folded' if bias_fold(config, layer_number) else f'{SPARE_CHANNELS} channels spare'}"


def _biases(settings: Settings, layer_number: int) -> list[str]:
    names = [str(bias.name) for bias in settings.biases_of(layer_number)]
    if settings.gaussian is not None and settings.gaussian.log_width_bias:
        names.append("log-width")
    if settings.slopes_by_query(layer_number):
        names.append("alibi-lora")
    return names


def _rotary(settings: Settings, layer_number: int) -> str:
    """Return whose code rotates queries and keys."""
    if layer_number in settings.no_rope_layers or settings.encoding not in ("rope", *ENCODINGS):
        return "none"
    if settings.rotary.by_layer is not None:
        return f"{settings.backend}, frequencies of the layer"
    return "Megatron" if settings.gaussian is None else settings.backend


def _core_attention(config: MegaContextTransformerConfig, layer_number: int) -> str:
    """Return what computes attention: of Transformer Engine, which chooses a kernel itself, what it was asked for."""
    split = config.context_parallel_size > 1
    chosen = config.settings.attention
    backend = chosen.backend_of(layer_number)
    if backend == "triton":
        windowed = _core(config, layer_number) is WindowAttention
        exchange = (", halo" if windowed else ", gathered keys") if split else ""
        turns = ", rotary inside" if windowed and rotates_inside(config, layer_number) else ""
        skips = ", reach skip" if chosen.reach_skip and _adds_bias(config, layer_number) else ""
        return f"triton{exchange}{turns}{skips}"
    if backend != MEGATRON:
        return backend
    if _adds_bias(config, layer_number):
        return "dense, biased, gathered keys" if split else "dense, biased"
    if not _on_te(config):
        return "dense, gathered keys" if split else "dense"
    asked = f"transformer_engine, {config.attention_backend.name}"
    if not split:
        return asked
    exchange = config.cp_comm_type
    if isinstance(exchange, list):
        exchange = exchange[layer_number - 1]
    return f"{asked}, {exchange or 'p2p'}"
