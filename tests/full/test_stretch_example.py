"""The stretch example at a tiny size, through the real commands: everything is measured, kept, and reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.stretch import report
from examples.stretch.recipe import HELD_OUT, LORA, METHODS, NONE, SLOW, ZERO_SHOT, Recipe, cells
from examples.stretch.verdicts import values

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
SIZES = ("length=16", "layers=1", "hidden=32", "steps=6", "warmup=2", "batch=8", "evaluated=8", "micro_tokens=128")
SIZES += ("factors=2,4", "adapter_steps=3", "task_methods=yarn")


def run(out: Path) -> str:
    """Run the example and return what it printed."""
    command = [
        sys.executable,
        "-m",
        "examples.stretch",
        "--tier",
        "cpu",
        "--out",
        str(out),
        "--seeds",
        "1",
        "--jobs",
        "2",
    ]
    done = subprocess.run([*command, "--set", *SIZES], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stretch")
    assert "0 of 18 measurements kept" in run(folder)
    return folder


def test_every_cell_is_measured_on_the_same_samples(out):
    found = json.loads((out / report.RESULTS_FILE).read_text())
    recipe = Recipe(**{**found["recipe"], "factors": (2, 4), "task_methods": ("yarn",)})
    assert [each["seed"] for each in found["records"]] == [1] * len(cells(recipe))
    # 17 ids, and a model that has hardly learned.
    assert all(0.5 < each["loss"] < 5 for each in found["records"])
    assert all(0 <= each["accuracy"] <= 1 for each in found["records"])
    shapes = {
        tuple(json.loads(path.read_text())["evaluation"][name] for name in ("samples", "horizon"))
        for path in out.glob(f"seed-1/*-{HELD_OUT}/result.json")
    }
    assert shapes == {(8, 4)}


def test_methods_and_adapters_change_what_the_base_says(out):
    found = json.loads((out / report.RESULTS_FILE).read_text())["records"]
    before = [values(found, method, 4)[1] for method in METHODS]
    after = [values(found, method, 4, LORA)[1] for method in METHODS]
    assert len({*before, *after, values(found, "yarn", 4, SLOW)[1]}) == 9
    assert values(found, NONE, 1, ZERO_SHOT)[1] != before[0]


def test_a_repeated_command_runs_nothing_and_reports_the_same(out):
    table = (out / report.TABLE_FILE).read_text()
    assert not list(out.rglob("iter_*"))
    said = run(out)
    assert "18 of 18 measurements kept" in said
    assert said.endswith(table + "\n")
    assert not list(out.rglob("iter_*"))
