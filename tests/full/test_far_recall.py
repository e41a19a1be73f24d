"""The two-core tier of examples.far_recall, through the real commands: learned gists answer, and nothing else does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples.far_recall.__main__ import main
from examples.far_recall.report import FIGURE, RESULTS

pytestmark = pytest.mark.full

SEEDS = ("1",)


def run(out: Path, *words: str) -> dict[str, Any]:
    """Run the example and return what it wrote."""
    main(["--tier", "cpu", "--out", str(out), *words])
    assert (out / FIGURE).stat().st_size > 0
    return json.loads((out / RESULTS).read_text())


def accuracies(found: dict[str, Any]) -> dict[str, list[float]]:
    return {arm["arm"]: arm["accuracy"] for arm in found["arms"]}


@pytest.fixture(scope="module")
def recalled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All arms that read as many rows as each other, asked by content."""
    return run(
        tmp_path_factory.mktemp("content"), "--arms", "gistnet,mean,recency,shuffled", "--seeds", ",".join(SEEDS)
    )


def test_learned_gists_answer_within_a_thousand_steps(recalled):
    assert recalled["recipe"]["steps"] <= 1000
    assert min(accuracies(recalled)["gistnet"]) > 0.90


def test_mean_gists_answer_no_better_than_a_bag_of_symbols_can(recalled):
    found = accuracies(recalled)["mean"]
    assert len(found) == len(SEEDS)
    assert all(0.25 < accuracy < 0.40 for accuracy in found)


def test_without_the_gists_of_the_document_nothing_is_known(recalled):
    for arm in ("recency", "shuffled"):
        found = accuracies(recalled)[arm]
        assert len(found) == len(SEEDS)
        assert max(found) < 0.12
    assert recalled["references"]["chance"] == 1 / 16


def test_all_arms_take_the_same_steps_and_the_curves_are_kept(recalled):
    assert set(recalled["curves"]) == {f"{arm}-{seed}" for arm in ("gistnet", "mean", "recency") for seed in SEEDS}
    assert {curve[-1][0] for curve in recalled["curves"].values()} == {recalled["recipe"]["steps"]}
    assert {arm["rows"] for arm in recalled["arms"]} == {recalled["task"]["window"]}
    # At first everything is a guess.
    assert all(curve[0][1] > 0.9 * math.log(16) for curve in recalled["curves"].values())


def test_places_alone_answer_questions_by_distance(tmp_path):
    words = ["--ask", "distance", "--arms", "uniform,none", "--seeds", "1", "--set", "steps=400"]
    found = accuracies(run(tmp_path, *words))
    assert set(found) == {"uniform", "none"}
    # Mean gists tell which symbol a block repeats, so that a reader of content alone stays at chance.
    assert all(accuracy > 0.75 for by_seed in found.values() for accuracy in by_seed)
