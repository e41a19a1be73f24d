"""The carrier: hands span metadata to Megatron where it asks for rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.config import SigmaRule
from megacontext_megatron.spans.metadata import SpanMetadata, SpanShift


class SpanCarrier(torch.nn.Module):
    """Stands in for a model's RotaryEmbedding and returns the packed metadata of the forward in progress.

    The metadata is read once, while the model prepares its inputs; from there on it travels as an ordinary tensor
    argument, the only per-row one that survives recomputation and pipelining with several micro-batches in flight.
    """

    def __init__(self, rule: SigmaRule, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take the rule of spreads, and what sums a gradient over the tensor-parallel ranks that share out heads."""
        super().__init__()
        self._rule: SigmaRule = rule
        self._sum_over_ranks = sum_over_ranks
        self._packed: Tensor | None = None

    @contextmanager
    def carrying(
        self, spans: SpanMetadata, shift: SpanShift | None = None, sigma_factor: float = 1.0
    ) -> Iterator[None]:
        """Carry `spans` [b, s], moved by `shift`, spreads times `sigma_factor`, through the forward in the block."""
        packed = spans.pack(self._rule, shift, sigma_factor)
        self._packed = self._sum_over_ranks(packed) if packed.requires_grad else packed
        try:
            yield
        finally:
            self._packed = None

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Return 0: rows carry their own places, so no length is needed."""
        return 0

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return the carrier [s, b, 1, 6 or 7]; raises RuntimeError outside `carrying`."""
        if self._packed is None:
            raise RuntimeError("the model was called without span metadata: pass spans= to its forward")
        return self._packed
