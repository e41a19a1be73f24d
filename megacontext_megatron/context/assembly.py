"""Assembly: from the embeddings of a sample's C tokens to the W rows of each of its working contexts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.context.gists import Gister, embedding_rms
from megacontext_megatron.spans.levels import entry_index
from megacontext_megatron.spans.metadata import SpanMetadata


def entry_table(tokens: Tensor, context: ContextConfig, gister: Gister) -> Tensor:
    """Return tokens [C, b, h] followed by the gists of every complete block of each level: [entries, b, h]."""
    if context.plan == "recency":
        return tokens
    levels, below, rms = [tokens], tokens, embedding_rms(tokens)
    for _ in range(context.max_level):
        complete = below.shape[0] // context.block_size * context.block_size
        below, rms = gister(below[:complete], rms[:complete], context.block_size)
        levels.append(below)
    return torch.cat(levels)


def gather_rows(table: Tensor, spans: SpanMetadata, context: ContextConfig) -> Tensor:
    """Return rows [s, b V, h] that `spans` [b V, s] name in an entry table [entries, b, h].

    Context j reads raw sample j div V.  Uses an embedding lookup, whose backward is deterministic on every device.
    """
    entries, raw, hidden = table.shape
    contexts = spans.start.shape[0]
    nodes = entry_index(spans.start, spans.level.long(), context.source_length, context.block_size)
    sample = torch.arange(contexts, device=nodes.device) // (contexts // raw)
    index = (nodes * raw + sample.unsqueeze(1)).transpose(0, 1)
    return functional.embedding(index, table.reshape(entries * raw, hidden))
