"""Sliding windows: which layers have one, in rows."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.position.rules import rotary_width


def window_of(config: TransformerConfig, layer_number: int) -> tuple[int, int] | None:
    """Return the rows a layer (counted from 1) sees to the left and right of each row, None where it sees all."""
    size, skip = config.window_size, config.window_attn_skip_freq
    if size is None or not is_layer_window_attention(size, skip, layer_number):  # pyright: ignore[reportArgumentType]
        return None
    return size


def rotates_inside(config: MegaContextTransformerConfig, layer_number: int) -> bool:
    """Return whether the plugin's window kernel rotates a layer's queries and keys: nothing else may touch them before.

    Nor may places or frequencies learn, which rotation inside attention gives no gradient.
    """
    settings, rotary = config.settings, config.settings.rotary
    pairs = rotary_width(rotary) // 2
    return (
        config.context_parallel_size == 1
        and settings.attention.backend_of(layer_number) == "triton"
        and settings.backend == "triton"
        and rotary.by_layer is None
        # Halves of pairs are told apart by splitting a head into equal parts.
        and pairs > 0
        and (rotary.interleaved or rotary.head_dim % (2 * pairs) == 0)
        and settings.gaussian is not None
        and settings.gaussian.learnable_sigma == "none"
        and layer_number not in settings.no_rope_layers
        and not (config.qk_layernorm or config.attention_output_gate or settings.gist.span_head)
    )
