"""The carrier: hands span metadata to Megatron where it asks for rotary embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.config import SigmaRule
from megacontext_megatron.spans.metadata import SpanMetadata


class SpanCarrier(torch.nn.Module):
    """Stands in for a model's RotaryEmbedding and returns the packed metadata of the forward in progress.

    The metadata is read once, while the model prepares its inputs; from there on it travels as an ordinary tensor
    argument, the only per-row one that survives recomputation and pipelining with several micro-batches in flight.
    """

    def __init__(self, rule: SigmaRule) -> None:
        super().__init__()
        self._rule: SigmaRule = rule
        self._packed: Tensor | None = None

    @contextmanager
    def carrying(self, spans: SpanMetadata) -> Iterator[None]:
        """Carry `spans` [b, s] through the forward inside the `with` block."""
        self._packed = spans.pack(self._rule)
        try:
            yield
        finally:
            self._packed = None

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Return 0: rows carry their own places, so no length is needed."""
        return 0

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return the carrier [s, b, 1, 6]; raises RuntimeError outside `carrying`."""
        if self._packed is None:
            raise RuntimeError("the model was called without span metadata: pass spans= to its forward")
        return self._packed
