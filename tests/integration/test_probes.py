"""Probes, in training and in evaluate: what they change, what they leave alone, and the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_evaluate import evaluated
from tests.launch import TrainResult
from tests.parity import CP, DIST_OPT, PP, TP_SP, VPP
from tests.small import small_training

BLUR = {factor: f"mc/pos/blur_dnll/{factor}" for factor in ("0", "0.5", "1", "2")}
SHUFFLED = "mc/shuffled_gist_dnll"
PERMUTED = "mc/permuted_dnll"
BY_ROW = "mc/permuted_dnll/row_causal"
PROBES = {*BLUR.values(), SHUFFLED, PERMUTED}
TOLERANCE = 1e-5
"""Absolute, in nats: means of fp32 losses in another order."""

LEARNED = {"mc_gist_kind": "gistnet", "mc_gist_hidden_size": 16, "mc_gist_layers": 1}
PROBED = {"mc_probe_interval": 2, "mc_probe_samples": 8}
# where a probe drew a random number, dropout would show it
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


def probed(corpus: Path, workdir: Path, ranks: int = 1, **flags: Any) -> TrainResult:
    """Train the small run with learned gists and probes."""
    save = {"save": workdir / "saved", "save_interval": 4}
    return small_training(corpus, workdir, ranks, fresh=True, **{**LEARNED, **PROBED, **save, **flags}).check()


def probes_of(result: TrainResult) -> list[dict[str, float]]:
    """Return the probes in each line of the metrics file."""
    return [{name: value for name, value in line.items() if name in PROBES | {BY_ROW}} for line in result.metrics]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> TrainResult:
    """A probed run in one process."""
    return probed(corpus, tmp_path_factory.mktemp("probed"))


def test_probes_are_reported_at_their_interval(run):
    found = probes_of(run)
    assert [set(line) for line in found] == [set(), PROBES, set(), PROBES]
    for line in (found[1], found[3]):
        assert line[BLUR["1"]] == 0
        others = [line[BLUR[factor]] for factor in ("0", "0.5", "2")]
        assert len(set(others)) == 3
        assert all(abs(value) > 10 * TOLERANCE for value in (*others, line[SHUFFLED]))
    for name in PROBES:
        assert run.scalars(name) == pytest.approx([found[1][name], found[3][name]], rel=1e-6)


def test_the_order_of_far_rows_does_not_matter_where_the_mask_compares_places(run):
    assert all(abs(line[PERMUTED]) <= TOLERANCE for line in probes_of(run) if line)


def causal_by_row() -> None:
    """Give attention the mask of rows in order."""
    from megacontext_megatron.model.step import ForwardStep

    real = ForwardStep._mask

    def by_row(self: ForwardStep, start: Any) -> Any:
        return real(self, start.sort(dim=1).values)

    ForwardStep._mask = by_row


def test_a_mask_by_rows_would_show(corpus, tmp_path):
    result = trained_with(causal_by_row, corpus, tmp_path)
    values = [line[PERMUTED] for line in probes_of(result) if line]
    assert values
    assert all(abs(value) > 10 * TOLERANCE for value in values)


def trained_with(fault: Callable[[], None], corpus: Path, workdir: Path, **flags: Any) -> TrainResult:
    """Train a probed run with a fault."""
    from tests.launch import train
    from tests.small import small_flags

    given = {**LEARNED, **PROBED, "train_iters": 2, "eval_iters": 0, "save": workdir / "saved", **flags}
    return train(small_flags(corpus, **given), workdir=workdir, before=fault).check()


OVERLAPPED = {**DIST_OPT, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "overlapped gathers": (2, OVERLAPPED),
    "pp": (2, PP),
    "tp and sp": (2, TP_SP),
    "cp": (2, CP),
    "dp": (2, {}),
    "virtual stages": (2, {**VPP, "num_layers": 4, **OVERLAPPED}),
}
QUICK = ("one process", "overlapped gathers")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_probes_leave_training_as_it_is(corpus, tmp_path, name):
    ranks, layout = LAYOUTS[name]
    with_probes = probed(corpus, tmp_path / "with", ranks, mc_probe_interval=1, **layout, **DROPOUT)
    without = probed(corpus, tmp_path / "without", ranks, mc_probe_interval=None, **layout, **DROPOUT)
    assert all(len(line) == len(PROBES) for line in probes_of(with_probes))
    assert not any(probes_of(without))
    assert with_probes.losses == without.losses
    assert with_probes.grad_norms == without.grad_norms
    assert with_probes.scalars("lm loss validation") == without.scalars("lm loss validation")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS if name not in QUICK])
def test_every_layout_reports_the_probes_of_one_process(run, corpus, tmp_path, name):
    ranks, layout = LAYOUTS[name]
    start = {"load": run.save_dir, "finetune": True, "train_iters": 2, "eval_iters": 0}
    model = {"num_layers": layout["num_layers"]} if "num_layers" in layout else {}
    if model:
        start["load"] = probed(corpus, tmp_path / "make", **model).save_dir
    one, other = (
        small_training(
            corpus, tmp_path / str(n), n, **{**LEARNED, **PROBED, **start, "save": tmp_path / f"s{n}", **each}
        )
        for n, each in ((1, model), (ranks, layout))
    )
    found, expected = probes_of(other.check())[1], probes_of(one.check())[1]
    if layout == CP:
        assert found.pop(BY_ROW) != pytest.approx(expected.pop(PERMUTED), abs=TOLERANCE)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=TOLERANCE), key


def test_evaluate_probes_the_same_way(run, tmp_path):
    # what training probes in its last step it has not yet learned from
    found = evaluated(run.save_dir, tmp_path, mc_eval_probes=True, mc_eval_inputs="mixed")
    assert set(found["errors"]["probes"]) == PROBES - {SHUFFLED}
    assert abs(found[PERMUTED]) <= TOLERANCE
    assert found[BLUR["1"]] == 0
    for factor in ("0", "0.5", "2"):
        assert found[BLUR[factor]] != 0
        assert f"{found[BLUR[factor]]:.4f}" in found["log"]
