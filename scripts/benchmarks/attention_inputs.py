"""Inputs of the attention groups: heads, places of rows, slopes, and what each pass counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.position.linear_biases import alibi_slopes
from scripts.benchmarks.inputs import FIRST_TOKEN, Inputs, Shape

SHAPES = (Shape(rows=4096, batch=1), Shape(rows=4096, batch=4), Shape(rows=32768, batch=1))
"""The first is for a first look alone."""

LOOK_BACK = 127
"""Rows before its own that a row of a local layer sees: a window of 128."""

BLOCK_SIZE = 32

HISTORY_PER_ROW = 8
"""Tokens for each row in the GRAPE recipe: a source of 8192 in contexts of 1024 rows."""

RECIPE_HISTORY = 8192
"""Tokens by which the GRAPE recipe flattens ALiBi's slopes, whose gentlest is 1/256 a token."""

_NORM_EPS = 1e-6

Centres = Literal["tokens", "mixed", "context"]


@dataclass(frozen=True, kw_only=True)
class AttentionInputs(Inputs):
    """Random q, k, v and the gradient of attention's output; the rows are tokens, or tokens and gists.

    `centres`: single tokens; tokens and gists drawn at random; or a context that the plugin plans, of one sequence.
    With `qk_norm` q and k are RMS-normed with weights 1.
    """

    centres: Centres = "mixed"
    qk_norm: bool = False

    @property
    def scale(self) -> float:
        """Factor of q.k."""
        return self.shape.head_dim**-0.5

    @cached_property
    def query(self) -> Tensor:
        """Queries [s, b, np, hn]."""
        return self._normed(self._heads(self.shape.query_heads, 1))

    @cached_property
    def key(self) -> Tensor:
        """Keys [s, b, ng, hn]."""
        return self._normed(self._heads(self.shape.groups, 2))

    @cached_property
    def value(self) -> Tensor:
        """Values [s, b, ng, hn]."""
        return self._heads(self.shape.groups, 11)

    @cached_property
    def of_output(self) -> Tensor:
        """The gradient of attention's output, [s, b, np, hn]."""
        return self._heads(self.shape.query_heads, 12)

    @cached_property
    def doubled_centre(self) -> Tensor:
        """Twice the centres, int64 [s, b]."""
        if self.centres == "mixed":
            return mixed_centres(self)
        if self.centres == "context":
            return planned_centres(self.shape, self.seed).to(self.device)
        places = FIRST_TOKEN + torch.arange(self.shape.rows, device=self.device)
        return (2 * places).unsqueeze(1).repeat(1, self.shape.batch)

    def slopes(self, factor: float = 1.0) -> Tensor:
        """Return ALiBi's slopes times `factor`, fp32 [np], nats per token."""
        return factor * torch.tensor(alibi_slopes(self.shape.query_heads), dtype=torch.float32, device=self.device)

    def flattened(self) -> float:
        """Return the factor with which the gentlest slope takes 1 nat off the longest distance here."""
        return 512.0 / float((self.doubled_centre[-1] - self.doubled_centre[0]).max())

    def _normed(self, heads: Tensor) -> Tensor:
        if not self.qk_norm:
            return heads
        wide = heads.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + _NORM_EPS).rsqrt()).to(heads.dtype)


def mixed_centres(inputs: Inputs) -> Tensor:
    """Return the doubled centres that the rotary groups use."""
    drawn = Inputs(shape=inputs.shape, device=inputs.device, dtype=inputs.dtype, seed=inputs.seed)
    return drawn.doubled_centre


def planned_centres(shape: Shape, seed: int) -> Tensor:
    """Return doubled centres, int64 [s, 1], of a context of tokens and gists as training plans it."""
    from megacontext_megatron.spans.metadata import SpanMetadata
    from megacontext_megatron.spans.plan import plan_rows

    recent = min(64, shape.rows // 2)
    context = ContextConfig(
        window=shape.rows,
        source_length=HISTORY_PER_ROW * shape.rows,
        block_size=BLOCK_SIZE,
        recent_tokens=recent,
        horizon=recent,
        level2_prob=0.3,
    )
    plan = plan_rows(context, (seed, 0, 0, 0))
    start, level = torch.from_numpy(plan.start), torch.from_numpy(plan.level)
    spans = SpanMetadata.of_nodes(FIRST_TOKEN + start, level, BLOCK_SIZE)
    return spans.doubled_centre.unsqueeze(1)


def window_bytes(shape: Shape, *, forward: bool, backward: bool) -> int:
    """Return the bytes that attention in a window must move: every tensor once, and a normaliser for each row.

    Forward: q, k, v and the output.  Backward: these, the output's gradient and the gradients of q, k and v.
    """
    normaliser = 4 * shape.tokens * shape.query_heads
    once = shape.head_bytes(2 * shape.query_heads + 2 * shape.groups) + normaliser
    return (forward + 2 * backward) * once


def causal_flops(shape: Shape, *, forward: bool, backward: bool) -> float:
    """Return the operations of causal attention: two products forward, five backward, of half of all pairs."""
    product = 2.0 * shape.batch * shape.query_heads * shape.head_dim * shape.rows**2 / 2
    return (2 * forward + 5 * backward) * product
