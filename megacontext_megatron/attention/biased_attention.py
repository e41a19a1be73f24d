"""Dense core attention with biases on its scores, for stacks without Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megacontext_megatron.attention.core_attention import GatheredRows, single_rank_config
from megacontext_megatron.position.score_bias import BiasInputs, ScoreBias

CENTRE, WIDTH, FEATURES = "centre", "width", "features/"
"""Names of the tensors of rows that go with queries and keys; the name of a bias follows the last."""


class BiasedAttention(DotProductAttention):
    """Megatron's dense attention, causal by row numbers, whose scores take biases before its softmax.

    Keys, and what biases read of them, are gathered over the context-parallel group.  Biases are added one after
    another in fp32, whatever the model's dtype, and the softmax is in fp32.  Each bias is a tensor of b np sq sk
    numbers, where sk counts all rows: O(b np s^2) memory for each, and several times that for those that are learned or
    depend on content.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        single = single_rank_config(config)
        # The fused kernels take half-precision scores, and without fp32 the softmax would hand on another dtype.
        single.masked_softmax_fusion = False
        single.attention_softmax_in_fp32 = True
        super().__init__(single, layer_number, *args, **kwargs)
        self._rows = GatheredRows(config, layer_number, kwargs["pg_collection"].cp)
        self._biases: dict[str, ScoreBias] = {}
        self.scale_mask_softmax = cast(Any, _BiasedSoftmax(self.scale_mask_softmax))

    def attach(self, biases: Mapping[str, ScoreBias]) -> None:
        """Add these biases from now on, in this order; they stay submodules of whoever made them, and not of this."""
        self._biases = dict(biases)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Mapping[str, Tensor] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Attend from local queries [s / cp, b, np, hn] to all keys and values [s / cp, b, ng, hn] of the group.

        The biases read `centre` float64 [s / cp, b], `width` int32 [s / cp, b], in tokens, and `features/NAME` fp32
        [s / cp, b, m] of the bias NAME where it has features, all of this rank's rows.  They come in `attention_bias`,
        or as arguments of these names.  Raises RuntimeError where `centre` or `width` is missing.
        """
        del attention_mask
        tensors = dict(attention_bias or {})
        for name in (CENTRE, WIDTH, *(FEATURES + bias for bias in self._biases)):
            if name in arguments:
                tensors[name] = arguments.pop(name)
        key, value = self._rows.gather(key), self._rows.gather(value)
        softmax = cast(_BiasedSoftmax, self.scale_mask_softmax)
        if self._biases:
            softmax.add = partial(self._biased, query, key, self._gathered(tensors))
        try:
            return super().forward(query, key, value, self._rows.hidden(query), **arguments)
        finally:
            softmax.add = None

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in (CENTRE, WIDTH) if name not in tensors]
        if missing:
            raise RuntimeError(f"layer {self.layer_number}: score biases need the {' and '.join(missing)} of each row")
        return {name: self._rows.gather(tensor) for name, tensor in tensors.items()}

    def _biased(self, query: Tensor, key: Tensor, rows: Mapping[str, Tensor], scores: Tensor) -> Tensor:
        """Return the scores [b, np, sq, sk] with every bias added."""
        inputs = BiasInputs(
            query=query,
            key=key,
            scores=scores,
            rows=self._rows.numbers(query),
            centre=rows[CENTRE],
            width=rows[WIDTH],
        )
        total = scores
        for name, bias in self._biases.items():
            total = total + bias(replace(inputs, features=rows.get(FEATURES + name)))
        return total


class _BiasedSoftmax(torch.nn.Module):
    """Megatron's softmax of masked scores, which are widened and changed by `add` before."""

    def __init__(self, softmax: FusedScaleMaskSoftmax) -> None:
        super().__init__()
        self._softmax = softmax
        # Scores that Megatron scales down by the layer's number are scaled up again before biases, not after.
        self._scale, softmax.scale = softmax.scale, None
        self.add: Callable[[Tensor], Tensor] | None = None

    def forward(self, scores: Tensor, mask: Tensor | None, offset: Tensor | None = None) -> Tensor:
        """Return the probabilities [b, np, sq, sk] in the model's dtype."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self._scale is not None:
            scores = scores * self._scale
        if self.add is not None:
            scores = self.add(scores)
        return self._softmax(scores, mask, offset)
