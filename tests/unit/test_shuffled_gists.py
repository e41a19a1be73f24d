"""The control in which every row has another gist of its level."""

from __future__ import annotations

import pytest
import torch

from megacontext_megatron.context.assembly import gists_of, shuffled_gists
from megacontext_megatron.context.gists import embedding_rms, mean_gists
from tests.unit.test_assembly import embeddings, small


@pytest.mark.parametrize("raw", [1, 3])
def test_shuffled_gists_are_others_of_their_level_with_their_shift(raw: int):
    context = small(variants=1)
    tokens = embeddings(context, raw, seed=8)
    levels = gists_of(tokens, embedding_rms(tokens), context, mean_gists)
    levels = [level._replace(shift=level.vectors[..., :2]) for level in levels]
    width = 1
    for before, after in zip(levels, shuffled_gists(levels, context), strict=True):
        width *= context.block_size
        first = -(-context.dropped_tokens // width)
        inside = slice(first, max(first, (context.source_length - context.protected_tokens) // width))
        assert after.shift is not None
        assert torch.equal(after.shift, after.vectors[..., :2])
        same = (after.vectors == before.vectors).all(dim=-1)
        alone = before.vectors[inside].shape[0] * raw < 2
        assert alone or not same[inside].any()
        assert same[: inside.start].all()
        assert same[inside.stop :].all()
        assert torch.equal(
            after.vectors[inside].flatten(0, 1).sort(0)[0], before.vectors[inside].flatten(0, 1).sort(0)[0]
        )
