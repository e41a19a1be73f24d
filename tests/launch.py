"""Run functions and whole trainings in real ranks, forked from one process.

``call`` runs any function, ``train`` runs the training command: with gloo over loopback, or each rank on the GPU of its
number.  The server that forks the ranks is started at first use (``tests.zygote_client``).
"""

import atexit
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.tiny import tiny_flags
from tests.zygote import resolve
from tests.zygote_client import Zygote, zygote

__all__ = ["CallResult", "TrainResult", "call", "tiny_flags", "train"]

LOG_TAIL_LINES = 60
MAIN = "megacontext_megatron.pretrain:main"
ERROR_LINE = re.compile(r"^.*?\b((?:[\w.]*(?:Error|Exception)|error): .*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallResult:
    """What all ranks did: code, error and end of the log are those of the first rank that failed."""

    returncode: int
    values: tuple[Any, ...]
    log: str
    error: str
    seconds: float

    def check(self) -> Self:
        """Return self; AssertionError with the end of the log if any rank failed."""
        if self.returncode:
            tail = "\n".join(self.log.splitlines()[-LOG_TAIL_LINES:])
            raise AssertionError(f"exit code {self.returncode}: {self.error}\n{tail}")
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult(CallResult):
    """One training. ``values`` holds what the finishers of the ``before`` hooks returned."""

    tensorboard_dir: Path
    save_dir: Path | None

    @functools.cached_property
    def _scalars(self) -> dict[str, list[float]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.tensorboard_dir), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def tags(self, prefix: str) -> list[str]:
        """Return the tags of all TensorBoard scalars that start with `prefix`, sorted."""
        return sorted(tag for tag in self._scalars if tag.startswith(prefix))

    def scalars(self, tag: str) -> list[float]:
        """Return a tag's TensorBoard scalars, one per logged step; KeyError if it has none."""
        return self._scalars[tag]

    @property
    def losses(self) -> list[float]:
        """The training loss of every step, nats per token."""
        return self.scalars("lm loss")

    @property
    def grad_norms(self) -> list[float]:
        """The gradient norm of every step, before clipping."""
        return self.scalars("grad-norm")

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl beside the checkpoints; empty without ``--save``."""
        path = self.save_dir and self.save_dir / "metrics.jsonl"
        if not path or not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]


def call(
    function: str | Callable[..., Any],
    kwargs: Mapping[str, Any] | None = None,
    ranks: int = 1,
    *,
    workdir: Path,
    timeout: float = 180,
    bare: bool = False,
) -> CallResult:
    """Run an importable function in forked ranks; its arguments and values travel as JSON.

    ``bare`` ranks have imported nothing yet, which takes them seconds; MC_BARE_RANKS=1 makes all of them so, where a
    package touches the GPU when it is imported, which no process that forks may do.

    torch.distributed is not initialised, but RANK, WORLD_SIZE, MASTER_ADDR and the like are set.
    The ranks run in ``workdir`` and write rankN.log and rankN.json there. When one fails the
    others are killed after a short grace, after ``timeout`` seconds all of them are.
    """
    if not isinstance(function, str):
        function = f"{function.__module__}:{function.__qualname__}"
    workdir.mkdir(parents=True, exist_ok=True)
    for stale in (*workdir.glob("rank*.log"), *workdir.glob("rank*.json")):
        stale.unlink()
    server = bare_zygote() if bare or os.environ.get("MC_BARE_RANKS") == "1" else zygote()
    reply = server.request(
        function=function,
        kwargs=dict(kwargs or {}),
        ranks=ranks,
        workdir=str(workdir.resolve()),
        timeout=timeout,
    )
    logs = [_read(workdir / f"rank{rank}.log") for rank in range(ranks)]
    records = [json.loads(_read(workdir / f"rank{rank}.json") or "{}") for rank in range(ranks)]
    culprit = _first_failure(reply, records)
    culprit_last = sorted(range(ranks), key=lambda rank: rank == culprit)
    return CallResult(
        returncode=0 if culprit is None else reply["codes"][culprit],
        values=tuple(record.get("value") for record in records),
        log="".join(f"=== rank {rank} ===\n{logs[rank]}\n" for rank in culprit_last),
        error="" if culprit is None else _error(culprit, reply, records[culprit], logs[culprit]),
        seconds=reply["seconds"],
    )


def train(
    flags: Sequence[str],
    ranks: int = 1,
    *,
    workdir: Path,
    before: str | Callable[..., Any] | None = None,
    before_kwargs: Mapping[str, Any] | None = None,
    main: str = MAIN,
    **options: Any,
) -> TrainResult:
    """Run the training command in forked ranks, writing every step's scalars; ``options`` are those of ``call``.

    ``before`` is called in every rank before the command, with ``before_kwargs``. If it returns a
    function, that is called after the command and its value is the rank's in ``values``.
    """
    argv = list(flags)
    if not (tensorboard_dir := _value(argv, "--tensorboard-dir")):
        tensorboard_dir = str(workdir.resolve() / "tb")
        shutil.rmtree(tensorboard_dir, ignore_errors=True)
        argv += ["--tensorboard-dir", tensorboard_dir]
    for interval in ("--tensorboard-log-interval", "--log-interval"):
        if not _value(argv, interval):
            argv += [interval, "1"]
    if before is not None and not isinstance(before, str):
        before = f"{before.__module__}:{before.__qualname__}"
    kwargs = {"main": main, "argv": argv, "before": before, "kwargs": dict(before_kwargs or {})}
    result = call(run_main, kwargs, ranks, workdir=workdir, **options)
    save = _value(argv, "--save")
    return TrainResult(
        **vars(result),
        tensorboard_dir=Path(tensorboard_dir),
        save_dir=workdir / save if save else None,
    )


def run_main(main: str, argv: list[str], before: str | None, kwargs: dict[str, Any]) -> Any:
    """Run the hook, then the command as if started with ``argv``: the body of a training rank."""
    finish = resolve(before)(**kwargs) if before else None
    sys.argv = [main.partition(":")[0], *argv]
    try:
        resolve(main)(argv)
    except SystemExit as stop:
        if stop.code:
            raise
    return finish() if callable(finish) else None


@functools.cache
def _bare_zygote() -> Zygote:
    server = Zygote(preload=())
    atexit.register(server.close)
    return server


def bare_zygote() -> Zygote:
    """Return the running server that has imported nothing; start it at first use and after it died."""
    if not _bare_zygote().alive:
        _bare_zygote.cache_clear()
    return _bare_zygote()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _value(argv: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag, given as one argument or two."""
    value = None
    for index, argument in enumerate(argv):
        if argument == flag:
            value = argv[index + 1]
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value


def _first_failure(reply: dict[str, Any], records: Sequence[dict[str, Any]]) -> int | None:
    """Return the rank that failed first: those that the server killed come last."""
    failed = [rank for rank, code in enumerate(reply["codes"]) if code]
    order = {rank: (reply["killed"][rank], records[rank].get("time", reply["times"][rank])) for rank in failed}
    return min(failed, key=order.__getitem__, default=None)


def _error(rank: int, reply: dict[str, Any], record: dict[str, Any], log: str) -> str:
    if message := record.get("error"):
        return message
    if reply["killed"][rank]:
        return f"TimeoutError: the ranks had not ended after {reply['seconds']:.0f} s"
    if (code := reply["codes"][rank]) < 0:
        return signal.Signals(-code).name
    found = ERROR_LINE.findall(log)
    return found[-1] if found else f"exit code {code}"
