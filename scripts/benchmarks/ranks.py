"""One process on each of several GPUs: what they find, and times of what all begin together."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

WARM_UPS = 3


def on_each_gpu(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work`, a function of a module, finds in each of so many processes that talk through NCCL.

    What it returns must be writable as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(ranks, f"tcp://127.0.0.1:{_free_port()}", Path(folder), work, arguments)
        torch.multiprocessing.spawn(_work, (job,), nprocs=ranks)  # pyright: ignore
        return [json.loads(job.found_by(rank).read_text()) for rank in range(ranks)]


class _Job(NamedTuple):
    ranks: int
    address: str
    folder: Path
    work: Callable[..., Any]
    arguments: tuple[Any, ...]

    def found_by(self, rank: int) -> Path:
        """Return where a rank writes."""
        return self.folder / f"{rank}.json"


def _work(rank: int, job: _Job) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=job.address, rank=rank, world_size=job.ranks)
    job.found_by(rank).write_text(json.dumps(job.work(*job.arguments)))
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def times_together(call: Callable[[], object], repeats: int) -> list[float]:
    """Return microseconds that each of so many calls takes this rank's device, as all devices begin together."""
    one, found = torch.ones(1, device="cuda"), []
    for turn in range(repeats + WARM_UPS):
        torch.cuda.synchronize()
        dist.barrier()
        # Keeps the device busy while the host enqueues, so that the time is the device's.
        torch.cuda._sleep(20_000_000)
        # Hosts leave a barrier at different times, and devices an all-reduce at the same.
        dist.all_reduce(one)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if turn >= WARM_UPS:
            found.append(1000 * begin.elapsed_time(end))
    return found
