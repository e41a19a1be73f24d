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
from tests.parity import CLEARLY, CP, MOE_STEPS, ONE, PP, TP_SP, Flags, Layout, References

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
    {"bias_slope_scale": 1.0},
    {"window_size": "31,0"},
    {"moe_router_bias_update_rate": 0.0},
    {"moe_router_topk_scaling_factor": 1.0},
)
"""What the recipe has, changed where its checkpoint still fits."""

GRADIENT_TOLERANCE = 1e-4
"""Of a parameter's largest gradient: these are sums over all heads and rows that largely cancel."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_one_process(references: References, tmp_path: Path, layout: Layout) -> None:
    references.agrees(layout, tmp_path, steps=MOE_STEPS)


@pytest.mark.parametrize("changed", SETTINGS, ids=" ".join)
def test_setting_is_worth_comparing(references: References, tmp_path: Path, changed: Flags) -> None:
    """A layout that ignored one of the recipe's settings would not agree."""
    layout = dataclasses.replace(ALONE, name=f"another {', '.join(changed)}", flags=changed)
    assert references.compared(layout, tmp_path, steps=FAULT_STEPS).excess() > CLEARLY


def fixed_slopes() -> None:
    """Let the global layer have the slopes it would have without learning."""
    from megacontext_megatron.position.linear_biases import Alibi, GrapeA

    GrapeA.slopes = Alibi.slopes


def equal_slopes() -> None:
    """Let every tensor-parallel rank have the slopes of the first rank's heads."""
    from megacontext_megatron.position import linear_biases

    real = linear_biases.alibi_slopes
    linear_biases.alibi_slopes = lambda heads: real(heads)[: heads // 2] * 2


def fixed_frequencies() -> None:
    """Let learned frequencies be used as constants."""
    from megacontext_megatron.position.layer_frequencies import GrapeFrequencies

    real = GrapeFrequencies.forward
    GrapeFrequencies.forward = lambda self, device: real(self, device).detach()


@pytest.mark.parametrize("fault", [fixed_slopes, equal_slopes, fixed_frequencies])
def test_fault_is_noticed(references: References, tmp_path: Path, fault: Callable[[], None]) -> None:
    assert references.compared(ALONE, tmp_path, steps=FAULT_STEPS, before=fault).excess() > CLEARLY


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
    found = _gradients(references, tmp_path / "many", LAYOUTS[0], unsummed)
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
    sizes = {"HIDDEN": "32", "HEADS": "2", "QUERY_GROUPS": "1", "FFN": "64", "EXPERT_FFN": "32", "STEPS": "4"}
    data = {"TRAIN_DATA": str(corpus), "VALID_DATA": str(corpus), "OUT": str(tmp_path / "run")}
    settings = {"MC_RUNTIME": sys.executable, "MC_CPU": "1", "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    said = []
    for more in (["--exit-interval", "2"], []):
        done = subprocess.run(
            [BASH, str(RECIPE), "--eval-iters", "0", "--log-interval", "1", "--save-interval", "4", *more],
            env={**os.environ, **sizes, **data, **settings},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        said.append(done.stdout)
    assert [re.findall(r"\] iteration +(\d+)/", text) for text in said] == [["1", "2"], ["3", "4"]]
    layers = re.findall(r"^> \d \| (.*)$", said[0], re.MULTILINE)
    assert [layer.split(" | ")[2:4] for layer in layers] == [["127,0", "none"]] * 3 + [["full", "grape-a"]]
    assert [layer.startswith("none | none") for layer in layers] == [False] * 3 + [True]
