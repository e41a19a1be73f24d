"""Norms of the layer specs: PyTorch's where Transformer Engine is absent, and what checkpoints hold of either."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

NormBuilder = Callable[..., torch.nn.Module]
"""Called by keyword with config, hidden_size and eps."""


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


def without_extra_state(build: NormBuilder) -> NormBuilder:
    """Return a builder of the same norms that neither save extra state nor ask a checkpoint for it.

    Transformer Engine's norms have an entry for it, always empty, that checkpoints of local layers lack, so that
    loading one would fail.
    """
    return functools.partial(_build_stateless, build)


def _build_stateless(build: NormBuilder, **kwargs: Any) -> torch.nn.Module:
    norm = build(**kwargs)
    norm.__class__ = _stateless(type(norm))
    return norm


@functools.cache
def _stateless(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    own = torch.nn.Module
    # PyTorch saves and expects the entry where a class has methods of its own for it.
    state = {"get_extra_state": own.get_extra_state, "set_extra_state": own.set_extra_state}
    return type(kind.__name__, (kind,), state)
