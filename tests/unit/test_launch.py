"""The harness itself: values, failures, timeouts, and that nothing outlives a request."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import zygote
from tests.corpus import EOD, MODULES
from tests.launch import call, tiny_flags, train
from tests.zygote_client import Zygote
from tests.zygote_client import zygote as running_zygote

FOREVER = 600
SOON = 20


def describe(greeting: str) -> dict[str, Any]:
    """Return what a rank knows of itself before and after it joins the others."""
    import torch
    import torch.distributed as dist

    fresh = not dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(total)
    return {
        "greeting": greeting,
        "fresh": fresh,
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "sum": total.item(),
        "folder": str(Path.cwd()),
        "parent": os.getppid(),
    }


def fail_in_rank_0(then: str) -> None:
    """Raise in rank 0, while rank 1 waits for it in the named way."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == 0:
        raise ValueError("rank zero is broken")
    if then == "sleep":
        sleep_forever()
    dist.barrier()


def sleep_forever() -> None:
    """Outlast every timeout of these tests."""
    time.sleep(FOREVER)


def die(number: int) -> None:
    """Die of a signal."""
    os.kill(os.getpid(), number)


def refuse() -> None:
    """Leave as argparse does."""
    print("pretrain: error: unrecognized arguments: --nonsense", file=sys.stderr)
    sys.exit(2)


def opaque() -> object:
    """Return what JSON cannot carry."""
    return object()


def leave_children(ending: str) -> None:
    """Start processes that would outlive the rank, then end in the named way."""
    sleeper = subprocess.Popen(["sleep", str(FOREVER)])
    _manager = multiprocessing.get_context("spawn").Manager()
    helpers = [child.pid for child in multiprocessing.active_children()]
    Path("children.json").write_text(json.dumps([sleeper.pid, *helpers]))
    if ending == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "timeout":
        sleep_forever()


def report_pid_forever() -> None:
    """Say which process this is, then sleep."""
    Path("pid.tmp").write_text(str(os.getpid()))
    Path("pid.tmp").rename("pid")
    sleep_forever()


def serve_and_vanish(culprit: str) -> bool:
    """Serve one endless request, then lose the client or the server: did the others end?"""
    ours, theirs = socket.socketpair()
    if (server := os.fork()) == 0:
        ours.close()
        zygote.main(theirs.fileno(), [])
        os._exit(0)
    theirs.close()
    function = f"{__name__}:report_pid_forever"
    request = {"function": function, "kwargs": {}, "ranks": 1, "workdir": ".", "timeout": FOREVER}
    with ours, ours.makefile("rw") as stream:
        stream.readline()
        print(json.dumps(request), file=stream, flush=True)
        assert comes_true(Path("pid").exists)
        rank = int(Path("pid").read_text())
        assert not gone(rank)
        if culprit == "server":
            os.kill(server, signal.SIGKILL)
    if culprit == "client":
        ours.close()
    ended = comes_true(lambda: gone(server) and gone(rank))
    if not ended:
        os.kill(server, signal.SIGKILL)
    return ended


def imitate_training(argv: list[str]) -> None:
    """Write the files that a training writes, with two steps."""
    from torch.utils.tensorboard import SummaryWriter

    assert argv == sys.argv[1:]
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    with SummaryWriter(options["--tensorboard-dir"]) as writer:
        for step, loss in enumerate([3.0, 2.5]):
            writer.add_scalar("lm loss", loss, step)
            writer.add_scalar("grad-norm", loss / 2, step)
    Path(options["--save"]).mkdir(exist_ok=True)
    Path(options["--save"], "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    print("intervals", options["--log-interval"], options["--tensorboard-log-interval"])
    sys.exit(0)


def watch(word: str) -> Callable[[], str]:
    """Stand for a hook that changes something before the command and looks at it afterwards."""
    seen = [word]
    return lambda: f"{seen[0]} {sys.argv[0]} {os.environ['RANK']}"


def read_documents(prefix: str) -> list[list[int]]:
    """Return the documents of an indexed data set."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [np.asarray(document).tolist() for document in IndexedDataset(prefix)]


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def comes_true(condition: Callable[[], bool]) -> bool:
    """Wait for a condition for some seconds."""
    deadline = time.monotonic() + SOON
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_values_come_back_by_rank(tmp_path: Path) -> None:
    """Three ranks of one server rendezvous, in the folder of the request."""
    result = call(describe, {"greeting": "hello"}, 3, workdir=tmp_path).check()
    assert [value.pop("rank") for value in result.values] == [0, 1, 2]
    assert all(value == result.values[0] for value in result.values)
    expected = {"greeting": "hello", "fresh": True, "world": 3, "sum": 6.0}
    server = {"folder": str(tmp_path), "parent": running_zygote().pid}
    assert result.values[0] == expected | server


@pytest.mark.parametrize("then", ["sleep", "barrier"])
def test_first_failure_is_blamed_and_ends_the_others(tmp_path: Path, then: str) -> None:
    """The error is rank 0's, whether rank 1 hangs or fails in consequence."""
    result = call(fail_in_rank_0, {"then": then}, 2, workdir=tmp_path)
    assert (result.returncode, result.error) == (1, "ValueError: rank zero is broken")
    assert result.seconds < SOON
    with pytest.raises(AssertionError, match=r"(?s)=== rank 1 ===.*=== rank 0 ===.*Traceback"):
        result.check()


def test_timeout_kills_and_shows_where_the_ranks_were(tmp_path: Path) -> None:
    """A hang ends after the timeout, with every rank's stack in the log."""
    result = call(sleep_forever, ranks=2, workdir=tmp_path, timeout=1)
    assert result.returncode == -signal.SIGKILL
    assert result.error.startswith("TimeoutError")
    assert 1 <= result.seconds < SOON
    assert result.log.count("in sleep_forever") == 2


@pytest.mark.parametrize(
    ("function", "kwargs", "code", "error"),
    [
        (die, {"number": signal.SIGABRT}, -signal.SIGABRT, "SIGABRT"),
        (refuse, {}, 2, "error: unrecognized arguments: --nonsense"),
        (opaque, {}, 1, "TypeError: Object of type object is not JSON serializable"),
        ("no.such:thing", {}, 1, "ModuleNotFoundError: No module named 'no'"),
    ],
)
def test_every_way_to_fail_has_a_code_and_an_error(
    tmp_path: Path, function: Any, kwargs: dict[str, Any], code: int, error: str
) -> None:
    """Signals, exits, values that cannot travel and bad paths are told apart."""
    result = call(function, kwargs, workdir=tmp_path)
    assert (result.returncode, result.error) == (code, error)


@pytest.mark.parametrize("ending", ["return", "crash", "timeout"])
def test_no_child_outlives_its_rank(tmp_path: Path, ending: str) -> None:
    """What a rank started ends with it, however it ends."""
    call(leave_children, {"ending": ending}, workdir=tmp_path, timeout=3)
    children = json.loads((tmp_path / "children.json").read_text())
    assert len(children) == 2
    assert comes_true(lambda: all(gone(pid) for pid in children))


@pytest.mark.parametrize("culprit", ["client", "server"])
def test_ranks_end_with_client_and_server(tmp_path: Path, culprit: str) -> None:
    """An interrupted test session leaves no rank behind."""
    result = call(serve_and_vanish, {"culprit": culprit}, workdir=tmp_path).check()
    assert result.values == (True,)


def test_dead_server_is_an_error_that_names_it(tmp_path: Path) -> None:
    """A request to a server that was killed does not hang."""
    server = Zygote(preload=())
    os.kill(server.pid, signal.SIGKILL)
    request = {"function": "os:getpid", "kwargs": {}, "ranks": 1, "workdir": str(tmp_path)}
    with pytest.raises(RuntimeError, match="server of the test ranks died"):
        server.request(**request, timeout=1)
    assert not server.alive


def test_server_forks_from_one_thread(tmp_path: Path) -> None:
    """A second thread in the server could hold a lock that no rank would ever see released."""
    call(describe, {"greeting": ""}, 2, workdir=tmp_path).check()
    assert len(list(Path(f"/proc/{running_zygote().pid}/task").iterdir())) == 1


def test_train_reads_scalars_metrics_and_hooks(tmp_path: Path) -> None:
    """The second run in one folder does not see the first one's scalars."""
    flags = ["--save", "saved", "--log-interval", "5"]
    for _ in range(2):
        result = train(
            flags,
            2,
            workdir=tmp_path,
            main=f"{__name__}:imitate_training",
            before=watch,
            before_kwargs={"word": "watched"},
        ).check()
    assert result.losses[:2] == [3.0, 2.5]
    assert len(result.losses) == len(result.grad_norms) == 4
    assert result.scalars("grad-norm")[:2] == [1.5, 1.25]
    assert result.metrics == [{"step": 1}, {"step": 2}]
    assert result.values == (f"watched {__name__} 0", f"watched {__name__} 1")
    assert "intervals 5 1" in result.log
    with pytest.raises(KeyError):
        result.scalars("no such tag")


def test_tiny_flags_are_overridden_by_name() -> None:
    """True is a bare flag, None removes one, a list gives several values."""
    flags = tiny_flags(seq_length=64, cpu=None, position_bias=["alibi", "t5"], bf16=True)
    assert "--cpu" in tiny_flags()
    assert "--cpu" not in flags
    start = flags.index("--position-bias")
    assert flags[start + 1 : start + 4] == ["alibi", "t5", "--bf16"]
    assert flags[flags.index("--max-position-embeddings") + 1] == "64"
    assert flags.count("--seq-length") == 1
    assert set(tiny_flags(strong=True)) - set(tiny_flags()) == {"--init-method-std", "0.15"}


def test_corpus_is_text_with_an_end_after_each_document(corpus: Path, tmp_path: Path) -> None:
    """About 300 kB of Python source."""
    [documents] = call(read_documents, {"prefix": str(corpus)}, workdir=tmp_path).check().values
    assert len(documents) == len(MODULES)
    assert all(document.index(EOD) == len(document) - 1 for document in documents)
    assert all("import" in bytes(document[:-1]).decode() for document in documents)
    assert 250_000 < sum(map(len, documents)) < 400_000
