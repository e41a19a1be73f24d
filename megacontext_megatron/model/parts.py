"""The trainable parts of the plugin, and the gradient each of them got in a step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext_megatron.model.gpt import plugin_parameters
from megacontext_megatron.model.parallel_groups import row_group, tensor_parallel_group

ENCODER = re.compile(r"gist_net\.encoder\.((?:layers\.)?[^.]+)")


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, by its full name: a child of GistNet's encoder, or its own kind."""
    found = ENCODER.search(name)
    return f"gist/{found[1]}" if found else f"position/{name.split('.')[-2]}"


class TrainableParts:
    """The parts of all pipeline stages, in the same order on every rank, and the squares of their gradients.

    To be made where all ranks meet: it gathers the names of all parameters.
    """

    def __init__(self, model: Sequence[torch.nn.Module]) -> None:
        own = [
            (chunk, name, parameter)
            for chunk in model
            for name, parameter in plugin_parameters(chunk).items()
            if parameter.requires_grad
        ]
        everywhere: list[set[str]] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, {name for _, name, _ in own})
        self.names: dict[str, set[str]] = {}
        for name in sorted(set().union(*everywhere)):
            self.names.setdefault(part_of(name), set()).add(name)
        order = {part: number for number, part in enumerate(self.names)}
        self._own = [(chunk, order[part_of(name)], parameter) for chunk, name, parameter in own]

    def idle(self, endings: tuple[str, ...]) -> set[str]:
        """Return the parts all of whose parameters' names end with one of `endings`."""
        return {part for part, names in self.names.items() if all(name.endswith(endings) for name in names)}

    def squares(self) -> Tensor:
        """Return this rank's share of each part's squared gradient norm, float64 [parts]; all ranks' add up to it."""
        total = torch.zeros(len(self.names), dtype=torch.float64, device=torch.cuda.current_device())
        for chunk, number, parameter in self._own:
            gradient, shards = final_gradient(chunk, parameter)
            copies = tensor_parallel_group().size() * row_group().size() // shards
            total[number] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / copies
        return total


def final_gradient(chunk: torch.nn.Module, parameter: torch.nn.Parameter) -> tuple[Tensor, int]:
    """Return the part of a parameter's final gradient that this rank holds, and over how many ranks it is split.

    A distributed optimizer has each rank of a group add up its own shard of a bucket alone; elsewhere the bucket holds
    what the rank itself contributed.
    """
    gradient = cast(Tensor, cast(Any, parameter).main_grad)
    wrapped = cast(Any, chunk)
    if not wrapped.ddp_config.use_distributed_optimizer:
        return gradient, 1
    (buffer,) = (each for each in wrapped.buffers if parameter in each.param_index_map)
    start, end, number = buffer.param_index_map[parameter]
    bucket, group = buffer.buckets[number], buffer.data_parallel_group
    length = bucket.grad_data.numel() // group.size()
    first = bucket.offset + group.rank() * length
    inside = [min(max(place - start, 0), end - start) for place in (first, first + length)]
    return gradient.flatten()[inside[0] : inside[1]], group.size()
