"""From the data loader to every tensor-parallel rank: one check, one buffer, one broadcast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.data.samples import Item


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch of `b` working contexts over `b / V` raw samples, whole (not yet context-parallel) rows.

    `start`, `level`: int64 [b, W].  `shortened`: int64 [b, 1], history tokens left out under `no-cross`.  `text`: int64
    [b / V, C + 1] and `mask`: int64 [b / V, C], only on stages that read tokens.  `logits`: bf16 [b / V, H, vocabulary]
    and `states`: bf16 [b / V, C / K, h], a cached teacher's, only on stages that learn from them.
    """

    start: Tensor
    level: Tensor
    shortened: Tensor
    text: Tensor | None = None
    mask: Tensor | None = None
    logits: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLayout:
    """Static shapes of a micro-batch, known on every rank without communication.

    `taught` holds, by field, the shape that a cached teacher's answer has for one raw sample.
    """

    micro_batch_size: int
    context: ContextConfig
    has_text: bool
    taught: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the fields of a batch and their shapes, in the order of the broadcast buffer."""
        b, c = self.micro_batch_size, self.context
        raw = b // c.variants
        rows = {"start": (b, c.window), "level": (b, c.window), "shortened": (b, 1)}
        text = {"text": (raw, c.source_length + 1), "mask": (raw, c.source_length)}
        return {**rows, **text} if self.has_text else rows

    def taught_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the fields of a batch that a cached teacher fills, and their shapes."""
        return {name: (self.micro_batch_size // self.context.variants, *shape) for name, shape in self.taught.items()}


ONCE = ("text", "mask", "logits", "states")
"""Fields that all variants of a raw sample share."""


def check_variants(identity: Tensor, variants: int) -> None:
    """Assert that a micro-batch holds all variants of its raw samples, one after another.

    `identity` is int64 [b, 3] on the CPU, as WorkingContextDataset makes it.  Raises RuntimeError otherwise: the
    consumed samples are not a multiple of `--mc-variants`, or a sampler reordered the items.
    """
    if len(identity) % variants:
        raise RuntimeError(
            f"a micro-batch of {len(identity)} contexts cannot hold --mc-variants {variants} of each sample"
        )
    groups = identity.view(-1, variants, identity.shape[1])
    whole = (groups[:, :, 0] == groups[:, :1, 0]).all() and (groups[:, :, 1] == torch.arange(variants)).all()
    if not whole:
        raise RuntimeError(
            f"a micro-batch does not hold all {variants} variants of its samples: {identity[:, :2].tolist()} "
            "(sample, variant); consumed samples must be a multiple of --mc-variants and the data loader 'single'"
        )


def next_item(iterator: Iterator[Item], variants: int) -> Item:
    """Return the loader's next collated micro-batch on the CPU, checked, with each raw sample's text once."""
    item = next(iterator)
    check_variants(item["identity"], variants)
    once = {k: v[::variants] if k in ONCE else v for k, v in item.items()}
    return {**once, "shortened": item["identity"][:, 2:]}


def broadcast_batch(item: Item | None, layout: BatchLayout, group: dist.ProcessGroup) -> Batch:
    """Send a micro-batch from the first rank of a tensor-parallel group to the others, without host syncs.

    `item` is the checked micro-batch on the first rank and None elsewhere.
    """
    fields = _sent(item, layout.shapes(), torch.int64, group)
    if layout.taught:
        fields |= _sent(item, layout.taught_shapes(), torch.bfloat16, group)
    return Batch(**fields)


def _sent(
    item: Item | None, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Return the fields of one dtype, sent in one buffer."""
    device = torch.device(torch.cuda.current_device())
    sizes = [math.prod(shape) for shape in shapes.values()]
    if item is not None:
        flat = _staged([item[name].reshape(-1) for name in shapes], device).to(device, non_blocking=True)
    else:
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    if group.size() > 1:
        dist.broadcast(flat, group=group, group_src=0)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), flat.split(sizes), strict=True)}


def _staged(parts: list[Tensor], device: torch.device) -> Tensor:
    """Return the concatenation of host tensors in memory that `device` can read without stopping the host.

    A copy from pageable memory waits for the stream, also where it is called non-blocking.  PyTorch gives pinned
    memory to no one else before the copies made from it have ended.
    """
    size = sum(part.numel() for part in parts)
    return torch.cat(parts, out=torch.empty(size, dtype=parts[0].dtype, pin_memory=device.type == "cuda"))
