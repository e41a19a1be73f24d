"""Megatron's GPTModel over working contexts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    linear_with_grad_accumulation_and_async_allreduce,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megacontext_megatron.attention.layer_spec import decoder_block_spec
from megacontext_megatron.attention.self_attention import SpanSelfAttention
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.config import Settings
from megacontext_megatron.context.assembly import Assembly, assemble_rows
from megacontext_megatron.context.block_groups import BlockGroups
from megacontext_megatron.context.gistnet import GistNet, SlotKernel
from megacontext_megatron.context.gists import Gister, mean_gists
from megacontext_megatron.encoding_config import AdditiveConfig
from megacontext_megatron.model.carrier import SpanCarrier
from megacontext_megatron.model.prediction import GistPredictor, Predicted, expected_embedding
from megacontext_megatron.model.requests import AttachedLoss, Lesson, RowOutputs, RowRequest
from megacontext_megatron.position.additive import LearnedAbsolute, Sinusoidal
from megacontext_megatron.position.parameters import PositionalParameters
from megacontext_megatron.spans.metadata import SpanMetadata, base_sigma


class MegaContextGPTModel(GPTModel):
    """GPTModel whose rows are the tokens and gists of working contexts.

    Called by keyword with `spans` [b, s] on every pipeline stage; the first stage also takes `input_ids`, the raw
    samples' C tokens [b / V, C], embeds each once for all its contexts, and holds GistNet where gists are learned.
    """

    config: MegaContextTransformerConfig
    gister: Gister = staticmethod(mean_gists)
    expects_adapters: bool = True
    """Whether checkpoints hold the plugin's parameters; a base that a retrofit starts from does not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings, groups = self.config.settings, self.pg_collection
        assert settings.gaussian is not None
        self.rotary_pos_emb = SpanCarrier(settings.gaussian.sigma, self._sum_over_ranks)
        self.places: Sinusoidal | LearnedAbsolute | None = None
        if settings.additive is not None and self.pre_process:
            self.places = self._build_places(settings, settings.additive)
        if any(bias.fire_shared for bias in settings.biases if bias.name == "fire"):
            first, *others = [cast(SpanSelfAttention, layer.self_attention) for layer in self.decoder.layers]
            for attention in others:
                attention.borrow_bias("fire", first)
        self.gist_net: GistNet | None = None
        if settings.gist.learned and self.pre_process:
            shared_over = BlockGroups.of(groups.tp, groups.cp)
            self.gist_net = GistNet(
                settings.gist,
                settings.context.block_size,
                shared_over,
                settings.seed,
                slot_kernel=_slot_kernel(settings),
            )

    def _build_places(self, settings: Settings, additive: AdditiveConfig) -> Sinusoidal | LearnedAbsolute:
        hidden, std = self.config.hidden_size, self.config.init_method_std
        if additive.name == "sinusoidal":
            return Sinusoidal(additive, hidden)
        return LearnedAbsolute(additive, hidden, settings.context, init_std=std, seed=settings.seed)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return copy_to_tensor_model_parallel_region(value, group=self.pg_collection.tp)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        *,
        spans: SpanMetadata,
        request: RowRequest | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | RowOutputs | Lesson:
        """Return the last stage's RowOutputs or Lesson where `labels` [b, s] are given, else what GPTModel returns."""
        request = request or RowRequest()
        assembly = self.assemble(input_ids, spans, request) if self.pre_process else None
        with self.rotary_pos_emb.carrying(spans, assembly and assembly.shift, request.sigma_factor):
            stage = {"input_ids": input_ids, "position_ids": None, "labels": labels}
            if labels is not None:
                stage |= {"output_processor": self._outputs, "output_processor_context": (request, assembly, spans)}
            return super().forward(
                **cast(dict[str, Any], stage), decoder_input=cast(Tensor, assembly and assembly.rows), **kwargs
            )

    def _outputs(
        self,
        hidden_states: Tensor,
        *,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor,
        context: tuple[RowRequest, Assembly | None, SpanMetadata],
        **_: Any,
    ) -> RowOutputs | Lesson:
        """Return what the last stage was asked for of its final hidden states [s, b, h], as GPTModel computes it."""
        request, assembly, spans = context
        if request.teach:
            return self._lesson(hidden_states, output_layer, output_weight, request.last_rows)
        logits = self._scale_logits(output_layer(hidden_states, weight=output_weight)[0])
        predicted = None
        if request.predict:
            # Behind the layer's call, in whose hooks Megatron gathers an updated weight.
            weight = output_layer.weight if output_weight is None else output_weight
            predicted = self._predicted(hidden_states, cast(Assembly, assembly), spans, weight)
        # Read first: the loss writes over logits in fp32.
        last = None if request.last_rows is None else logits.index_select(0, request.last_rows)
        losses = self.compute_language_model_loss(labels, logits)
        return RowOutputs(losses=losses, last_logits=last, predicted=predicted)

    def _predicted(self, hidden: Tensor, assembly: Assembly, spans: SpanMetadata, output_weight: Tensor) -> Predicted:
        settings, tensor = self.config.settings, self.pg_collection.tp
        split = tensor if tensor.size() > 1 else None

        def embed(states: Tensor) -> Tensor:
            logits = linear_with_grad_accumulation_and_async_allreduce(
                states,
                output_weight,
                bias=None,
                # A frozen weight has nowhere to accumulate.
                gradient_accumulation_fusion=self.config.gradient_accumulation_fusion and output_weight.requires_grad,
                allreduce_dgrad=split is not None,
                sequence_parallel=False,
                tp_group=tensor,
            )
            return expected_embedding(self._scale_logits(logits), self.embedding.word_embeddings.weight, split)

        scattered_over = split if self.config.sequence_parallel else None
        predictor = GistPredictor(
            context=settings.context, settings=settings.prediction, embed=embed, scattered_over=scattered_over
        )
        return predictor(hidden, assembly.levels, spans)

    def _lesson(
        self, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, rows: Tensor | None
    ) -> Lesson:
        """Return logits of the rows asked for, and the states of all blocks unless rows are scattered."""
        assert rows is not None
        if self.config.sequence_parallel:
            # The output layer gathers the rows itself.
            logits = output_layer(hidden_states, weight=output_weight)[0].index_select(0, rows)
            return Lesson(rows=rows, logits=self._scale_logits(logits))
        logits = output_layer(hidden_states.index_select(0, rows), weight=output_weight)[0]
        blocks = hidden_states.unflatten(0, (-1, self.config.settings.context.block_size))
        states = blocks.mean(dim=1, dtype=torch.float32).transpose(0, 1)
        return Lesson(rows=rows, logits=self._scale_logits(logits), states=states)

    def assemble(self, input_ids: Tensor | None, spans: SpanMetadata, request: RowRequest) -> Assembly:
        """Return the decoder's input rows, [s, b, h], or this rank's part of them under sequence parallelism."""
        if input_ids is None:
            raise RuntimeError("the first pipeline stage received no tokens")
        context = self.config.settings.context
        if context.plan == "recency":
            rows = self._embedded(input_ids.gather(1, spans.start)).transpose(0, 1).contiguous()
            return Assembly(rows=self._own_rows(self._placed(rows, spans)), levels=[])
        tokens = self._embedded(input_ids.t().contiguous())
        gister = self.gist_net or self.gister
        assembly = assemble_rows(tokens, spans, context, gister, control=request.control)
        rows = assembly.rows
        if request.gist_loss is not None:
            rows = AttachedLoss.attach(rows, request.gist_loss(assembly.levels))
        if request.observe_moves is not None and assembly.shift is not None:
            request.observe_moves(assembly.shift, spans)
        return replace(assembly, rows=self._own_rows(self._placed(rows, spans)))

    def _placed(self, rows: Tensor, spans: SpanMetadata) -> Tensor:
        """Return rows [s, b, h] with an additive encoding of their places, where the run has one."""
        if self.places is None:
            return rows
        return self.places(rows, spans, base_sigma(spans.width, "uniform"))

    def _own_rows(self, rows: Tensor) -> Tensor:
        if self.config.fp32_residual_connection:
            rows = rows.float()
        if not self.config.sequence_parallel:
            return self.embedding.embedding_dropout(rows)
        rows = scatter_to_sequence_parallel_region(rows, group=self.pg_collection.tp)
        with cast(Any, get_cuda_rng_tracker()).fork():
            return self.embedding.embedding_dropout(rows)

    def _embedded(self, ids: Tensor) -> Tensor:
        tokens = self.embedding.word_embeddings(ids)
        if self.config.use_mup and self.config.mup_embedding_mult != 1.0:
            tokens = tokens * self.config.mup_embedding_mult
        return tokens

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what the parent does, without the plugin's parameters where a checkpoint is not to hold them."""
        if self.expects_adapters:
            return super().sharded_state_dict(*args, **kwargs)
        # Layers that adapters make different are alike in the base, which has its own keys then.
        adapted, self.config.hetereogenous_dist_checkpoint = self.config.hetereogenous_dist_checkpoint, False
        try:
            state = super().sharded_state_dict(*args, **kwargs)
        finally:
            self.config.hetereogenous_dist_checkpoint = adapted
        own = plugin_parameters(self)
        return {key: value for key, value in state.items() if key not in own}

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as the parent does, then verify that every parameter of the plugin holds what the checkpoint holds.

        Raises RuntimeError naming the keys otherwise: Megatron retries a failed strict load leniently, which would
        leave them at their initial values.  From a base, which holds none of them, they keep these.
        """
        own = plugin_parameters(self)
        if not self.expects_adapters:
            state_dict = {**state_dict, **{key: value.detach() for key, value in own.items()}}
            self.expects_adapters = True
        result = super().load_state_dict(state_dict, *args, **kwargs)
        wrong = [
            key
            for key, value in own.items()
            if key not in state_dict or not torch.equal(value.detach(), state_dict[key].to(value))
        ]
        if wrong:
            raise RuntimeError(f"the checkpoint did not provide the plugin's parameters {', '.join(sorted(wrong))}")
        return result


def _slot_kernel(settings: Settings) -> SlotKernel | None:
    """Return the kernel that pools blocks by a learned query, where the run has kernels and it holds such blocks."""
    gist = settings.gist
    if settings.backend != "triton" or gist.pooling != "slot":
        return None
    # Triton is not everywhere that PyTorch is.
    from megacontext_megatron.kernels.pooling import holds, slot_pooling

    return slot_pooling if holds(settings.context.block_size, gist.hidden_size // gist.heads) else None


def plugin_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return every parameter of a model that Megatron's own model does not have, by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, PositionalParameters | GistNet | LearnedAbsolute)
        for name, parameter in module.named_parameters(recurse=isinstance(module, GistNet))
    }


def build_model(
    config: MegaContextTransformerConfig,
    vocab_size: int,
    max_positions: int,
    **stage: Any,
) -> GPTModel:
    """Return this stage's model: ours where spans are active, Megatron's own GPTModel for a stock encoding.

    `stage` holds what Megatron's model provider is given (pre_process, post_process, vp_stage, pg_collection) and
    GPTModel's remaining arguments.
    """
    # GPTModel takes the spec of a block as well, which its annotation leaves out.
    spec = cast(ModuleSpec, decoder_block_spec(config, stage.get("vp_stage")))
    if config.settings.gaussian is None:
        return GPTModel(config, spec, vocab_size, max_positions, **stage)
    return MegaContextGPTModel(
        config, spec, vocab_size, max_positions, scatter_embedding_sequence_parallel=False, **stage
    )
