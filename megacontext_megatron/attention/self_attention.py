"""Self attention that takes span metadata from the rotary argument and finishes q and k before core attention."""

from __future__ import annotations

import math
from typing import Any, cast

from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.config import Settings
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary, LearnableSigma, LogWidthBias
from megacontext_megatron.spans.metadata import CARRIER_COLUMNS, SpanMetadata


class SpanSelfAttention(SelfAttention):
    """Megatron's SelfAttention with positions that belong to rows.

    `rotary_pos_emb` must be the carrier of spans.metadata, [s, b, 1, 4] float64; without it a layer refuses to run,
    so that no run can end without positions.  q and k are finished after QK-norm and before any cache, context
    parallel exchange or selective recomputation.
    """

    config: MegaContextTransformerConfig
    _spans: SpanMetadata | None = None

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
        return GaussianRotary(gaussian, frequencies, settings.rotary.interleaved, learnable)

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the parent without rotary embeddings, on q and k finished from the carrier.

        Raises RuntimeError when the carrier is missing or has another shape.
        """
        if not isinstance(rotary_pos_emb, Tensor) or rotary_pos_emb.shape[2:] != (1, len(CARRIER_COLUMNS)):
            raise RuntimeError(f"layer {self.layer_number} received no span metadata, so it has no positions")
        self._spans = SpanMetadata.unpack(rotary_pos_emb)
        try:
            return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._spans = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the parent's tensors with q [s, b, np, hn] and k [s, b, ng, hn] finished."""
        query, key, *rest = cast(tuple[Tensor, ...], super().get_query_key_value_tensors(*args, **kwargs))
        spans = self._spans
        assert spans is not None
        if query.shape[:2] != spans.start.shape:
            raise RuntimeError(
                f"layer {self.layer_number}: {tuple(query.shape[:2])} rows of queries, but span metadata for "
                f"{tuple(spans.start.shape)}"
            )
        if self.rotary is not None:
            query, key = self.rotary(query, key, spans)
        if self.log_width_bias is not None:
            query, key = self.log_width_bias(query, key, spans)
        return query, key, *rest
