"""What computes the attention of a layer: the choices, and what is decided for a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WindowBackend = Literal["auto", "triton", "flash4", "flex", "megatron"]
GlobalBackend = Literal["auto", "triton", "cudnn", "flash4", "flex", "megatron"]

MEGATRON = "megatron"
"""The layers' own: Transformer Engine, or dense attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """What computes attention, for every layer from the first; layers beyond the last run Megatron's own.

    `reach_skip` leaves out keys too far away to matter on layers with linear biases on the plugin's kernel.
    """

    backends: tuple[str, ...] = ()
    reach_skip: bool = False

    def backend_of(self, layer: int) -> str:
        """Return the backend of a layer, counted from 1."""
        return self.backends[layer - 1] if layer <= len(self.backends) else MEGATRON

    def backends_of(self, layers: int) -> set[str]:
        """Return the backends of a model of so many layers."""
        return {self.backend_of(layer) for layer in range(1, layers + 1)}
