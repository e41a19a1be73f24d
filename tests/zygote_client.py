"""The client of ``tests.zygote``: one server a session, started at first use."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Asks NVML whether there is a GPU: a CUDA call before the fork would break the ranks.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
}
PRELOAD = (
    "torch.distributed.nn",
    "torch.utils.tensorboard",
    "megatron.training.training",
    "megatron.core.tokenizers.text.models",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megacontext_megatron.pretrain",
)
START_TIMEOUT = 300.0
REPLY_MARGIN = 60.0
LOG_TAIL = 4000


class Zygote:
    """The client's end of one server process."""

    def __init__(self, preload: Sequence[str] = PRELOAD) -> None:
        """Start the server and wait until it has imported ``preload``; RuntimeError if it dies."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote", str(theirs.fileno()), *preload],
                cwd=Path(__file__).parents[1],
                env={**os.environ, **ENVIRONMENT},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._stream = self._socket.makefile("rw")
        self.pid = self._process.pid
        self.import_seconds: float = self._exchange(None, START_TIMEOUT)["import_seconds"]

    @property
    def alive(self) -> bool:
        """Whether another request can be made."""
        return self._process.poll() is None

    def request(self, *, timeout: float, **fields: Any) -> dict[str, Any]:
        """Run ``tests.zygote.Request(timeout=timeout, **fields)`` and return the reply."""
        return self._exchange({"timeout": timeout, **fields}, timeout + REPLY_MARGIN)

    def close(self) -> None:
        """End the server, and with it every rank that still runs."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _exchange(self, message: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        try:
            self._socket.settimeout(timeout)
            if message is not None:
                print(json.dumps(message), file=self._stream, flush=True)
            line = self._stream.readline()
        except ConnectionError:
            line = ""
        except BaseException:
            # A reply that arrives later would answer the next request.
            self.close()
            raise
        if line:
            return json.loads(line)
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        self.close()
        raise RuntimeError("the server of the test ranks died:\n" + log[-LOG_TAIL:])


@functools.cache
def _running() -> Zygote:
    return Zygote()


def zygote() -> Zygote:
    """Return the running server; start it at first use and after it died."""
    if not _running().alive:
        _running.cache_clear()
    return _running()


def shutdown() -> None:
    """End the server if it was started."""
    if _running.cache_info().currsize:
        if _running().alive:
            _running().close()
        _running.cache_clear()
