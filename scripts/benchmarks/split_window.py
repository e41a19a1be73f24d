"""Group M: a window layer's attention with its rows split over two GPUs, against half of one GPU's time.

Each rank holds two zigzag chunks and fetches the 127 rows before each from whoever has them.  Of two GPUs each lacks
one such run of rows, so it sends and receives 127 rows of keys and values: 0.52 MB a sequence, however long it is.
"""

from __future__ import annotations

import json
import socket
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scripts.benchmarks.gate import Findings, compared
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import OURS, Check, Comparison, Reading, Row, at_most

TITLE = "attention in a window of 128 rows, rows split over two GPUs"
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
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "measured.json"
            torch.multiprocessing.spawn(_measure, (_free_port(), rows, str(file)), nprocs=RANKS)  # pyright: ignore
            measured = json.loads(file.read_text())
        found.require([Check(**check) for check in measured["checks"]])
        found.rows.append(row_of(rows, measured["split"], measured["whole"]))
        found.notes.append(
            f"{rows} rows: a rank sent {measured['sent']} bytes forward, {measured['returned']} backward; predicted "
            f"{halo_bytes()} each"
        )


def halo_bytes(batch: int = 1) -> int:
    """Return the bytes that one of two ranks sends in a forward pass: bf16 keys and values of a chunk's last rows."""
    return LOOK_BACK * batch * GROUPS * WIDTH * 2 * 2


def row_of(rows: int, split: list[float], whole: list[float]) -> Row:
    """Return times of forward and backward, microseconds."""
    return Row(
        case=f"{rows}x1, forward + backward",
        readings=(
            Reading(name=OURS, rounds=(statistics.median(split),)),
            Reading(name="ours, one GPU", rounds=(statistics.median(whole),)),
            Reading(name=HALF, rounds=(statistics.median(whole) / RANKS,)),
        ),
        comparisons=(Comparison(over=OURS, under=HALF, target=at_most(1.05)),),
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _measure(rank: int, port: int, rows: int, file: str) -> None:
    """Measure in one of two processes; the first writes what both found."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    group: Any = dist.group.WORLD
    alone: Any = [dist.new_group([each]) for each in range(RANKS)][rank]
    made = [_random(rows, heads, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS, HEADS))]
    own = _own_rows(made, rows, rank)
    sent: list[int] = []
    _count(sent)
    outputs = _attend(group, own)
    expected = _attend(alone, made)
    checks = _checks(outputs, _own_rows(expected, rows, rank))
    found: dict[str, Any] = {
        "checks": [{"name": c.name, "error": c.error, "tolerance": c.tolerance} for c in checks],
        "sent": sent[0],
        "returned": sent[1],
        "split": _times(group, own),
    }
    found["whole"] = _times(alone, made) if rank == 0 else []
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, found)
    if rank == 0:
        slower = [max(pair) for pair in zip(*(each["split"] for each in gathered), strict=True)]
        all_checks = [check for each in gathered for check in each["checks"]]
        Path(file).write_text(json.dumps({**found, "split": slower, "checks": all_checks}))
    dist.barrier()
    dist.destroy_process_group()


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


def _times(group: Any, tensors: list[Tensor]) -> list[float]:
    """Return the times of forward and backward in microseconds, ranks starting together each time."""
    *given, gradient = tensors
    leaves = [each.detach().requires_grad_() for each in given]
    attention = _attention(group)
    found = []
    for turn in range(REPEATS + 3):
        torch.cuda.synchronize()
        dist.barrier(group)
        # Keeps the device busy while the host enqueues, so that the time is the device's.
        torch.cuda._sleep(20_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        output = attention(*leaves, None).view_as(leaves[0])
        torch.autograd.grad(output, leaves, gradient)
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            found.append(1000 * begin.elapsed_time(end))
    return found
