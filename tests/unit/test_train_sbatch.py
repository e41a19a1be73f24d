"""scripts/train.sbatch under a SLURM of two nodes that are this machine: srun and scontrol stand on PATH.

As SLURM's own with cgroups, this srun hands a signal to the task of each node and to nothing that a task has started;
with SIGNAL_GROUP, as without cgroups, to its process group.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_flags

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash") or "/bin/bash"
OWN = ("MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NPROC_PER_NODE", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")

SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
record = os.path.join(os.path.dirname(sys.argv[0]), "srun.txt")
nodes = int(words[words.index("--nodes") + 1])
command = words[words.index("bash"):]
with open(record, "a") as stream:
    stream.write("\\t".join(words[: words.index("bash")]) + "\\n")
group = "SIGNAL_GROUP" in os.environ
# each node's lines stay whole
said = [open(f"{record}.{node}", "w+") for node in range(nodes)]
tasks = [
    subprocess.Popen(
        command, env={**os.environ, "SLURM_NODEID": str(node)}, start_new_session=group, stdout=out, stderr=out
    )
    for node, out in enumerate(said)
]
send = os.killpg if group else os.kill
signal.signal(signal.SIGUSR1, lambda *_: [send(task.pid, signal.SIGUSR1) for task in tasks])
code = max(task.wait() for task in tasks)
for out in said:
    out.seek(0)
    sys.stdout.write(out.read())
sys.exit(code)
"""
SCONTROL = """
import os, sys
record = os.path.join(os.path.dirname(sys.argv[0]), "scontrol.txt")
with open(record, "a") as stream:
    stream.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1:] == ["show", "hostnames", "node[1-2]"]:
    print("127.0.0.1\\nsecond")
"""
# A launcher that, as torchrun, hands no USR1 on, and a worker in a session of its own that ends well by it alone.
LAUNCHER = """
import pathlib, signal, subprocess, sys
worker = '''
import pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
'''
started = subprocess.Popen([sys.executable, "-c", worker, sys.argv[1]], start_new_session=True)
sys.exit(started.wait())
"""


class Slurm:
    """A job of two nodes; `record` is what a stand-in was called with."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (self.bin / name).write_text(f"#!{sys.executable}\n{text}")
            (self.bin / name).chmod(0o755)
        # where SLURM puts its copy
        self.script = folder / "spool" / "slurm_script"
        self.script.parent.mkdir()
        shutil.copy(ROOT / "scripts" / "train.sbatch", self.script)
        kept = {name: value for name, value in os.environ.items() if name not in OWN}
        self.environment = kept | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "MC_RUNTIME": sys.executable,
            "MC_GPU_COUNT": "0",
        }
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        job = subprocess.Popen(
            [BASH, str(self.script), *words],
            cwd=self.script.parent,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(job)
        return job

    def run(self, *words: str, **variables: str) -> tuple[int, str]:
        """The exit code and all that was printed."""
        job = self.start(*words, **variables)
        said, _ = job.communicate(timeout=60)
        return job.returncode, said

    def record(self, name: str) -> list[str]:
        path = self.bin / f"{name}.txt"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    job = Slurm(tmp_path)
    yield job
    for process in job.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def commands(said: str) -> list[tuple[dict[str, str], list[str]]]:
    """The environment and the words of the command of each node, in the order of their ranks."""
    found = []
    for line in said.splitlines():
        words = shlex.split(line)
        start = words.index(sys.executable)
        found.append((dict(word.split("=", 1) for word in words[:start]), words[start:]))
    return sorted(found, key=lambda command: value(command[1], "--node-rank"))


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def wait_for(happened: Callable[[], object], seconds: float, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert job.poll() is None, job.communicate()[0][-4000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_every_node_starts_the_same_with_its_rank(slurm: Slurm):
    flags = ["--seq-length", "256", "--save", "a folder"]
    code, said = slurm.run(*flags, DRY_RUN="1")
    assert code == 0, said
    both = commands(said)
    assert [value(words, "--node-rank") for _, words in both] == ["0", "1"]
    for _, words in both:
        meeting = [value(words, flag) for flag in ("--nnodes", "--master-addr", "--master-port")]
        assert meeting == ["2", "127.0.0.1", "22345"]
        plugin = words.index("megacontext_megatron.pretrain")
        own = ["--exit-signal-handler", "--exit-signal", "SIGUSR1", "--load", "a folder"]
        assert words[plugin + 1 :] == [*flags, *own, "--cpu"]
    assert slurm.record("srun") == ["\t".join(["--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"])]
    # nothing has told the job to stop
    assert slurm.record("scontrol") == ["show hostnames node[1-2]"]


def test_ports_cores_and_checkpoints_can_be_chosen(slurm: Slurm):
    given = {"MASTER_PORT": "400", "SLURM_CPUS_PER_TASK": "6"}
    code, said = slurm.run("--save=new", "--load", "old", DRY_RUN="1", **given)
    assert code == 0, said
    for _, words in commands(said):
        assert value(words, "--master-port") == "400"
        assert words.count("--load") == 1
    assert slurm.record("srun")[0].endswith("--cpus-per-task\t6")


def test_older_names_of_nodes_are_understood(slurm: Slurm):
    for new, old in (("SLURM_JOB_NODELIST", "SLURM_NODELIST"), ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")):
        slurm.environment[old] = slurm.environment.pop(new)
    code, said = slurm.run("--save", "x", DRY_RUN="1")
    assert (code, len(commands(said))) == (0, 2), said


def test_the_recipe_takes_the_place_of_train_sh(slurm: Slurm):
    data = {"TRAIN_DATA": "text", "VALID_DATA": "text", "OUT": "somewhere"}
    code, said = slurm.run("examples/grape_recipe.sh", "--seed", "7", DRY_RUN="1", **data)
    assert code == 0, said
    for rank, (_, words) in enumerate(commands(said)):
        assert value(words, "--node-rank") == str(rank)
        assert value(words, "--save") == value(words, "--load") == "somewhere"
        assert "--grape-a" in words
        assert words.index("--exit-signal-handler") > words.index("7")


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["--seed", "1"], {}, "--save is needed"),
        (["--save", "x"], {"SLURM_JOB_ID": ""}, "submit it with sbatch"),
        (["--save", "x"], {"SLURM_SUBMIT_DIR": "/"}, "submit from the repository's root"),
    ],
)
def test_what_cannot_start_is_refused(slurm: Slurm, words: list[str], variables: dict[str, str], message: str):
    code, said = slurm.run(*words, **variables)
    assert code == 1
    assert message in said
    assert said.count("\n") == 1
    assert not slurm.record("srun")


def test_a_failure_is_passed_on_and_not_queued_again(slurm: Slurm, tmp_path: Path):
    failing = tmp_path / "failing.sh"
    failing.write_text("[[ $NODE_RANK == 1 ]] && exit 3\nexit 0\n")
    assert slurm.run(str(failing))[0] == 3
    assert len(slurm.record("scontrol")) == 1


@pytest.mark.parametrize("srun", [{}, {"SIGNAL_GROUP": "1"}], ids=["to tasks", "to their groups"])
def test_the_signal_reaches_the_workers_of_all_nodes_and_the_job_is_queued_again(
    slurm: Slurm, tmp_path: Path, srun: dict[str, str]
):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    script = tmp_path / "launch.sh"
    script.write_text(f'exec {shlex.quote(sys.executable)} {tmp_path}/launcher.py "{tmp_path}/ready$NODE_RANK"\n')
    job = slurm.start(str(script), **srun)
    wait_for(lambda: all((tmp_path / f"ready{node}").exists() for node in "01"), 30, job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 0, said
    assert slurm.record("scontrol")[1:] == ["requeue 12345"]


@pytest.mark.full
def test_two_nodes_train_stop_with_a_checkpoint_and_go_on(slurm: Slurm, corpus: Path, tmp_path: Path):
    save = tmp_path / "save"
    data = {"data_path": corpus, "data_cache_path": tmp_path / "cache", "save": save, "save_interval": 10**6}
    # the time limit is for processes that a failed test leaves behind
    ends = {"train_iters": 10**6, "lr_decay_iters": 100, "exit_duration_in_mins": 5}
    flags = tiny_flags(num_layers=1, log_interval=1, **ends, **data)
    settings = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MASTER_PORT": ""}
    found = []
    for start in range(2):
        log = tmp_path / f"log{start}"
        script = tmp_path / "launch.sh"
        script.write_text(f'exec bash {ROOT}/scripts/train.sh "$@" >>{log}.$NODE_RANK 2>&1\n')
        job = slurm.start(str(script), *flags, **settings)
        wait_for(lambda log=log: steps(log), 120, job)
        job.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 0, said
        found.append((steps(log), int((save / "latest_checkpointed_iteration.txt").read_text())))
    (first, saved), (second, last) = found
    assert first[0] == 1
    assert saved == first[-1]
    # nothing is done twice or left out
    assert second[0] == saved + 1
    assert last == second[-1]
    assert slurm.record("scontrol")[1::2] == ["requeue 12345"] * 2


def steps(log: Path) -> list[int]:
    """The iterations that the nodes have printed, the last rank's node does."""
    texts = [path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*"))]
    return [int(step) for text in texts for step in re.findall(r"\biteration +(\d+)/", text)]
