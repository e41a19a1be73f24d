"""scripts/environment.sh: which Python it takes, and when it installs."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
BASH = shutil.which("bash") or "/bin/bash"
FAILING_SHIM = """#!/bin/sh
echo "pyenv: ${0##*/}: command not found" >&2
exit 127
"""

# An in-tree build backend, so that pip and uv really install without a package index.
BACKEND = """
import tomllib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    project = tomllib.load(open("pyproject.toml", "rb"))["project"]
    metadata = "Metadata-Version: 2.1\\nName: small\\nVersion: 1\\nProvides-Extra: dev\\n"
    metadata += "".join(f"Requires-Dist: {need}\\n" for need in project["dependencies"])
    wheel = "Wheel-Version: 1.0\\nGenerator: small\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    files = {"small.py": "", "METADATA": metadata, "WHEEL": wheel}
    with zipfile.ZipFile(f"{folder}/small-1-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name if name.endswith(".py") else f"small-1.dist-info/{name}", text)
        record = "".join(f"{name},,\\n" for name in archive.namelist())
        archive.writestr("small-1.dist-info/RECORD", record + "small-1.dist-info/RECORD,,\\n")
    return "small-1-py3-none-any.whl"
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "small"
version = "1"
dependencies = []
optional-dependencies.dev = []
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_python(path: Path, version: tuple[int, int], before: str = "pass") -> Path:
    """A Python that runs what it is given with -c, but reports another version of itself."""
    start = f"import sys; sys.version_info = {(*version, 0, 'final', 0)}; {before}"
    command = shlex.join([sys.executable, "-c", f"{start}; exec(sys.argv[2])"])
    return write_program(path, f'#!/bin/sh\nexec {command} "$@"\n')


class Machine:
    """A copy of the scripts, and a PATH with nothing on it but what a test puts there."""

    def __init__(self, root: Path) -> None:
        self.repository = root / "a checkout"
        shutil.copytree(SCRIPTS, self.repository / "scripts")
        self.bin = root / "bin"
        self.later_bin = root / "later" / "bin"
        self.home = root / "home"
        tools = root / "tools"
        for folder in (self.bin, self.later_bin, self.home, tools):
            folder.mkdir(parents=True)
        for name in ("bash", "dirname", "flock", "grep", "nproc", "rm", "sed", "tail"):
            (tools / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name} here"))
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:{self.later_bin}:{tools}",
        }

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BASH, "-c", f"set -euo pipefail; source scripts/environment.sh; {script}"],
            cwd=self.repository,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def find_python(self, **environment: str) -> str:
        result = self.run("mc_find_python", **environment)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.removesuffix("\n")

    def refusal(self, script: str = "mc_find_python", **environment: str) -> str:
        result = self.run(script, **environment)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        assert result.stderr.endswith(".\n")
        return result.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_python_one_sentence_says_what_to_do(machine: Machine):
    message = machine.refusal("mc_setup")
    assert "No Python >= 3.12" in message
    assert "MC_PYTHON" in message
    assert not (machine.repository / ".venv").exists()


def test_python_that_is_too_old_is_refused(machine: Machine):
    write_python(machine.bin / "python3", (3, 11))
    assert "No Python >= 3.12" in machine.refusal()


def test_shim_that_fails_is_passed_over(machine: Machine):
    write_program(machine.bin / "python3.12", FAILING_SHIM)
    behind = write_python(machine.later_bin / "python3.12", (3, 12))
    assert machine.find_python() == str(behind)


def test_plain_python_is_judged_by_its_version(machine: Machine):
    write_python(machine.bin / "python3", (3, 9))
    newer = write_python(machine.later_bin / "python3", (3, 12))
    assert machine.find_python() == str(newer)


@pytest.mark.parametrize("told_by", ["PYENV_ROOT", "pyenv root", "home"])
def test_pyenv_behind_failing_shims(machine: Machine, tmp_path: Path, told_by: str):
    root = machine.home / ".pyenv" if told_by == "home" else tmp_path / "py env"
    for name in ("python3.12", "python3", "python"):
        write_program(machine.bin / name, FAILING_SHIM)
    write_python(root / "versions" / "3.11.7" / "bin" / "python", (3, 11))
    installed = write_python(root / "versions" / "3.12.1" / "bin" / "python", (3, 12))
    if told_by == "pyenv root":
        write_program(machine.bin / "pyenv", f'#!/bin/sh\n[ "$1" = root ] && echo "{root}"\n')
    environment = {"PYENV_ROOT": str(root)} if told_by == "PYENV_ROOT" else {}
    assert machine.find_python(**environment) == str(installed)


def test_python_known_to_uv_only(machine: Machine, tmp_path: Path):
    managed = write_python(tmp_path / "managed" / "python", (3, 13))
    write_program(
        machine.bin / "uv",
        f'#!/bin/sh\n[ "$1 $2 $3" = "python find >=3.12" ] && echo "{managed}"\n',
    )
    assert machine.find_python() == str(managed)


@pytest.mark.parametrize(("near", "far"), [((3, 13), (3, 12)), ((3, 14), (3, 13))])
def test_version_with_wheels_is_preferred(machine: Machine, near: tuple, far: tuple):
    write_python(machine.bin / f"python3.{near[1]}", near)
    preferred = write_python(machine.home / ".pyenv/versions/x/bin/python", far)
    assert machine.find_python() == str(preferred)


def test_newer_version_is_taken_when_it_is_the_only_one(machine: Machine):
    only = write_python(machine.bin / "python3", (3, 15))
    assert machine.find_python() == str(only)


def test_python_without_ensurepip_needs_uv(machine: Machine):
    python = write_python(machine.bin / "python3.12", (3, 12), 'sys.modules["ensurepip"] = None')
    assert "python3.12-venv" in machine.refusal()
    write_program(machine.bin / "uv", "#!/bin/sh\nexit 1\n")
    assert machine.find_python() == str(python)


def test_mc_python_comes_first(machine: Machine, tmp_path: Path):
    write_python(machine.bin / "python3.12", (3, 12))
    chosen = write_python(tmp_path / "chosen", (3, 14))
    assert machine.find_python(MC_PYTHON=str(chosen)) == str(chosen)


@pytest.mark.parametrize("given", ["missing", "old"])
def test_mc_python_that_does_not_do_is_not_replaced(machine: Machine, tmp_path: Path, given: str):
    write_python(machine.bin / "python3.12", (3, 12))
    write_python(tmp_path / "old", (3, 11))
    assert "MC_PYTHON=" in machine.refusal(MC_PYTHON=str(tmp_path / given))


def test_active_venv_is_not_made_from_itself(machine: Machine):
    own = write_python(machine.repository / ".venv" / "bin" / "python3.12", (3, 12))
    machine.refusal(PATH=f"{own.parent}:{machine.environment['PATH']}")


def test_venv_of_an_old_python_is_left_alone(machine: Machine):
    own = write_python(machine.repository / ".venv" / "bin" / "python", (3, 11))
    assert "remove it" in machine.refusal("mc_setup")
    assert own.exists()


def test_cpu_settings(machine: Machine):
    names = "$TORCHDYNAMO_DISABLE $CUDA_DEVICE_MAX_CONNECTIONS $GLOO_SOCKET_IFNAME $OMP_NUM_THREADS"
    threads = max(1, min(8, len(os.sched_getaffinity(0))))
    assert machine.run(f"mc_use_cpu; echo {names}").stdout == f"1 1 lo {threads}\n"
    assert machine.run(f"mc_use_cpu 9999; echo {names}").stdout == "1 1 lo 1\n"
    given = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "3"}
    assert machine.run(f"mc_use_cpu; echo {names}", **given).stdout == "1 1 eth0 3\n"


def test_gpu_settings_leave_compilation_and_networks_alone(machine: Machine):
    names = "$CUDA_DEVICE_MAX_CONNECTIONS ${TORCHDYNAMO_DISABLE-} ${GLOO_SOCKET_IFNAME-}"
    assert machine.run(f'mc_use_gpu; echo "{names}"').stdout == "1  \n"


@pytest.fixture
def small_project(machine: Machine) -> Machine:
    (machine.repository / "backend.py").write_text(BACKEND)
    (machine.repository / "pyproject.toml").write_text(PYPROJECT)
    machine.environment |= {"MC_PYTHON": sys.executable, "PIP_RETRIES": "0", "PIP_NO_INDEX": "1"}
    return machine


@pytest.mark.full
def test_installs_once_and_again_after_changes_and_failures(small_project: Machine):
    project = small_project.repository / "pyproject.toml"
    assert "Installing the project into .venv" in small_project.run("mc_setup").stderr
    assert small_project.run('"$(mc_python)" -c "import small"').returncode == 0
    assert small_project.run("mc_setup").stderr == ""

    assert "with dev" in small_project.run("mc_setup dev").stderr
    assert small_project.run("mc_setup; mc_setup dev").stderr == ""

    unreachable = "missing @ http://127.0.0.1:9/missing-1-py3-none-any.whl"
    project.write_text(PYPROJECT.replace("dependencies = []\nopt", f'dependencies = ["{unreachable}"]\nopt'))
    for _ in range(2):
        failed = small_project.run("mc_setup; echo reached")
        assert (failed.returncode, failed.stdout) == (1, "")
        assert "Installing into .venv failed" in failed.stderr
        assert "127.0.0.1" not in failed.stderr
        assert "127.0.0.1" in (small_project.repository / ".venv" / "install.log").read_text()

    project.write_text(PYPROJECT)
    assert "Installed in" in small_project.run("mc_setup").stderr
    assert "with dev" in small_project.run("mc_setup dev").stderr


@pytest.mark.full
def test_venv_that_does_not_run_is_made_anew(small_project: Machine):
    write_program(small_project.repository / ".venv" / "bin" / "python", FAILING_SHIM)
    assert small_project.run("mc_setup; mc_check_installed").returncode == 0


@pytest.mark.full
def test_two_set_ups_at_once_install_once(small_project: Machine):
    processes = [small_project.start("mc_setup") for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(said).count("Installing") == 1
