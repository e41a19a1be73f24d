"""What a gist is for: its key answers a distant query as the mean of its tokens would, and can be undone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, RotaryConfig
from megacontext_megatron.context.assembly import assemble_rows
from megacontext_megatron.context.gists import mean_gists
from megacontext_megatron.position.frequencies import rotary_frequencies
from megacontext_megatron.position.gaussian import GaussianRotary
from megacontext_megatron.spans.metadata import SpanMetadata
from tests import oracles

HEAD_DIM = 64
ROTARY = RotaryConfig(head_dim=HEAD_DIM)
CONTENTS = {32: 8192, 1024: 1536}
AT_ONCE = {32: 4096, 1024: 192}
START = 7 * 1024


def rotary(config=ROTARY, **settings):
    return GaussianRotary(GaussianRopeConfig(**settings), rotary_frequencies(config), config.interleaved)


def predicted_factor(width):
    """Centre-only rms error over Gaussian rms error, for contents whose pairs are alike: a ratio of sums over pairs.

    Such a content gives every pair's exp(i w (query - x)) the same variance, and its phase at the centre is common
    to the mean over the tokens and both approximations, so only how far each of these shrinks it matters.
    """
    omega = rotary_frequencies(ROTARY).omega.double().numpy()
    centre = (width - 1) / 2
    exact = oracles.uniform_expectation(omega, 0, width) * np.exp(-1j * omega * centre)
    gaussian = oracles.normal_expectation(omega, 0.0, oracles.uniform_spread(width))
    return float(np.sqrt((np.abs(1.0 - exact) ** 2).sum() / (np.abs(gaussian - exact) ** 2).sum()))


def logits_to_span(width, count, seed):
    """Logits of random queries to a span: Gaussian gist, gist at its centre alone, mean over its tokens; [3, count].

    Row 0 is the gist, the others are its tokens with the same content; each head is another content.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 1, count, HEAD_DIM, generator=generator) for _ in range(2))
    level = torch.zeros(width + 1, 1, dtype=torch.int64)
    level[0] = {32: 1, 1024: 2}[width]
    start = START + torch.cat([torch.zeros(1), torch.arange(width)]).long().unsqueeze(1)
    spans = SpanMetadata.of_nodes(start, level, 32)
    keys = key.expand(width + 1, -1, -1, -1)
    place = SpanMetadata.of_nodes(torch.tensor([[START + 2 * width]]), torch.zeros(1, 1, dtype=torch.int64), 32)
    asked = rotary()(query, key, place)[0][0, 0]
    first_head = keys[:, :, :1]
    rows = rotary()(first_head, keys, spans)[1][:, 0]
    centre = rotary(sigma="none")(first_head[:1], keys[:1], SpanMetadata.of_nodes(start[:1], level[:1], 32))[1][:, 0]
    logits = torch.einsum("nh,snh->sn", asked, torch.cat([centre, rows])).double()
    return torch.stack([logits[1], logits[0], logits[2:].mean(dim=0)]).numpy()


@pytest.mark.parametrize("width", [32, 1024])
def test_gist_logit_is_closer_to_its_tokens_by_the_predicted_factor(width, record_property):
    count = AT_ONCE[width]
    parts = [logits_to_span(width, count, seed) for seed in range(CONTENTS[width] // count)]
    gaussian, centre, mean = np.concatenate(parts, axis=1)
    near, far = np.square(gaussian - mean), np.square(centre - mean)
    factor = np.sqrt(far.mean() / near.mean())
    # First-order error of a ratio of means of paired samples, halved by the square root.
    relative = (far / far.mean() - near / near.mean()).std(ddof=1) / np.sqrt(near.size) / 2
    record_property("measured", float(factor))
    record_property("standard error", float(factor * relative))
    record_property("predicted", float(predicted_factor(width)))
    assert relative < 0.05
    assert abs(factor - predicted_factor(width)) < 4 * factor * relative
    assert factor > 2


# Collapsing and expanding


BLOCK, TOKENS, HEADS, GROUPS, CHANNELS = 4, 64, 4, 2, 16
CONTEXT = ContextConfig(window=40, source_length=TOKENS, block_size=BLOCK, recent_tokens=8, horizon=4, level2_prob=0.5)
Node = tuple[int, int]
"""Start in tokens, and level."""


def content():
    """Embeddings of tokens, [C, 1, channels of all heads and groups]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, 1, (HEADS + GROUPS) * CHANNELS, generator=generator)


def collapse(rows: list[Node], node: Node) -> list[Node]:
    """Replace the rows inside a node by the node."""
    start, level = node
    inside = [row for row in rows if start <= row[0] < start + BLOCK**level]
    return sorted([row for row in rows if row not in inside] + [node])


def expand(rows: list[Node], node: Node) -> list[Node]:
    """Replace a node by its tokens."""
    start, level = node
    return sorted([row for row in rows if row != node] + [(start + i, 0) for i in range(BLOCK**level)])


def logits_of(module: GaussianRotary, rows: list[Node], offset: int) -> dict[tuple[Node, Node], torch.Tensor]:
    """Logits [np] of every pair of rows, from content and spans that went through the carrier."""
    start, level = (torch.tensor([column]) for column in zip(*rows, strict=True))
    content_rows = assemble_rows(content(), SpanMetadata.of_nodes(start, level, BLOCK), CONTEXT, mean_gists).rows
    spans = SpanMetadata.unpack(SpanMetadata.of_nodes(start + offset, level, BLOCK).pack("uniform"))
    heads = content_rows.unflatten(-1, (HEADS + GROUPS, CHANNELS))
    query, key = module(heads[:, :, :HEADS], heads[:, :, HEADS:], spans)
    key = key.repeat_interleave(HEADS // GROUPS, dim=2)
    table = (query[:, None, 0] * key[None, :, 0]).sum(dim=-1)
    return {(rows[i], rows[j]): table[i, j] for i in range(len(rows)) for j in range(i + 1)}


MODULES = [rotary(RotaryConfig(head_dim=CHANNELS), renorm=renorm) for renorm in ("none", "rms")]
nodes = st.one_of(
    st.builds(lambda i: (i * BLOCK, 1), st.integers(0, TOKENS // BLOCK - 1)),
    st.builds(lambda i: (i * BLOCK**2, 2), st.integers(0, TOKENS // BLOCK**2 - 1)),
)


def apart(node: Node, other: Node) -> bool:
    """Whether two nodes share no token."""
    return node[0] + BLOCK ** node[1] <= other[0] or other[0] + BLOCK ** other[1] <= node[0]


@settings(max_examples=15)
@given(
    module=st.sampled_from(MODULES),
    node=nodes,
    others=st.lists(nodes, max_size=3),
    offset=st.sampled_from([0, BLOCK**2, 2**40, 2**51 - 2 * TOKENS]),
)
def test_collapse_then_expand_restores_every_bit(module, node, others, offset):
    rows, gists = [(i, 0) for i in range(TOKENS)], [node]
    for other in others:
        if all(apart(other, gist) for gist in gists):
            rows = collapse(rows, other)
            gists.append(other)
    before = logits_of(module, rows, offset)
    collapsed_rows = collapse(rows, node)
    collapsed = logits_of(module, collapsed_rows, offset)
    untouched = before.keys() & collapsed.keys()
    kept = len(collapsed_rows) - 1
    assert len(untouched) == kept * (kept + 1) // 2
    assert all(torch.equal(before[pair], collapsed[pair]) for pair in untouched)
    restored = expand(collapsed_rows, node)
    assert restored == rows
    after = logits_of(module, restored, offset)
    assert all(torch.equal(before[pair], after[pair]) for pair in before)
