"""Times on the device: events around one call, with a cold or a warm L2 cache, contenders taking turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from scripts.benchmarks.results import OURS, Comparison, Reading, Row

FLUSH_BYTES = 2**28
"""Written before each cold call: several times the L2 cache of any GPU."""

_CYCLES_PER_MICROSECOND = 2000
_WARM_UPS = 3


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to time; without a `call` it is absent, for the reason given."""

    name: str
    call: Callable[[], object] | None = None
    absent: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders for the same job, the bytes that job must move, and the ratios to report."""

    name: str
    contenders: Sequence[Contender]
    comparisons: Sequence[Comparison] = ()
    floor_bytes: int | None = None
    flush: bool = True


@dataclass(kw_only=True)
class Stopwatch:
    """Times calls on the current CUDA device.

    Before a call is enqueued the device is kept busy for as long as the host needs to enqueue it, so that a reading is
    the device's time; the host's is reported beside it.  `budget` is the milliseconds spent on a contender in a round.
    """

    rounds: int = 3
    budget: float = 60.0
    most: int = 100
    fewest: int = 4
    _flush: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Allocate what is written to empty the cache."""
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def row(self, case: Case) -> Row:
        """Time a case: every contender in every round, each round beginning with another one."""
        failed = {c.name: c.absent for c in case.contenders if c.call is None}
        present = [(c.name, c.call) for c in case.contenders if c.call is not None and self._works(c, failed)]
        times: dict[str, list[float]] = {name: [] for name, _ in present}
        host: dict[str, float] = {}
        gc.collect()
        gc.disable()
        try:
            for turn in range(self.rounds):
                shift = turn % max(len(present), 1)
                for name, call in present[shift:] + present[:shift]:
                    device, host[name] = self._median(call, flush=case.flush)
                    times[name].append(device)
        finally:
            gc.enable()
        readings = tuple(
            Reading(
                name=c.name, rounds=tuple(times.get(c.name, ())), host=host.get(c.name), absent=failed.get(c.name, "")
            )
            for c in case.contenders
        )
        return Row(case=case.name, readings=readings, comparisons=tuple(case.comparisons), floor_bytes=case.floor_bytes)

    def _works(self, contender: Contender, failed: dict[str, str]) -> bool:
        """Call a contender until it is warm; a peer that fails is named in `failed`, ours may not fail."""
        assert contender.call is not None
        try:
            self._warm(contender.call)
        except Exception as error:  # a peer raises what it likes, and is named with it
            if contender.name.startswith(OURS):
                raise
            failed[contender.name] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return False
        return True

    def _warm(self, call: Callable[[], object]) -> None:
        for _ in range(_WARM_UPS):
            call()
        torch.cuda.synchronize()

    def _median(self, call: Callable[[], object], *, flush: bool) -> tuple[float, float]:
        """Return the median time of one call on the device and on the host, both in microseconds."""
        trial = self._run(call, 2, flush=flush, head_start=0.0)
        host = min(entry[1] for entry in trial)
        cost = statistics.median(entry[0] for entry in trial) + 2 * host + 100.0
        repeats = int(min(self.most, max(self.fewest, 1000.0 * self.budget / cost)))
        entries = self._run(call, repeats, flush=flush, head_start=1.5 * host + 30.0)
        return statistics.median(e[0] for e in entries), statistics.median(e[1] for e in entries)

    def _run(
        self, call: Callable[[], object], repeats: int, *, flush: bool, head_start: float
    ) -> list[tuple[float, float]]:
        begin = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        end = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        host = []
        for turn in range(repeats):
            if flush:
                self._flush.zero_()
            torch.cuda._sleep(int(head_start * _CYCLES_PER_MICROSECOND))
            begin[turn].record()
            started = time.perf_counter()
            call()
            host.append(1e6 * (time.perf_counter() - started))
            end[turn].record()
        torch.cuda.synchronize()
        return [(1000.0 * b.elapsed_time(e), h) for b, e, h in zip(begin, end, host, strict=True)]


def copy_rate(count: int = 2**31) -> float:
    """Return the bytes per second, read and written, that a copy of `count` bytes moves."""
    source = torch.empty(count, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    contender = Contender(name="copy", call=lambda: target.copy_(source))
    row = Stopwatch(rounds=3, budget=20.0).row(Case(name="copy", contenders=[contender]))
    return 2 * count / (row.reading("copy").value * 1e-6)
