"""The package follows the data: a stage imports only stages before it, and the command loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "megacontext_megatron"
ROOT = Path(__file__).parents[2] / PACKAGE
STAGES = (
    "data",
    "spans",
    "context",
    "position",
    "kernels",
    "attention",
    "model",
    "cache",
    "telemetry",
    "retrofit",
)
ANYWHERE = {"attention_config", "config", "encoding_config", "encoding_flags"}
LIGHT = (
    *("__init__", "argv", "attention_config", "config", "encoding_config"),
    *("doctor", "evaluate", "pretrain", "teacher"),
)
"""Top-level files that other processes import before torch may be loaded."""
HEAVY = ("torch", "megatron")
LONGEST_FILE = 400

FILES = sorted(ROOT.rglob("*.py"))
STAGE_FILES = [path for path in FILES if path.parent != ROOT]


def imports(tree):
    """Return every module that a syntax tree imports anywhere, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module, node.lineno
            if node.module == PACKAGE:
                yield from ((f"{PACKAGE}.{alias.name}", node.lineno) for alias in node.names)


def at_import_time(tree):
    """Return a copy of a syntax tree without what does not run when the module is imported."""

    class Remove(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        def visit_AsyncFunctionDef(self, node):
            return ast.Pass()

        def visit_If(self, node):
            return ast.Pass() if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Remove().visit(tree)


def own_parts(tree):
    """Return the first name below the package of everything imported from it, with its line."""
    for name, line in imports(tree):
        if str(name).split(".")[0] == PACKAGE and name != PACKAGE:
            yield str(name).split(".")[1], line


def violations(tree, stage):
    """Return the imports of a file that its stage may not have."""
    allowed = ANYWHERE | set(STAGES[: STAGES.index(stage) + 1])
    return [(part, line) for part, line in own_parts(tree) if part not in allowed]


def parsed(path):
    return ast.parse(path.read_text(), str(path))


def named(path):
    return str(path.relative_to(ROOT))


def test_every_folder_is_a_stage():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(STAGES)
    assert {"data", "spans", "context", "position", "attention", "model", "telemetry", "retrofit"} <= folders


@pytest.mark.parametrize("path", STAGE_FILES, ids=named)
def test_a_stage_imports_only_stages_before_it(path):
    assert violations(parsed(path), path.relative_to(ROOT).parts[0]) == []


@pytest.mark.parametrize(
    ("stage", "source", "expected"),
    [
        ("spans", "from megacontext_megatron.position import phase", ["position"]),
        ("spans", "def f():\n    import megacontext_megatron.model.gpt", ["model"]),
        ("spans", "from megacontext_megatron import telemetry, config, data", ["telemetry"]),
        ("model", "from megacontext_megatron.run import parse", ["run"]),
        ("data", "from megacontext_megatron.config import ConfigError", []),
        ("retrofit", "from megacontext_megatron.model.gpt import build_model", []),
        ("attention", "import megacontext_megatron\nimport torch", []),
    ],
)
def test_the_rule_sees_what_it_forbids(stage, source, expected):
    assert [part for part, _ in violations(ast.parse(source), stage)] == expected


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_nothing_heavy(name):
    tree = at_import_time(parsed(ROOT / f"{name}.py"))
    assert [found for found in imports(tree) if str(found[0]).split(".")[0] in HEAVY] == []


def test_only_what_runs_at_import_counts():
    source = "if TYPE_CHECKING:\n    import torch\nif True:\n    import megatron\ndef f():\n    import torch\n"
    source += "class A:\n    import torch\n    def f(self):\n        import torch\n"
    assert list(imports(at_import_time(ast.parse(source)))) == [("megatron", 4), ("torch", 8)]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize(
    "module", [PACKAGE, *(f"{PACKAGE}.{name}" for name in LIGHT[1:]), f"{PACKAGE}.telemetry.report"]
)
def test_importing_the_commands_loads_no_torch(module):
    code = f"import sys, {module}; print(sorted({set(HEAVY)} & {{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
