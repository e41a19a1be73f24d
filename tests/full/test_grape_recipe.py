"""The recipe of examples/grape_recipe.sh in layouts against one process, and the script itself at its smallest."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, recording
from tests.parity import CLEARLY, CP, MOE_STEPS, ONE, PP, TP, TP_SP, Flags, Layout, References

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "grape_recipe.sh"
BASH = shutil.which("bash") or "/bin/bash"

FAMILY = "grape recipe"
LAYOUTS = (
    Layout(name="TP2+SP", ranks=2, flags=TP_SP, family=FAMILY),
    Layout(name="PP2", ranks=2, flags=PP, family=FAMILY),
    Layout(name="CP2", ranks=2, flags=CP, family=FAMILY),
)
ALONE = dataclasses.replace(ONE, family=FAMILY)

FAULT_STEPS = 4
SETTINGS: tuple[Flags, ...] = (
    {"position_embedding_type": "rope", "grapem_learnable_freq": None},
    {"no_rope_freq": None},
    {"grape_a": None, "grape_a_learnable": None, "bias_slope_scale": None},
    {"grape_a_learnable": None},
    {"window_size": None, "window_attn_skip_freq": None, "no_rope_freq": None},
    {"moe_router_bias_update_rate": 0.0},
)
"""What the recipe has, taken away."""

GRADIENT_TOLERANCE = 1e-4
"""Of a parameter's largest gradient: these are sums over all heads and rows that largely cancel."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_one_process(references: References, tmp_path: Path, layout: Layout) -> None:
    references.agrees(layout, tmp_path, steps=MOE_STEPS)


@pytest.mark.parametrize("without", SETTINGS, ids=" ".join)
def test_setting_is_worth_comparing(references: References, tmp_path: Path, without: Flags) -> None:
    """A layout that ignored one of the recipe's settings would not agree."""
    layout = dataclasses.replace(ALONE, name=f"without {', '.join(without)}", flags=without)
    assert references.compared(layout, tmp_path, steps=FAULT_STEPS).excess() > CLEARLY


def positional_gradients() -> Callable[[], list[dict[str, list[float]]]]:
    """Record the final gradients of frequencies and slopes, by name, for every step."""
    seen: list[dict[str, list[float]]] = []

    def record(model: list[Any]) -> None:
        [stage] = model
        found = {name: parameter.main_grad.tolist() for name, parameter in stage.named_parameters()}
        seen.append({name: found[name] for name in found if name.endswith(("log_freq", "log_slope_scale"))})

    recording.after_gradients(record)
    return lambda: seen


def unsummed() -> Callable[[], list[dict[str, list[float]]]]:
    """Record the gradients that one tensor-parallel rank's heads give."""
    mutations.unsummed_positional_gradients()
    return positional_gradients()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_frequencies_and_slopes_get_whole_gradients(references: References, tmp_path: Path, layout: Layout) -> None:
    """Three layers of frequencies and one of slopes, each the same on all ranks that hold it."""
    expected = _gradients(references, tmp_path / "one", ALONE, positional_gradients)[0]
    assert [name.rpartition(".")[2] for name in expected] == ["log_freq"] * 3 + ["log_slope_scale"]
    found = _gradients(references, tmp_path / "many", layout, positional_gradients)
    stages = 2 if layout.flags == PP else 1
    assert sum(map(len, found)) == len(expected) * layout.ranks // stages
    assert max(_worst(rank, expected) for rank in found) < GRADIENT_TOLERANCE


def test_gradients_of_one_rank_alone_are_noticed(references: References, tmp_path: Path) -> None:
    expected = _gradients(references, tmp_path / "one", ALONE, positional_gradients)[0]
    layout = Layout(name="TP2", ranks=2, flags=TP, family=FAMILY)
    found = _gradients(references, tmp_path / "many", layout, unsummed)
    assert max(_worst(rank, expected) for rank in found) > CLEARLY * GRADIENT_TOLERANCE


def _gradients(
    references: References, folder: Path, layout: Layout, before: Callable[..., Any]
) -> list[dict[str, list[float]]]:
    """Return each rank's gradients of one step; on a stage that starts with layer 3 names are those of the model."""
    ranks = references.train(layout, folder, steps=1, before=before).check().values
    first = layout.ranks // 2 if layout.flags == PP else layout.ranks
    return [
        {_of_model(name, 0 if rank < first else 2): gradient for name, gradient in step.items()}
        for rank, [step] in enumerate(ranks)
    ]


def _of_model(name: str, layers_before: int) -> str:
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) + layers_before}", name)


def _worst(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    return max(
        max(abs(x - y) for x, y in zip(gradient, expected[name], strict=True)) / max(map(abs, expected[name]))
        for name, gradient in found.items()
    )


def test_the_script_trains_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Two steps, and then two more from the checkpoint."""
    sizes = {"HIDDEN": "32", "HEADS": "2", "QUERY_GROUPS": "1", "FFN": "64", "EXPERT_FFN": "32"}
    data = {"TRAIN_DATA": str(corpus), "VALID_DATA": str(corpus), "OUT": str(tmp_path / "run")}
    settings = {"MC_RUNTIME": sys.executable, "MC_CPU": "1", "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    for steps in ("2", "4"):
        flags = ["--train-iters", steps, "--lr-decay-iters", "4", "--lr-warmup-iters", "0", "--eval-iters", "0"]
        done = subprocess.run(
            [BASH, str(RECIPE), *flags, "--log-interval", "1"],
            env={**os.environ, **sizes, **data, **settings},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.findall(r"\biteration +(\d+)/", done.stdout) == ["3", "4"]
    layers = re.findall(r"^> (\d) \| (.*)$", done.stdout, re.MULTILINE)
    assert [layer.split(" | ")[2:4] for _, layer in layers] == [["127,0", "none"]] * 3 + [["full", "grape-a"]]
    assert [layer.startswith("none | none") for _, layer in layers] == [False] * 3 + [True]
