"""Dense core attention under context parallelism, for stacks without Transformer Engine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megacontext_megatron.attention.windows import window_of
from megacontext_megatron.spans.context_parallel import gathered_order, zigzag_rows


class GatheredKeyAttention(DotProductAttention):
    """Megatron's dense attention whose keys and values are gathered over the context-parallel group.

    Rows follow the zigzag order of spans.context_parallel; the causal (and, where the layer has one, sliding-window)
    mask compares row numbers, so it is exact.  Memory grows with local rows times all rows: a reference for small
    machines, not for long contexts.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        # The parent refuses context parallelism, and would replace the mask given to it by its own window.
        single = copy.copy(config)
        single.context_parallel_size = 1
        single.window_size = None
        super().__init__(single, layer_number, *args, **kwargs)
        window = window_of(config, layer_number)
        self._look_back = None if window is None else window[0]
        self._group = kwargs["pg_collection"].cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attend from local queries [s / cp, b, np, hn] to all keys and values [s / cp, b, ng, hn] of the group."""
        del attention_mask
        size, rank, window = self._group.size(), self._group.rank(), query.size(0) * self._group.size()
        order = gathered_order(window, size, query.device)
        key, value = (
            gather_from_sequence_parallel_region(t.contiguous(), group=self._group)[order] for t in (key, value)
        )
        rows = zigzag_rows(window, size, rank, query.device).unsqueeze(1)
        columns = torch.arange(window, device=query.device)
        mask = columns > rows
        if self._look_back is not None and self._look_back >= 0:
            mask |= columns < rows - self._look_back
        return super().forward(query, key, value, mask[None, None], *args, **kwargs)
