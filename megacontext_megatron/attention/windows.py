"""Sliding windows: which layers have one, in rows."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention


def window_of(config: TransformerConfig, layer_number: int) -> tuple[int, int] | None:
    """Return the rows a layer (counted from 1) sees to the left and right of each row, None where it sees all."""
    size, skip = config.window_size, config.window_attn_skip_freq
    if size is None or not is_layer_window_attention(size, skip, layer_number):  # pyright: ignore[reportArgumentType]
        return None
    return size
