"""Guards of a training run: each rule broken for real, on one rank and on several, and healthy runs that pass."""

# Faults are planted here by hand.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import TrainResult, train
from tests.parity import CP, DIST_OPT, PP, TP_SP
from tests.small import STEPS, small_flags

LEARNED = {"mc_gist_kind": "gistnet", "mc_gist_hidden_size": 16, "mc_gist_layers": 1}
GUARDED = {**LEARNED, "mc_guard_after": 2, "eval_iters": 0, "save_interval": 100}
PARTS = ("gist/answer", "gist/layers.0", "gist/norm", "gist/places", "gist/project", "position/sigma_scale")
TOLERANCE = 1e-5

OVERLAPPED = {**DIST_OPT, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp": PP,
    "tp and sp": TP_SP,
    "cp": CP,
    "dp": {},
    "distributed optimizer": OVERLAPPED,
    "pp and distributed optimizer": {**PP, **OVERLAPPED},
}


def zero_answer() -> None:
    """Give the last layer of GistNet no gradient."""
    _scaled_gradient("answer", 0.0)


def zero_norm() -> None:
    """Give the last norm of GistNet no gradient, and nothing else."""
    _scaled_gradient("norm", 0.0)


def endless_places() -> None:
    """Give GistNet's local positions a gradient that is no number."""
    from megacontext_megatron.context.gistnet import BlockEncoder

    real = BlockEncoder.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self.places.register_hook(lambda gradient: gradient * math.nan)

    BlockEncoder.__init__ = init


def _scaled_gradient(child: str, factor: float) -> None:
    from megacontext_megatron.context.gistnet import BlockEncoder

    real = BlockEncoder.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        getattr(self, child).weight.register_hook(lambda gradient: gradient * factor)

    BlockEncoder.__init__ = init


def zero_sigma_scale() -> None:
    """Give learned factors on sigma no gradient."""
    from megacontext_megatron.position.gaussian import LearnableSigma

    real = LearnableSigma.__init__

    def init(self: Any, *args: Any) -> None:
        real(self, *args)
        self.log_scale.register_hook(lambda gradient: gradient * 0.0)

    LearnableSigma.__init__ = init


def constant_gists() -> None:
    """Let GistNet say the same of every block, so loudly that its means do not count."""
    from megacontext_megatron.context.gistnet import BlockEncoder

    real = BlockEncoder.forward
    BlockEncoder.forward = lambda self, blocks: real(self, blocks) + 1e9


def unshuffled() -> None:
    """Let gists of other samples be those of the own."""
    from megacontext_megatron.model import measures

    measures.shuffled_gists = lambda levels, context: levels


def healthy() -> None:
    """Change nothing."""


def guarded(
    corpus: Path, workdir: Path, ranks: int = 1, *, fault: Callable[[], Any] = healthy, **flags: Any
) -> TrainResult:
    """Train the small run with learned gists under early guards."""
    given = {**GUARDED, "save": workdir / "saved", **flags}
    return train(small_flags(corpus, **given), ranks, workdir=workdir, before=fault)


UNCHECKED = {"no_check_for_nan_in_loss_and_grad": True}
ENCODER = "gist/answer, gist/layers.0, gist/norm, gist/places, gist/project"
FAULTS: dict[Callable[[], None], tuple[str, dict[str, Any]]] = {
    # what lies before a layer that stays at 0 gets nothing either
    zero_answer: (f"the gradient of {ENCODER} is exactly 0 in iteration 3", {}),
    zero_norm: ("the gradient of gist/norm is exactly 0 in iteration 3", {}),
    zero_sigma_scale: ("the gradient of position/sigma_scale is exactly 0 in iteration 3", {}),
    # one step on, clipping has spread it to every part
    endless_places: (f"the gradient of position/sigma_scale, {ENCODER} is not finite in iteration 3", UNCHECKED),
    constant_gists: ("all gists point the same way, to rounding", {}),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_rule_stops_the_run(corpus, tmp_path, fault):
    expected, flags = FAULTS[fault]
    result = guarded(corpus, tmp_path, fault=fault, **flags)
    assert result.returncode != 0
    assert expected in result.error
    assert "--mc-guards warn" in result.error
    assert "--mc-guard-after 2" in result.error
    # judged one step after the interval, whose report is written first
    assert [line["iteration"] for line in result.metrics] == [1, 2, 3]


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_stop_together(corpus, tmp_path, name):
    result = guarded(corpus, tmp_path, 2, fault=zero_norm, **LAYOUTS[name])
    assert result.returncode != 0
    for rank in range(2):
        (own,) = (part for part in result.log.split("=== rank ") if part.startswith(f"{rank} ==="))
        assert f"RuntimeError: {FAULTS[zero_norm][0]}" in own


@pytest.mark.parametrize("guards", ["warn", "off"])
def test_a_run_may_go_on(corpus, tmp_path, guards):
    result = guarded(corpus, tmp_path, fault=zero_norm, mc_guards=guards).check()
    assert len(result.losses) == STEPS
    warnings = [line for line in result.log.splitlines() if line.startswith("WARNING: the gradient of gist/norm")]
    assert len(warnings) == (2 if guards == "warn" else 0)
    assert all(line["mc/grad/gist/norm"] == 0 for line in result.metrics)


def test_guards_wait_for_their_time(corpus, tmp_path):
    result = guarded(corpus, tmp_path, fault=zero_norm, mc_guard_after=STEPS).check()
    assert len(result.losses) == STEPS


def test_gists_that_are_no_better_than_others_draw_a_warning(corpus, tmp_path):
    probes: dict[str, Any] = {"mc_probe_interval": 1, "mc_probe_samples": 4}
    result = guarded(corpus, tmp_path, fault=unshuffled, **probes).check()
    assert [line["mc/guard/shuffled_not_worse"] for line in result.metrics] == [1.0] * STEPS
    assert result.log.count("WARNING: gists of other samples serve as well as the right ones") == 2
    right = guarded(corpus, tmp_path / "right", **probes).check()
    for line in right.metrics:
        assert line["mc/guard/shuffled_not_worse"] == (line["mc/shuffled_gist_dnll"] <= 0)


def part_norms() -> Callable[[], list[dict[str, float]]]:
    """Record the gradient norm of every part when a step's gradients are final, without distributed optimizers."""
    import torch

    from megacontext_megatron import run
    from megacontext_megatron.model.gpt import plugin_parameters

    real, seen = run.sum_partial_gradients, []

    def record(model: Any, attribute: str) -> None:
        real(model, attribute)
        found: dict[str, list[Any]] = {}
        for name, parameter in plugin_parameters(model[0]).items():
            child = name.split("encoder.")[-1]
            part = "position/sigma_scale" if "sigma_scale" in name else "gist/" + child.split(".")[0]
            part = part.replace("gist/layers", "gist/layers.0")
            found.setdefault(part, []).append(parameter.main_grad.flatten())
        seen.append({part: torch.cat(each).norm().item() for part, each in found.items()})

    run.sum_partial_gradients = record
    return lambda: seen


TERMS = {"mc_loss_contrast": 0.1, "mc_loss_advantage": 0.1}
"""Every term that needs no teacher."""


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory) -> dict[str, Any]:
    """The flags that start from a checkpoint of one process in which every part has begun to train."""
    folder = tmp_path_factory.mktemp("start")
    saved = guarded(corpus, folder, train_iters=2, save_interval=2).check().save_dir
    return {"load": saved, "finetune": True, **TERMS}


@pytest.fixture(scope="module")
def one(corpus, start, tmp_path_factory) -> TrainResult:
    """A healthy run in one process."""
    return guarded(corpus, tmp_path_factory.mktemp("one"), fault=part_norms, **start).check()


def test_gradient_norms_are_those_of_the_parts(one):
    recorded = one.values[0]
    assert len(recorded) == STEPS
    for line, norms in zip(one.metrics, recorded, strict=True):
        assert set(norms) == set(PARTS)
        for part, norm in norms.items():
            assert line[f"mc/grad/{part}"] == pytest.approx(norm, rel=TOLERANCE)
        assert 0 < line["mc/gist/spread"] < 1
        assert {"mc/term/contrast", "mc/term/advantage"} <= line.keys()


@pytest.mark.parametrize(
    "name",
    [name if name == "distributed optimizer" else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS],
)
def test_healthy_layouts_pass_and_report_what_one_process_reports(one, start, corpus, tmp_path, name):
    result = guarded(corpus, tmp_path, 2, **{**start, **LAYOUTS[name]}).check()
    assert "WARNING: the gradient" not in result.log
    first, expected = result.metrics[0], one.metrics[0]
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        assert first[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), key
    for line in result.metrics[1:]:
        assert all(line[f"mc/grad/{part}"] > 0 for part in PARTS)
