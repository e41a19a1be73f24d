"""Group M: a window layer, and its attention alone, with rows split over two GPUs, against half of one GPU's time.

Each rank holds two zigzag chunks and fetches the 127 rows before each from whoever has them.  Of two GPUs each lacks
one such run of rows, so it sends and receives 127 rows of keys and values: 0.52 MB a sequence, however long it is.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.benchmarks import split_layer
from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.options import Options
from scripts.benchmarks.ranks import on_each_gpu, times_together
from scripts.benchmarks.results import OURS, Check, Comparison, Reading, Row, at_most

TITLE = "a layer with a window of 128 rows, rows split over two GPUs"
RANKS = 2
ROWS = (32768, 131072)
HEADS, GROUPS, WIDTH, LOOK_BACK = 32, 8, 128, 127
HALF = "half of one GPU's"
REPEATS = 30


def run(options: Options, found: Findings) -> None:
    """Time forward and backward in two processes, after comparing them with one; raises GateFailed."""
    if torch.cuda.device_count() < RANKS:
        found.absent = "it needs two GPUs"
        return
    for rows in ROWS[:1] if options.quick else ROWS:
        measured = on_each_gpu(RANKS, _measured, rows)
        _keep(found, f"attention, {rows}x1", measured)
        first = measured[0]
        found.notes.append(
            f"{rows} rows: a rank sent {first['sent']} bytes forward, {first['returned']} backward; predicted "
            f"{halo_bytes()} each"
        )
    _keep(found, f"a layer, {ROWS[0]}x1", on_each_gpu(RANKS, split_layer.measured, LOOK_BACK, ROWS[0]))


def _keep(found: Findings, case: str, measured: list[Any]) -> None:
    """Keep what ranks measured; raises GateFailed."""
    found.require([Check(**check) for each in measured for check in each["checks"]])
    found.rows.append(row_of(case, *([each[side] for each in measured] for side in ("split", "whole"))))


def halo_bytes(batch: int = 1) -> int:
    """Return the bytes that one of two ranks sends in a forward pass: bf16 keys and values of a chunk's last rows."""
    return LOOK_BACK * batch * GROUPS * WIDTH * 2 * 2


def row_of(case: str, split: list[list[float]], whole: list[list[float]]) -> Row:
    """Return times of forward and backward, microseconds, of the slower rank each time."""
    on_two, on_one = (statistics.median(map(max, zip(*ranks, strict=True))) for ranks in (split, whole))
    return Row(
        case=f"{case}, forward + backward",
        readings=(
            Reading(name=OURS, rounds=(on_two,)),
            Reading(name="ours, one GPU", rounds=(on_one,)),
            Reading(name=HALF, rounds=(on_one / RANKS,)),
        ),
        comparisons=(Comparison(over=OURS, under=HALF, target=at_most(1.05)),),
    )


def _measured(rows: int) -> dict[str, Any]:
    """Return, in each rank, checks, bytes sent, and microseconds of its part of the rows and of all of them."""
    rank, group = dist.get_rank(), cast(Any, dist.group.WORLD)
    alone: Any = [dist.new_group([each]) for each in range(RANKS)][rank]
    made = [_random(rows, heads, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS, HEADS))]
    own = _own_rows(made, rows, rank)
    sent: list[int] = []
    _count(sent)
    outputs = _attend(group, own)
    checks = _checks(outputs, _own_rows(_attend(alone, made), rows, rank))
    return {
        "checks": [dataclasses.asdict(check) for check in checks],
        "sent": sent[0],
        "returned": sent[1],
        "split": times_together(_both_ways(group, own), REPEATS),
        "whole": times_together(_both_ways(alone, made), REPEATS),
    }


def _random(rows: int, heads: int, seed: int) -> Tensor:
    """Return the same heads [s, 1, n, hn] on every rank."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, 1, heads, WIDTH, device="cuda", dtype=torch.bfloat16, generator=generator)


def _own_rows(tensors: list[Tensor], rows: int, rank: int) -> list[Tensor]:
    from megacontext_megatron.spans.context_parallel import zigzag_rows

    numbers = zigzag_rows(rows, RANKS, rank, torch.device("cuda"))
    return [tensor[numbers].contiguous() for tensor in tensors]


def _attend(group: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of q, k and v of the layer's own attention over a group."""
    *given, gradient = tensors
    leaves = [each.detach().requires_grad_() for each in given]
    output = _attention(group)(*leaves, None).view_as(leaves[0])
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def _attention(group: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megacontext_megatron.attention.kernel_attention import WindowAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=WIDTH,
        window_size=(LOOK_BACK, 0),
    )
    return WindowAttention(config, 1, pg_collection=SimpleNamespace(cp=group))


def _checks(found: list[Tensor], expected: list[Tensor]) -> list[Check]:
    """Compare with one GPU's, in the tolerances of bf16."""
    names = ("output", "d query", "d key", "d value")
    return compared(
        dict(zip(names, found, strict=True)),
        {name: each.double() for name, each in zip(names, expected, strict=True)},
        "over two GPUs: ",
    )


def _count(sent: list[int]) -> None:
    """Note the bytes of every exchange that follows."""
    real = dist.batch_isend_irecv

    def counted(operations: list[Any]) -> Any:
        sent.append(sum(op.tensor.nbytes for op in operations if op.op is dist.isend))
        return real(operations)

    dist.batch_isend_irecv = counted


def _both_ways(group: Any, tensors: list[Tensor]) -> Callable[[], object]:
    """Return a call that runs the attention forward and backward."""
    *given, gradient = tensors
    leaves = [each.detach().requires_grad_() for each in given]
    attention = _attention(group)

    def both_ways() -> None:
        output = attention(*leaves, None).view_as(leaves[0])
        torch.autograd.grad(output, leaves, gradient)

    return both_ways
