"""scripts/train.sh: the command it launches, read from DRY_RUN."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "scripts" / "train.sh"
BASH = shutil.which("bash") or "/bin/bash"
LAUNCH_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MC_MODULE",
    "NNODES",
    "NODE_RANK",
    "NPROC_PER_NODE",
    "OMP_NUM_THREADS",
    "TORCHDYNAMO_DISABLE",
)


def train(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as on a machine without a GPU, unless MC_GPU_COUNT says otherwise."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    settings = {"DRY_RUN": "1", "MC_RUNTIME": sys.executable, "MC_GPU_COUNT": "0"}
    return subprocess.run(
        [BASH, str(TRAIN), *flags],
        env=kept | settings | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def command(*flags: str, **variables: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the words of the command that would run."""
    result = train(*flags, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
    start = words.index(sys.executable)
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_without_a_gpu_one_process_gets_every_flag_and_cpu():
    settings, words = command("--seq-length", "256", "--save", "a folder")
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert value(words, "--nproc-per-node") == "1"
    plugin = words.index("megacontext_megatron.pretrain")
    assert words[plugin:] == [
        "megacontext_megatron.pretrain",
        *("--seq-length", "256", "--save", "a folder", "--cpu"),
    ]
    assert settings["TORCHDYNAMO_DISABLE"] == "1"
    assert settings["GLOO_SOCKET_IFNAME"] == "lo"


def test_cpu_is_not_added_twice():
    assert command("--cpu", "--seed", "1")[1].count("--cpu") == 1


def test_gpus_get_a_process_each():
    settings, words = command(MC_GPU_COUNT="4")
    assert value(words, "--nproc-per-node") == "4"
    assert "--cpu" not in words
    assert settings["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert settings.keys().isdisjoint({"TORCHDYNAMO_DISABLE", "GLOO_SOCKET_IFNAME"})


def test_cpu_is_obeyed_on_a_machine_with_gpus():
    settings, words = command("--cpu", MC_GPU_COUNT="4")
    assert value(words, "--nproc-per-node") == "1"
    assert settings["TORCHDYNAMO_DISABLE"] == "1"


def test_processes_and_module_can_be_chosen():
    _, words = command(NPROC_PER_NODE="2", MC_MODULE="megacontext_megatron.evaluate")
    assert value(words, "--nproc-per-node") == "2"
    assert "megacontext_megatron.evaluate" in words


def test_several_nodes():
    settings, words = command(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="400")
    flags = ("--nnodes", "--node-rank", "--master-addr", "--master-port")
    assert [value(words, flag) for flag in flags] == ["2", "1", "10.0.0.1", "400"]
    assert "GLOO_SOCKET_IFNAME" not in settings


@pytest.mark.parametrize("given", [{"NODE_RANK": "0"}, {"MASTER_ADDR": "10.0.0.1"}])
def test_several_nodes_without_their_meeting_place_are_refused(given: dict[str, str]):
    result = train(NNODES="2", **given)
    assert result.returncode == 1
    assert "MASTER_ADDR and NODE_RANK" in result.stderr


@pytest.mark.parametrize(("usable", "expected"), [("2", "2"), ("0", "1")])
def test_gpus_are_those_that_torch_can_use(tmp_path: Path, usable: str, expected: str):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: of some kind'\n")
    (tmp_path / "torch.py").write_text(
        f"class cuda:\n is_available = lambda: {usable} > 0\n device_count = lambda: {usable}\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    result = train(MC_GPU_COUNT="", PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(tmp_path))
    words = shlex.split(result.stdout)
    assert value(words, "--nproc-per-node") == expected
    assert ("--cpu" in words) == (usable == "0")
    assert ("PyTorch cannot use it" in result.stderr) == (usable == "0")


def test_runtime_without_megatron_is_refused(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    result = train(MC_RUNTIME=str(python))
    assert result.returncode == 1
    assert "lacks megatron-core" in result.stderr
