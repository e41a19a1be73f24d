"""Self attention that takes span metadata from the rotary argument and finishes q and k before core attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megacontext_megatron.attention.biased_attention import CENTRE, FEATURES, BiasedAttention
from megacontext_megatron.attention.folded_bias import bias_fold, cleared, split_spare, total
from megacontext_megatron.attention.kernel_attention import CARRIER, SLOPES, LinearBiasAttention, WindowAttention
from megacontext_megatron.attention.row_order import ZigzagOrder
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.attention.windows import rotates_inside
from megacontext_megatron.config import Settings
from megacontext_megatron.encoding_config import GrapeMConfig
from megacontext_megatron.kernels.table_rotary import TableRotary
from megacontext_megatron.position.contextual import ContextualSteps
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary, LearnableSigma, LogWidthBias
from megacontext_megatron.position.heads import HeadShare
from megacontext_megatron.position.layer_frequencies import layer_frequencies
from megacontext_megatron.position.retrofit_biases import AlibiLora
from megacontext_megatron.position.score_bias import ScoreBias
from megacontext_megatron.position.score_biases import build_bias
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
    _row_tensors: dict[str, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.config.settings
        self._row_tensors = {}
        self.rotary: GaussianRotary | TableRotary | None = None
        self.log_width_bias: LogWidthBias | None = None
        if self.layer_number not in settings.no_rope_layers:
            self.rotary = self._build_rotary(settings)
        if settings.gaussian is not None and settings.gaussian.log_width_bias:
            scale = self.config.softmax_scale or 1.0 / math.sqrt(settings.rotary.head_dim)
            self.log_width_bias = LogWidthBias(scale, self._sum_over_ranks)
        self.score_biases = torch.nn.ModuleDict(self._build_biases(settings))
        # Those of other layers among them, which are no submodules here.
        self._biases = {name: cast(ScoreBias, bias) for name, bias in self.score_biases.items()}
        self._fold = bias_fold(self.config, self.layer_number)
        core = self.core_attention
        if isinstance(core, BiasedAttention):
            core.attach(self._biases)
        if isinstance(core, LinearBiasAttention):
            core.biased = bool(self._biases)
        if settings.attention.reach_skip and isinstance(core, LinearBiasAttention) and self._biases:
            norms = cast(tuple[torch.nn.Module, torch.nn.Module], (self.q_layernorm, self.k_layernorm))
            gain = self.rotary.score_gain if isinstance(self.rotary, GaussianRotary) else 1.0
            core.attach_norms(*norms, rotated=self.rotary is not None, gain=gain)
        self._rotates_inside = self._hand_over_rotation()

    def _hand_over_rotation(self) -> bool:
        """Let core attention rotate queries and keys where nothing else touches them on their way; return whether."""
        core = self.core_attention
        if not isinstance(core, WindowAttention) or not rotates_inside(self.config, self.layer_number):
            return False
        core.attach_rotation(cast("FusedGaussianRotary", self.rotary).rotation)
        return True

    def borrow_bias(self, name: str, lender: SpanSelfAttention) -> None:
        """Use another layer's bias instead of this layer's own, which is dropped with its parameters."""
        self._biases = {**self._biases, name: lender._biases[name]}
        del self.score_biases[name]
        cast(BiasedAttention, self.core_attention).attach(self._biases)

    @property
    def _share(self) -> HeadShare:
        """This rank's part of the layer's heads."""
        return HeadShare(
            heads=self.config.num_attention_heads,
            groups=cast(int, self.config.num_query_groups),
            width=self.config.settings.rotary.head_dim,
            ranks=self.pg_collection.tp.size(),
            rank=self.pg_collection.tp.rank(),
        )

    def _build_biases(self, settings: Settings) -> dict[str, ScoreBias]:
        """Return the score biases of this layer by name."""
        hidden = self.config.hidden_size
        numbers = {"hidden_size": hidden, "layer_number": self.layer_number, "seed": settings.seed}
        built: dict[str, ScoreBias] = {
            bias.name: build_bias(bias, self._share, self._sum_over_ranks, **numbers)
            for bias in settings.biases_of(self.layer_number)
        }
        retrofit = settings.retrofit
        if retrofit is not None and settings.slopes_by_query(self.layer_number):
            built["alibi-lora"] = AlibiLora(retrofit, self._share, self._sum_over_ranks, hidden, settings.seed)
        return built

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(value, group=self.pg_collection.tp)

    def _build_rotary(self, settings: Settings) -> GaussianRotary | TableRotary:
        gaussian = settings.gaussian
        assert gaussian is not None
        learnable = None
        if gaussian.learnable_sigma != "none":
            learnable = LearnableSigma(
                gaussian.learnable_sigma,
                settings.context.max_level,
                self._share.groups,
                self._share.local_groups,
                self._sum_over_ranks,
            )
        if settings.rotary.by_layer is not None:
            return self._build_table_rotary(settings, learnable)
        frequencies = rotary_frequencies(settings.rotary)
        kind = GaussianRotary
        if settings.backend == "triton":
            # Triton is not everywhere that PyTorch is.
            from megacontext_megatron.kernels.gaussian import FusedGaussianRotary as kind
        return kind(gaussian, frequencies, settings.rotary.interleaved, learnable)

    def _build_table_rotary(self, settings: Settings, learnable: LearnableSigma | None) -> TableRotary:
        gaussian, by_layer = settings.gaussian, settings.rotary.by_layer
        assert gaussian is not None
        frequencies = layer_frequencies(settings.rotary, self._share, self._sum_over_ranks, self.layer_number)
        steps = None
        if isinstance(by_layer, GrapeMConfig) and by_layer.contextual:
            order = ZigzagOrder(self.pg_collection.cp)
            steps = ContextualSteps(self.config.hidden_size, by_layer.log_freq_scale, self._sum_over_ranks, order)
        return TableRotary(gaussian, settings.rotary, frequencies, learnable, steps=steps, backend=settings.backend)

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Run the parent without rotary embeddings, on q and k finished from the carrier.

        Raises RuntimeError when the carrier is missing or has another shape.
        """
        if not is_carrier(rotary_pos_emb):
            raise RuntimeError(f"layer {self.layer_number} received no span metadata, so it has no positions")
        self._carrier, self._row_tensors = rotary_pos_emb, {}
        if self._rotates_inside or (self._biases and self._fold is None):
            # Filled while queries and keys are made, and read by core attention.
            kwargs["attention_bias"] = self._row_tensors
        try:
            return super().forward(hidden_states, *args, rotary_pos_emb=None, **kwargs)
        finally:
            self._carrier, self._row_tensors = None, {}

    def _checkpointed_attention_forward(self, *args: Any, attention_bias: Any = None, **kwargs: Any) -> Tensor:
        """Hand what biases read to the recomputation as its own inputs, so that gradients reach their sources."""
        extra = dict(self._row_tensors)
        return super()._checkpointed_attention_forward(*args, core_attention_extra_kwargs=extra, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, output_gate: bool = False, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Return the parent's tensors with q [s, b, np, hn] and k [s, b, ng, hn] finished."""
        carrier = self._carrier
        assert carrier is not None
        if self._rotates_inside:
            finished = self._unsplit(hidden_states, carrier)
        elif self._splits_fused and not output_gate:
            finished = self._split_fused(hidden_states, carrier)
        elif self.config.settings.folded(self.layer_number):
            finished = self._rotated(hidden_states, self._split_spare(hidden_states), carrier)
        else:
            finished = super().get_query_key_value_tensors(hidden_states, *args, output_gate=output_gate, **kwargs)
            finished = self._rotated(hidden_states, cast(tuple[Tensor, ...], finished), carrier)
        if self.log_width_bias is None:
            return finished
        query, key, *rest = finished
        return *self.log_width_bias(query, key, SpanMetadata.unpack(carrier)), *rest

    def _rotated(self, hidden: Tensor, tensors: tuple[Tensor, ...], carrier: Tensor) -> tuple[Tensor, ...]:
        query, key, *rest = tensors
        self._check_rows(query, carrier)
        spans = SpanMetadata.unpack(carrier)
        if self._biases:
            read = self._bias_tensors(hidden, query, key, spans)
            if self._fold is not None:
                return *self._fold(query, key, self._slopes(query, read), read[CENTRE]), *rest
            if not isinstance(self.core_attention, BiasedAttention):
                read = {CENTRE: read[CENTRE], SLOPES: self._slopes(query, read).float()}
            self._row_tensors.update(read)
        if isinstance(self.rotary, TableRotary):
            query, key = self.rotary(query, key, spans, self._read_by_steps(hidden))
        elif self.rotary is not None:
            query, key = self.rotary(query, key, spans)
        return query, key, *rest

    def _read_by_steps(self, hidden: Tensor) -> Tensor | None:
        """Return the attention's input where the phase advances by what rows hold."""
        contextual = isinstance(self.rotary, TableRotary) and self.rotary.steps is not None
        return self._all_rows(hidden) if contextual else None

    def _bias_tensors(self, hidden: Tensor, query: Tensor, key: Tensor, spans: SpanMetadata) -> dict[str, Tensor]:
        """Return what score biases read of this rank's rows, by the names that BiasedAttention knows."""
        tensors = {"centre": spans.doubled_centre.double() / 2, "width": spans.width}
        if spans.offset is not None:
            tensors["centre"] = tensors["centre"] + spans.offset
        biases = {name: bias for name, bias in self._biases.items() if bias.has_features}
        if biases:
            rows = self._all_rows(hidden)
            for name, bias in biases.items():
                _gather_parameters(bias)
                features = bias.features(rows, query, key)
                if features is not None:
                    tensors[FEATURES + name] = features
        return tensors

    def _slopes(self, like: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Return the sum of the biases' slopes, [np] or [s, b, np]."""
        for bias in self._biases.values():
            _gather_parameters(bias)
        return total(bias.linear_slopes(like, tensors.get(FEATURES + name)) for name, bias in self._biases.items())

    def _unsplit(self, hidden_states: Tensor, carrier: Tensor) -> tuple[Tensor, ...]:
        """Return the mixed projection in the place of queries, nothing for keys and values, and the rows' places."""
        unsplit = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed, _ = cast(tuple[Tensor, list[int]], unsplit)
        self._check_rows(mixed, carrier)
        self._row_tensors[CARRIER] = carrier
        return mixed, mixed.new_empty(0), mixed.new_empty(0)

    def _split_spare(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v, normed, where norms do not see what the projection gives to spare channels."""
        unsplit = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed, widths = cast(tuple[Tensor, list[int]], unsplit)
        query, key, value = split_spare(mixed, widths[-1])
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = cast(Any, self.q_layernorm)(query), cast(Any, self.k_layernorm)(key)
            if self.config.normalization != "RMSNorm":
                # What is centred or has a bias leaves 0.
                query, key = cleared(query), cleared(key)
        return query, key, value

    def _all_rows(self, hidden: Tensor) -> Tensor:
        """Return the attention's input [s, b, h] of all rows that this rank's heads see, whole in its gradient too."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(hidden, group=group)

    @property
    def _splits_fused(self) -> bool:
        """Whether one launch splits, norms and rotates: a kernel, and heads that are not normed or by RMS."""
        fused = self.config.settings.backend == "triton" and self.rotary is not None and not self._biases
        return fused and (self.q_layernorm is None or self.config.normalization == "RMSNorm")

    def _split_fused(self, hidden_states: Tensor, carrier: Tensor) -> tuple[Tensor, ...]:
        unsplit = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed, widths = cast(tuple[Tensor, list[int]], unsplit)
        self._check_rows(mixed, carrier)
        if isinstance(self.rotary, TableRotary):
            return self.rotary.split(mixed, widths[-1], carrier, self._qk_norm(), self._read_by_steps(hidden_states))
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
    """Return the weight of a norm that is not called."""
    _gather_parameters(norm)
    return cast(Tensor, norm.weight)


def _gather_parameters(module: torch.nn.Module) -> None:
    """Run what Megatron does before a module's call: it gathers what a distributed optimizer has updated elsewhere."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
