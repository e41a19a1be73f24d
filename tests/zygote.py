"""A server that has imported everything slow and forks the ranks of each request.

``python -m tests.zygote FD MODULE...`` imports the modules and serves the socket FD: one JSON
request a line, one JSON reply a line.
Importing torch and Megatron takes seconds, a fork milliseconds. Only the standard library is
imported at the top, because Megatron's checkpoint writer starts 'spawn' helpers that import this
file again.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import json
import multiprocessing.util
import operator
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

GRACE_SECONDS = 2.0
PORT_DIGITS = 5
PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One function to run in every rank, and the seconds after which the ranks are killed."""

    function: str
    kwargs: Mapping[str, Any]
    ranks: int
    workdir: str
    timeout: float


def resolve(path: str) -> Any:
    """Return the object named ``module:qualified.name``."""
    module, _, name = path.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def main(descriptor: int, modules: Sequence[str]) -> None:
    """Import the modules, say so, then serve requests until the client closes its end."""
    start = time.monotonic()
    for module in modules:
        # A rank that needs a module that cannot be imported reports the error itself.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    # Collected pages would be copied in every rank.
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw") as stream:
        print(json.dumps({"import_seconds": time.monotonic() - start}), file=stream, flush=True)
        for line in stream:
            reply = run_ranks(Request(**json.loads(line)), connection)
            print(json.dumps(reply), file=stream, flush=True)


def run_ranks(request: Request, connection: socket.socket) -> dict[str, Any]:
    """Fork the ranks, wait for all of them, return exit codes and times in rank order."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    start = time.monotonic()
    reader, writer = os.pipe()
    pids = [_fork_rank(request, rank, (reader, writer), connection) for rank in range(request.ranks)]
    os.close(reader)
    # The server side lives here, as torchrun's does: its port is bound before any rank learns it.
    # It is started after the forks because it owns a thread.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, f"{store.port:0{PORT_DIGITS}d}".encode() * request.ranks)
    os.close(writer)
    exits, killed = _wait(pids, start + request.timeout, connection)
    return {
        "codes": [exits[pid][0] for pid in pids],
        "times": [exits[pid][1] for pid in pids],
        "killed": [pid in killed for pid in pids],
        "seconds": time.monotonic() - start,
    }


def _wait(pids: list[int], deadline: float, connection: socket.socket) -> tuple[dict[int, tuple[int, float]], set[int]]:
    """Reap all ranks; return (exit code, time) by pid and the pids killed after the deadline."""
    exits: dict[int, tuple[int, float]] = {}
    killed: set[int] = set()
    while alive := [pid for pid in pids if pid not in exits]:
        for pid in alive:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                # Before the rank is reaped, because then its number may be given to another group.
                _kill(pid)
                exits[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic()
                if exits[pid][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            killed = {pid for pid in pids if pid not in exits}
            _dump_and_kill(killed)
            deadline = float("inf")
        # The client sends nothing before the reply: readable means that it has gone.
        if select.select([connection], [], [], 0.01)[0]:
            for pid in pids:
                if pid not in exits:
                    _kill(pid)
            raise SystemExit("the client has gone")
    return exits, killed


def _dump_and_kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    time.sleep(0.3)
    for pid in pids:
        _kill(pid)


def _kill(pid: int) -> None:
    """Kill a rank and its children; a rank that has just been forked leads no group yet."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def _fork_rank(request: Request, rank: int, pipe: tuple[int, int], connection: socket.socket) -> int:
    zygote = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        # The group is what takes the rank's own children with it when the rank ends.
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        connection.close()
        os.close(pipe[1])
        _redirect_output(Path(request.workdir, f"rank{rank}.log"))
        port = os.read(pipe[0], PORT_DIGITS)
        os.close(pipe[0])
        if port and os.getppid() == zygote:
            code = _run_rank(request, rank, int(port))
    except BaseException:
        traceback.print_exc()
    _exit(code)


def _redirect_output(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)


def _run_rank(request: Request, rank: int, port: int) -> int:
    """Run the function, write its value or its error to rankN.json, return the exit code."""
    world = str(request.ranks)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=world,
        LOCAL_WORLD_SIZE=world,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    os.chdir(request.workdir)
    try:
        code, text = 0, json.dumps({"value": resolve(request.function)(**request.kwargs)})
    except BaseException as error:
        code, message = _explain(error)
        text = json.dumps({"error": message, "time": time.monotonic()})
    Path(f"rank{rank}.json").write_text(text)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """Report an uncaught exception as the interpreter does; return the exit code and one line."""
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
        return 1, f"{type(error).__name__}: {error}"
    if error.code is None or isinstance(error.code, int):
        return error.code or 0, ""
    print(error.code, file=sys.stderr)
    return 1, str(error.code)


def _exit(code: int) -> NoReturn:
    """End the rank as an interpreter would, without the zygote's own clean-up."""
    try:
        # Shuts down the checkpoint writer's helper process, which os._exit would orphan.
        multiprocessing.util._exit_function()  # pyright: ignore
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
