"""Dense core attention under context parallelism, for stacks without Transformer Engine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megacontext_megatron.attention.windows import window_of
from megacontext_megatron.spans.context_parallel import gathered_order, zigzag_rows


def single_rank_config(config: TransformerConfig) -> TransformerConfig:
    """Return a copy for Megatron's dense attention, whose keys and mask are given to it.

    It refuses context parallelism, and would replace the mask by its own window.
    """
    single = copy.copy(config)
    single.context_parallel_size = 1
    single.window_size = None
    return single


class GatheredRows:
    """Rows of a context-parallel `group`, in the zigzag order of spans.context_parallel, and what each may see."""

    def __init__(self, config: TransformerConfig, layer_number: int, group: ProcessGroup) -> None:
        window = window_of(config, layer_number)
        self._look_back = None if window is None else window[0]
        self._group = group

    def gather(self, tensor: Tensor) -> Tensor:
        """Return all rows [s, ...] of the group in the order of time, from this rank's [s / cp, ...].

        The backward pass gives each rank the sum of what all ranks say about its rows.
        """
        size = self._group.size()
        if size == 1:
            return tensor
        order = gathered_order(tensor.size(0) * size, size, tensor.device)
        return gather_from_sequence_parallel_region(tensor.contiguous(), group=self._group)[order]

    def numbers(self, tensor: Tensor) -> Tensor:
        """Return which of all rows this rank's rows [s / cp, ...] are, int64 [s / cp]."""
        size = self._group.size()
        return zigzag_rows(tensor.size(0) * size, size, self._group.rank(), tensor.device)

    def hidden(self, tensor: Tensor) -> Tensor:
        """Return the keys that this rank's rows [s / cp, ...] must not see, bool [1, 1, s / cp, s]."""
        rows = self.numbers(tensor).unsqueeze(1)
        columns = torch.arange(tensor.size(0) * self._group.size(), device=tensor.device)
        mask = columns > rows
        if self._look_back is not None and self._look_back >= 0:
            mask |= columns < rows - self._look_back
        return mask[None, None]


class GatheredKeyAttention(DotProductAttention):
    """Megatron's dense attention whose keys and values are gathered over the context-parallel group.

    The causal (and, where the layer has one, sliding-window) mask compares row numbers, so it is exact.  Memory grows
    with local rows times all rows: a reference for small machines, not for long contexts.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(single_rank_config(config), layer_number, *args, **kwargs)
        self._rows = GatheredRows(config, layer_number, kwargs["pg_collection"].cp)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attend from local queries [s / cp, b, np, hn] to all keys and values [s / cp, b, ng, hn] of the group."""
        del attention_mask
        key, value = self._rows.gather(key), self._rows.gather(value)
        return super().forward(query, key, value, self._rows.hidden(query), *args, **kwargs)
