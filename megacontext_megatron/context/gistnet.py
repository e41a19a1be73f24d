"""GistNet: a small non-causal transformer over a block, whose answer is added to the block's mean.

One network serves all levels, so that a gist of gists is made as a gist of tokens is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from megacontext_megatron.config import GistConfig
from megacontext_megatron.context.block_groups import BlockGroups
from megacontext_megatron.context.gists import GREATEST_GAIN, Gists, embedding_rms, summing_dtype

PLACE_STD = 0.5
"""Standard deviation of the local positions beside entries of unit size."""

ANSWER_SHARE = 0.5
"""What the encoder's answer counts for beside the mean of unrelated entries.

Weights that learn nothing yet wander under Adam.  Where their answer soon outweighs the mean, what attention could find
in means is lost before it is found, and training stays on its plateau.
"""

LEAST_SQUARE = 1e-8
"""Added to an entry's mean square, so that one of nothing but zeros has a finite gradient."""

NORM_EPS = 1e-6
"""Of GistNet's norms.  PyTorch's own default depends on the dtype, and is 0.008 in bf16."""

MOST_BLOCKS = 2**15
"""Blocks that one launch of attention takes: a GPU's grid has no more than 65535 in this direction."""

HALF = (torch.bfloat16, torch.float16)

TENSOR_PARTIAL = "mc_partial_over_tensor_ranks"
"""Attribute of parameters whose gradient on a tensor-parallel rank is that of the rank's own blocks alone."""


SlotKernel = Callable[[Tensor, Tensor, int], Tensor]
"""(query [1, d], keys and values beside each other [n, K, 2 d], heads) -> what `attend` returns, [n, d]."""


class GistNet(nn.Module):
    """Makes gists [n / K, b, h] of blocks; a context.gists.Gister.

    A gist is the block's mean plus what the encoder says, in units of a mean's usual size, at the size of embeddings.
    The encoder's last layer starts at 0, so that every gist starts as the mean gist, bit for bit.  The encoder sees a
    rank's share of the blocks (see BlockGroups), all samples' at once, and each raw sample once for all its variants.
    With a `slot_kernel`, that pools by a learned query wherever it can.
    """

    def __init__(
        self,
        config: GistConfig,
        block_size: int,
        groups: BlockGroups,
        seed: int,
        *,
        slot_kernel: SlotKernel | None = None,
    ) -> None:
        super().__init__()
        self._groups = groups
        self.encoder = BlockEncoder(config, block_size, slot_kernel)
        self.encoder.initialise(seed)
        for parameter in self.encoder.parameters():
            setattr(parameter, TENSOR_PARTIAL, True)

    def forward(self, below: Tensor, rms: Tensor, block_size: int) -> Gists:
        """Return the gists of `below` [n, b, h] whose tokens' RMS is `rms` [n, b]; see Gister."""
        hidden = below.shape[-1]
        blocks = below.unflatten(0, (-1, block_size))
        count = (blocks.shape[0], blocks.shape[2])
        own = self._groups.own(blocks.transpose(1, 2).reshape(-1, block_size, hidden))
        answer = self._groups.all(self.encoder(own), count[0] * count[1]).unflatten(0, count)
        mean = blocks.mean(dim=1, dtype=summing_dtype(below.dtype))
        target = rms.unflatten(0, (-1, block_size)).mean(dim=1)
        share = ANSWER_SHARE / math.sqrt(block_size)
        whole = mean + share * target.unsqueeze(-1) * answer[..., :hidden].to(mean.dtype)
        # The limit keeps the gradient finite where a block's embeddings all but cancel out.
        gain = (target / embedding_rms(whole)).clamp_max(GREATEST_GAIN)
        vectors = (whole * gain.unsqueeze(-1)).to(below.dtype)
        return Gists(vectors, target, answer[..., hidden:].float() if answer.shape[-1] > hidden else None)


class BlockEncoder(nn.Module):
    """Reads blocks [n, K, h] of any size and answers with [n, h], or [n, h + 2] where it also moves spans."""

    def __init__(self, config: GistConfig, block_size: int, slot_kernel: SlotKernel | None = None) -> None:
        super().__init__()
        width = config.hidden_size
        self.project = nn.Linear(config.hidden, 3 * width, bias=False)
        self.places = nn.Parameter(torch.empty(block_size, width))
        self.layers = nn.ModuleList(EncoderLayer(width, config.heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width, NORM_EPS)
        self.slot = SlotPooling(width, config.heads, slot_kernel) if config.pooling == "slot" else None
        self.answer = nn.Linear(width, config.hidden, bias=False)
        self.spans = nn.Linear(width, 2, bias=False) if config.span_head else None

    def forward(self, blocks: Tensor) -> Tensor:
        """Return the answers."""
        # Embeddings of any size and any model look alike from here on.
        entries = functional.rms_norm(blocks, blocks.shape[-1:], eps=LEAST_SQUARE)
        # Each entry also sees its neighbours, so that no layer has to find out first who stands beside whom.
        earlier, here, later = self.project(entries).chunk(3, dim=-1)
        states = here + functional.pad(earlier[:, :-1], (0, 0, 1, 0)) + functional.pad(later[:, 1:], (0, 0, 0, 1))
        states = states + self.places
        for layer in self.layers:
            states = layer(states)
        states = self.norm(states)
        pooled = states.mean(dim=1) if self.slot is None else self.slot(states)
        answer = self.answer(pooled)
        return answer if self.spans is None else torch.cat([answer, self.spans(pooled)], dim=-1)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all weights from `seed` alone, so that every rank of every layout starts with the same."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.startswith(("answer.", "spans.")):
                parameter.zero_()
            else:
                std = PLACE_STD if name == "places" else parameter.shape[1] ** -0.5
                values = torch.empty(parameter.shape).normal_(std=std, generator=generator)
                parameter.copy_(values)


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer without a mask over blocks [n, K, d].

    Every weight lies in a module that is called, because Megatron gathers updated parameters in hooks of such calls.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, NORM_EPS), nn.RMSNorm(width, NORM_EPS)
        self.mixed = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.widen = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return the states after attention within each block and the MLP."""
        query, key, value = self.mixed(self.attention_norm(states)).chunk(3, dim=-1)
        states = states + self.attended(attend(query, (key, value), self._heads))
        return states + self.narrow(functional.gelu(self.widen(self.mlp_norm(states))))


class SlotPooling(nn.Module):
    """Pools a block's states [n, K, d] by attention of one learned query: [n, d].

    A kernel, where one is given, does so for states in half precision on a GPU.
    """

    def __init__(self, width: int, heads: int, kernel: SlotKernel | None = None) -> None:
        super().__init__()
        self._heads, self._kernel = heads, kernel
        self.query = nn.Parameter(torch.empty(1, width))
        self.mixed = nn.Linear(width, 2 * width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return the pooled states."""
        mixed = self.mixed(states)
        half = mixed.dtype in HALF and mixed.dtype == self.query.dtype
        if self._kernel is not None and half and mixed.is_cuda:
            return self._kernel(self.query, mixed, self._heads)
        key, value = mixed.chunk(2, dim=-1)
        query = self.query.expand(states.shape[0], 1, -1)
        return attend(query, (key, value), self._heads).squeeze(1)


def attend(query: Tensor, key_value: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Return attention of queries [n, q, d] over keys and values [n, K, d] by heads, without a mask: [n, q, d]."""
    if query.shape[0] > MOST_BLOCKS:
        parts = zip(*(t.split(MOST_BLOCKS) for t in (query, *key_value)), strict=True)
        return torch.cat([attend(q, (k, v), heads) for q, k, v in parts])
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, *key_value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
