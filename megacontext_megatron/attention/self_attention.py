"""Self attention that takes span metadata from the rotary argument and finishes q and k before core attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.config import Settings
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary, LearnableSigma, LogWidthBias
from megacontext_megatron.spans.metadata import SpanMetadata, is_carrier

if TYPE_CHECKING:
    from megacontext_megatron.kernels.gaussian import FusedGaussianRotary
    from megacontext_megatron.kernels.rotary_arguments import QKNorm


class SpanSelfAttention(SelfAttention):
    """Megatron's SelfAttention with positions that belong to rows.

    `rotary_pos_emb` must be the carrier of spans.metadata, [s, b, 1, 6 or 7] float64; without it a layer refuses to
    run, so that no run can end without positions.  q and k are finished after QK-norm and before any cache, context
    parallel exchange or selective recomputation.
    """

    config: MegaContextTransformerConfig
    _carrier: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.config.settings
        self.rotary: GaussianRotary | None = None
        self.log_width_bias: LogWidthBias | None = None
        if self.layer_number not in settings.no_rope_layers:
            self.rotary = self._build_rotary(settings)
        if settings.gaussian is not None and settings.gaussian.log_width_bias:
            scale = self.config.softmax_scale or 1.0 / math.sqrt(settings.rotary.head_dim)
            self.log_width_bias = LogWidthBias(scale, self._sum_over_ranks)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(value, group=self.pg_collection.tp)

    def _build_rotary(self, settings: Settings) -> GaussianRotary:
        gaussian, group = settings.gaussian, self.pg_collection.tp
        assert gaussian is not None
        learnable = None
        if gaussian.learnable_sigma != "none":
            groups = cast(int, self.config.num_query_groups)
            share = groups // group.size()
            local = slice(group.rank() * share, (group.rank() + 1) * share)
            learnable = LearnableSigma(
                gaussian.learnable_sigma, settings.context.max_level, groups, local, self._sum_over_ranks
            )
        frequencies = rotary_frequencies(settings.rotary)
        kind = GaussianRotary
        if settings.backend == "triton":
            # Triton is not everywhere that PyTorch is.
            from megacontext_megatron.kernels.gaussian import FusedGaussianRotary as kind
        return kind(gaussian, frequencies, settings.rotary.interleaved, learnable)

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the parent without rotary embeddings, on q and k finished from the carrier.

        Raises RuntimeError when the carrier is missing or has another shape.
        """
        if not is_carrier(rotary_pos_emb):
            raise RuntimeError(f"layer {self.layer_number} received no span metadata, so it has no positions")
        self._carrier = rotary_pos_emb
        try:
            return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._carrier = None

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, output_gate: bool = False, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Return the parent's tensors with q [s, b, np, hn] and k [s, b, ng, hn] finished."""
        carrier = self._carrier
        assert carrier is not None
        if self._splits_fused and not output_gate:
            finished = self._split_fused(hidden_states, carrier)
        else:
            finished = super().get_query_key_value_tensors(hidden_states, *args, output_gate=output_gate, **kwargs)
            finished = self._rotated(cast(tuple[Tensor, ...], finished), carrier)
        if self.log_width_bias is None:
            return finished
        query, key, *rest = finished
        return *self.log_width_bias(query, key, SpanMetadata.unpack(carrier)), *rest

    def _rotated(self, tensors: tuple[Tensor, ...], carrier: Tensor) -> tuple[Tensor, ...]:
        query, key, *rest = tensors
        self._check_rows(query, carrier)
        if self.rotary is not None:
            query, key = self.rotary(query, key, SpanMetadata.unpack(carrier))
        return query, key, *rest

    @property
    def _splits_fused(self) -> bool:
        """Whether one launch splits, norms and rotates: a kernel, and heads that are not normed or by RMS."""
        fused = self.config.settings.backend == "triton" and self.rotary is not None
        return fused and (self.q_layernorm is None or self.config.normalization == "RMSNorm")

    def _split_fused(self, hidden_states: Tensor, carrier: Tensor) -> tuple[Tensor, ...]:
        unsplit = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed, widths = cast(tuple[Tensor, list[int]], unsplit)
        self._check_rows(mixed, carrier)
        rotary = cast("FusedGaussianRotary", self.rotary)
        return rotary.split(mixed, widths[-1], carrier, self._qk_norm())

    def _qk_norm(self) -> QKNorm | None:
        """Return the norms of query and key heads, for the kernel to apply."""
        if self.q_layernorm is None or self.k_layernorm is None:
            return None
        from megacontext_megatron.kernels.rotary_arguments import QKNorm

        return QKNorm(
            query_weight=_weight_of(cast(Any, self.q_layernorm)),
            key_weight=_weight_of(cast(Any, self.k_layernorm)),
            eps=self.config.layernorm_epsilon,
            zero_centred=self.config.layernorm_zero_centered_gamma,
        )

    def _check_rows(self, rows: Tensor, carrier: Tensor) -> None:
        if rows.shape[:2] != carrier.shape[:2]:
            raise RuntimeError(
                f"layer {self.layer_number}: {tuple(rows.shape[:2])} rows of queries, but span metadata for "
                f"{tuple(carrier.shape[:2])}"
            )


def _weight_of(norm: torch.nn.Module) -> Tensor:
    """Return the weight of a norm that is not called.

    Before a call Megatron gathers what a distributed optimizer has updated elsewhere; its hooks are run for that.
    """
    for hook in norm._forward_pre_hooks.values():
        hook(norm, ())
    return cast(Tensor, norm.weight)
