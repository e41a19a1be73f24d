"""Core attention by libraries that see one rank's rows: cuDNN through PyTorch, FlashAttention-4, FlexAttention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megacontext_megatron.attention.biased_attention import CENTRE
from megacontext_megatron.attention.kernel_attention import SLOPES, KernelAttention


class CudnnAttention(KernelAttention):
    """Causal attention by PyTorch's cuDNN backend."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Return [s, b, np hn] from q [s, b, np, hn], k and v [s, b, ng, hn]."""
        del attention_mask
        self._check(arguments)
        q, k, v = (rows.permute(1, 2, 0, 3) for rows in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=grouped)
        return found.permute(2, 0, 1, 3).flatten(2)


class FlashAttention4(KernelAttention):
    """Causal attention, within a window where the layer has one, by FlashAttention-4."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
    ) -> Tensor:
        """Return [s, b, np hn] from q [s, b, np, hn], k and v [s, b, ng, hn]."""
        from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

        del attention_mask
        self._check(arguments)
        heads = (rows.transpose(0, 1) for rows in (query, key, value))
        window = (None, None) if self._look_back is None else (self._look_back, 0)
        found = flash_attn_func(*heads, softmax_scale=self._scale, causal=True, window_size=window)
        return (found[0] if isinstance(found, tuple) else found).transpose(0, 1).flatten(2)


class FlexAttention(KernelAttention):
    """Causal attention by PyTorch's FlexAttention, within a window or with a linear bias whose slopes do not train."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Mapping[str, Tensor] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Return [s, b, np hn] from q [s, b, np, hn], k and v [s, b, ng, hn].

        The bias has `slopes` fp32 [np], nats per token, over `centre` float64 [s, b].  Raises RuntimeError for slopes
        that train, with which its backward takes hundreds of times as long.
        """
        del attention_mask
        self._check(arguments)
        rows = self._rows((CENTRE, SLOPES), attention_bias, arguments)
        change, slopes = None, rows.get(SLOPES)
        if slopes is not None:
            if slopes.requires_grad:
                raise RuntimeError("FlexAttention's backward is not usable with slopes that train")
            change = _by_distance(slopes, (rows[CENTRE] - rows[CENTRE][:1]).float().t().contiguous())
        heads = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        mask = _mask(len(query), self._look_back, query.device)
        found = _compiled()(
            *heads, score_mod=change, block_mask=mask, scale=self._scale, enable_gqa=query.shape[2] != key.shape[2]
        )
        return found.permute(2, 0, 1, 3).flatten(2)


def _by_distance(slopes: Tensor, place: Tensor) -> Any:
    """Return what takes slopes [np] times the distance of places [b, s] off a score."""

    def change(score: Tensor, sequence: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + slopes[head] * (place[sequence, column] - place[sequence, row])

    return change


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def _mask(rows: int, look_back: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(sequence: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        causal = column <= row
        return causal if look_back is None else causal & (row - column <= look_back)

    return create_block_mask(seen, None, None, rows, rows, device=str(device))
