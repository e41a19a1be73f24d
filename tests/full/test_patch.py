"""The patch that makes Megatron-LM's `pretrain_gpt.py` hand over to the plugin.

The tests that need a Megatron-LM checkout take it from the environment variable MEGATRON_LM_TREE
and are skipped without it.  They work on a copy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

REPOSITORY = Path(__file__).parents[2]
PATCH = REPOSITORY / "patches" / "megatron-lm-core_v0.19.0.patch"
SCRIPT = "pretrain_gpt.py"
PLUGIN_HELP = ("--cpu", "--position-embedding-type", "gaussian_rope", "--help")
# Ends a stock run while its arguments are parsed; Megatron's own --help fails on a percent sign.
STOCK_REFUSAL = ("--position-embedding-type", "nonsense")
TIMEOUT_SECONDS = 180


def git(*arguments: str, cwd: Path) -> str:
    """Return what a git command prints, run in `cwd` as if no repository lay around it."""
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    environment["GIT_CEILING_DIRECTORIES"] = str(cwd.parent)
    done = subprocess.run(["git", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script that can import this repository, without a launcher's variables."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *arguments],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def inserted_lines() -> str:
    """Return the lines that the patch adds, as source."""
    hunk = re.split(r"^@@ .*\n", PATCH.read_text(), maxsplit=1, flags=re.MULTILINE)[1]
    return "".join(line[1:] for line in hunk.splitlines(keepends=True) if line.startswith("+"))


@pytest.fixture(scope="module")
def stock_tree() -> Path:
    """Return the Megatron-LM checkout, once its script is known to be the one that is patched."""
    given = os.environ.get("MEGATRON_LM_TREE")
    if not given:
        pytest.skip("MEGATRON_LM_TREE names no Megatron-LM checkout")
    tree = Path(given).resolve()
    expected = re.search(r"^index ([0-9a-f]{40})\.\.", PATCH.read_text(), re.MULTILINE)
    assert expected is not None
    found = git("hash-object", SCRIPT, cwd=tree).strip()
    assert found == expected[1], f"{tree / SCRIPT} is not the tag's that {PATCH.name} names"
    return tree


@pytest.fixture(scope="module")
def patched_tree(stock_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a patched copy of the checkout's Python code, without compiled files."""
    copy = tmp_path_factory.mktemp("patched") / "Megatron-LM"
    copy.mkdir()
    for script in stock_tree.glob("*.py"):
        shutil.copy(script, copy)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(stock_tree / "megatron", copy / "megatron", ignore=ignored)
    git("apply", str(PATCH), cwd=copy)
    return copy


def test_only_inserts() -> None:
    """The patch is whole, touches one file and removes nothing."""
    added, removed, name = git("apply", "--numstat", str(PATCH), cwd=REPOSITORY).split()
    assert name == SCRIPT
    assert int(removed) == 0
    assert int(added) == len(inserted_lines().splitlines()) > 0


def test_asked_for_hands_over(tmp_path: Path) -> None:
    """With one of our encodings the inserted lines run the plugin and nothing after them."""
    script = tmp_path / SCRIPT
    script.write_text(inserted_lines() + "print('went on')\n")
    done = run_script(script, *PLUGIN_HELP)
    assert done.returncode == 0, done.stderr
    assert "--mc-source-length" in done.stdout
    assert "went on" not in done.stdout


def test_not_asked_for_goes_on_untouched(tmp_path: Path) -> None:
    """Without our flags the inserted lines print nothing and load neither torch nor Megatron."""
    script = tmp_path / SCRIPT
    report = "print(sorted({'torch', 'megatron'} & set(sys.modules)))\n"
    script.write_text(inserted_lines() + report)
    done = run_script(script, "--position-embedding-type", "rope", "--num-layers", "2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_reimport_goes_on(tmp_path: Path) -> None:
    """A helper process that imports the script again does not start the plugin."""
    module = tmp_path / SCRIPT
    module.write_text(inserted_lines())
    script = tmp_path / "again.py"
    script.write_text("import sys, pretrain_gpt\nprint('megacontext_megatron' in sys.modules)\n")
    done = run_script(script, *PLUGIN_HELP)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_tree_plugin_help(patched_tree: Path) -> None:
    """The patched script shows the plugin's flags beside those of the checkout's own Megatron."""
    done = run_script(patched_tree / SCRIPT, *PLUGIN_HELP)
    assert done.returncode == 0, done.stderr
    assert "--mc-source-length" in done.stdout
    assert "--tensor-model-parallel-size" in done.stdout
    assert (patched_tree / "megatron" / "training" / "__pycache__").is_dir()


def test_tree_stock_run_unchanged(patched_tree: Path, tmp_path: Path) -> None:
    """Without our flags the patched script prints what the reverted one prints."""
    reverted = tmp_path / "Megatron-LM"
    shutil.copytree(patched_tree, reverted, ignore=shutil.ignore_patterns("__pycache__"))
    git("apply", "-R", str(PATCH), cwd=reverted)
    patched = run_script(patched_tree / SCRIPT, *STOCK_REFUSAL)
    stock = run_script(reverted / SCRIPT, *STOCK_REFUSAL)
    assert stock.returncode == 2, stock.stderr
    assert (patched.returncode, patched.stdout) == (stock.returncode, stock.stdout)
    assert patched.stderr.splitlines()[-1] == stock.stderr.splitlines()[-1]


def test_tree_revert_restores(patched_tree: Path, stock_tree: Path, tmp_path: Path) -> None:
    """Reverting gives back the tag's file byte for byte."""
    copy = tmp_path / "tree"
    copy.mkdir()
    shutil.copy(patched_tree / SCRIPT, copy)
    assert (copy / SCRIPT).read_bytes() != (stock_tree / SCRIPT).read_bytes()
    git("apply", "-R", str(PATCH), cwd=copy)
    assert (copy / SCRIPT).read_bytes() == (stock_tree / SCRIPT).read_bytes()
