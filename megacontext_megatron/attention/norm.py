"""Norms for stacks without Transformer Engine: PyTorch's, marked for sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class PortableNorm:
    """Builds PyTorch's LayerNorm or RMSNorm as `--normalization` says, usable with `--sequence-parallel`.

    Megatron's own wrapper refuses sequence parallelism because it does not mark the weights whose gradients
    finalize_model_grads must sum over tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        """Return the norm of `hidden_size` channels in the run's parameter dtype."""
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
