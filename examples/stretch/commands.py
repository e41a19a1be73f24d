"""The plugin's commands, each in a process of its own as a single rank, its output in a log."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import connection, forkserver
from pathlib import Path

from megacontext_megatron.config import ConfigError

ROOT = Path(__file__).parents[2]
PACKAGE = "megacontext_megatron"
PRELOADED = (
    "torch.utils.tensorboard",
    "megatron.training.training",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_layer_specs",
    f"{PACKAGE}.pretrain",
)
"""Modules whose import takes most of a short command's time, and which none of its flags changes."""

ALONE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
}
ONE_CORE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
ON_CPU = {"TORCHDYNAMO_DISABLE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONWARNINGS": "ignore"}
"""Environment of the process that others are forked off: nothing may touch CUDA there, nor speak between our lines."""


class Commands:
    """Runs commands; without a GPU they are forked off a process that has imported what they need.

    A table needs about a hundred commands of a second each, behind eight seconds of imports.
    """

    def __init__(self, *, cpu: bool) -> None:
        # A process that has imported Transformer Engine cannot run without a GPU: such commands refuse it first.
        self._forks = cpu and find_spec("transformer_engine") is None and sys.platform == "linux"
        self._context = multiprocessing.get_context("forkserver")
        self._asking = threading.Lock()
        if self._forks:
            self._context.set_forkserver_preload(list(PRELOADED))
            # The server keeps the environment it starts in, and threads are counted when torch is imported.
            with _environment({**environment(), **ON_CPU}):
                forkserver.ensure_running()

    def __call__(self, module: str, line: Sequence[str], log: Path) -> float:
        """Run `python -m megacontext_megatron.MODULE` and return its seconds.

        Raises ConfigError, naming the log, if it fails.
        """
        started = time.monotonic()
        with log.open("w") as stream:
            stream.write(" ".join(["python", "-m", f"{PACKAGE}.{module}", *line]) + "\n")
        run = self._forked if self._forks else self._launched
        code = run(module, line, log)
        if code:
            raise ConfigError(f"{module} ended with {code}: read {log}.")
        return time.monotonic() - started

    def _forked(self, module: str, line: Sequence[str], log: Path) -> int | None:
        process = self._context.Process(target=run_here, args=(module, list(line), log))
        # A start asks all processes whether they have ended, and only one thread may ask at a time.
        with self._asking:
            process.start()
        connection.wait([process.sentinel])
        with self._asking:
            process.join()
        return process.exitcode

    @staticmethod
    def _launched(module: str, line: Sequence[str], log: Path) -> int:
        command = [sys.executable, "-m", f"{PACKAGE}.{module}", *line]
        with log.open("a") as stream:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(), stdout=stream, stderr=subprocess.STDOUT, check=False
            )
        return done.returncode


def environment() -> dict[str, str]:
    """Return the environment of a single rank on one core."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**ONE_CORE, **os.environ, **ALONE, "PYTHONPATH": path}


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_here(module: str, line: Sequence[str], log: Path) -> None:
    """Run a command in this process, which is its own, with its output behind what `log` holds."""
    os.environ.update(environment())
    os.chdir(ROOT)
    with log.open("a") as stream:
        for number in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(stream.fileno(), number)
    import_module(f"{PACKAGE}.{module}").main(line)
