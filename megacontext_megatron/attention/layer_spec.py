"""Layer specs: Megatron's own, with our attention and with what stacks without Transformer Engine lack."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megacontext_megatron.attention.core_attention import GatheredKeyAttention
from megacontext_megatron.attention.norm import PortableNorm
from megacontext_megatron.attention.self_attention import SpanSelfAttention
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.attention.windows import window_of


def decoder_block_spec(config: MegaContextTransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the spec of this stage's layers for the settings that `config` carries."""
    use_te = config.transformer_impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization=config.normalization, vp_stage=vp_stage
    )
    spec.layer_specs = [_adapted(layer, config) for layer in spec.layer_specs or ()]
    if not use_te:
        spec.layer_norm = PortableNorm
    return spec


def _adapted(layer: ModuleSpec, config: MegaContextTransformerConfig) -> ModuleSpec:
    layer = copy.deepcopy(layer)
    parts = cast(TransformerLayerSubmodules, layer.submodules)
    attention = cast(ModuleSpec, parts.self_attention)
    if config.settings.gaussian is not None:
        attention.module = SpanSelfAttention
    if config.transformer_impl != "transformer_engine":
        parts.input_layernorm = parts.pre_mlp_layernorm = PortableNorm
        inner = cast(SelfAttentionSubmodules, attention.submodules)
        if config.qk_layernorm and inner.q_layernorm is not IdentityOp:
            inner.q_layernorm = inner.k_layernorm = PortableNorm
        if config.context_parallel_size > 1:
            inner.core_attention = GatheredKeyAttention
    return layer


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedLayer:
    """What one layer really does; `window` is (left, right) in rows or None."""

    layer: int
    encoding: str
    window: tuple[int, int] | None
    bias: str
    backend: str

    def as_row(self) -> tuple[str, ...]:
        """Return the printable cells."""
        window = "full" if self.window is None else f"{self.window[0]},{self.window[1]}"
        return str(self.layer), self.encoding, window, self.bias, self.backend


def resolved_layers(config: MegaContextTransformerConfig) -> list[ResolvedLayer]:
    """Return the resolved table of all layers (counted from 1) of a model."""
    settings = config.settings
    bias = "log-width" if settings.gaussian is not None and settings.gaussian.log_width_bias else "none"
    backend = "transformer_engine"
    if config.transformer_impl != "transformer_engine":
        backend = "dense, gathered keys" if config.context_parallel_size > 1 else "dense"
    return [
        ResolvedLayer(
            layer=number,
            encoding="none" if number in settings.no_rope_layers else settings.encoding,
            window=window_of(config, number),
            bias=bias,
            backend=backend,
        )
        for number in range(1, config.num_layers + 1)
    ]
