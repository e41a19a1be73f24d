"""Megatron's GPTModel over working contexts."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker, scatter_to_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megacontext_megatron.attention.layer_spec import decoder_block_spec
from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig
from megacontext_megatron.context.assembly import assemble_rows
from megacontext_megatron.context.gists import Gister, mean_gists
from megacontext_megatron.model.carrier import SpanCarrier
from megacontext_megatron.position.parameters import PositionalParameters
from megacontext_megatron.spans.metadata import SpanMetadata


class MegaContextGPTModel(GPTModel):
    """GPTModel whose rows are the tokens and gists of working contexts.

    Called by keyword with `spans` [b, s] on every pipeline stage; the first stage also takes `input_ids`, the raw
    samples' C tokens [b / V, C], and embeds each once for all its contexts.
    """

    config: MegaContextTransformerConfig
    gister: Gister = staticmethod(mean_gists)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        gaussian = self.config.settings.gaussian
        assert gaussian is not None
        self.rotary_pos_emb = SpanCarrier(gaussian.sigma)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor | None = None, *, spans: SpanMetadata, **kwargs: Any
    ) -> Tensor:
        """Return the loss of each row [b, s] where `labels` are given, else logits; as GPTModel does."""
        decoder_input = self.assemble(input_ids, spans) if self.pre_process else None
        with self.rotary_pos_emb.carrying(spans):
            stage = {"input_ids": input_ids, "position_ids": None, "decoder_input": decoder_input}
            return super().forward(**cast(dict[str, Any], stage), **kwargs)

    def assemble(self, input_ids: Tensor | None, spans: SpanMetadata) -> Tensor:
        """Return the decoder's input rows, [s, b, h], or this rank's part of them under sequence parallelism."""
        if input_ids is None:
            raise RuntimeError("the first pipeline stage received no tokens")
        context = self.config.settings.context
        if context.plan == "recency":
            rows = self._embedded(input_ids.gather(1, spans.start)).transpose(0, 1).contiguous()
        else:
            rows = assemble_rows(self._embedded(input_ids.t().contiguous()), spans, context, self.gister)
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

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as the parent does, then verify that every positional parameter holds what the checkpoint holds.

        Raises RuntimeError naming the keys otherwise: Megatron retries a failed strict load leniently, which would
        leave them at their initial values.
        """
        result = super().load_state_dict(state_dict, *args, **kwargs)
        wrong = [
            key
            for key, value in positional_parameters(self).items()
            if key not in state_dict or not torch.equal(value.detach(), state_dict[key].to(value))
        ]
        if wrong:
            raise RuntimeError(f"the checkpoint did not provide the plugin's parameters {', '.join(sorted(wrong))}")
        return result


def positional_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return every learnable positional parameter of a model by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, PositionalParameters)
        for name, parameter in module.named_parameters(recurse=False)
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
