"""Linear biases in queries and keys, in each layout against one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests import recording
from tests.corpus import write_corpus
from tests.launch import call
from tests.parity import (
    CLEARLY,
    CP,
    DIST_OPT,
    FULL_RECOMPUTE,
    MIXED,
    ONE,
    PP,
    SELECTIVE_RECOMPUTE,
    SPAN_HEAD,
    TP,
    TP_SP,
    VPP,
    Flags,
    Layout,
    References,
)

pytestmark = pytest.mark.full

STEPS = 4
TOLERANCE = 1e-4
"""Of a slope's largest gradient: these are sums over all rows that largely cancel."""

FOLDED: Flags = {
    "grape_a_learnable": True,
    "bias_slope_scale": 0.5,
    "bias_fold": True,
    "qk_layernorm": True,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, Flags] = {
    "global layers": MIXED
    | FOLDED
    | {"position_embedding_type": "rope", "gaussian_rope_learnable_sigma": None}
    | {"grape_a": True, "window_size": "16,0", "window_attn_skip_freq": 2, "no_rope_freq": 2},
    "gated": MIXED
    | FOLDED
    | {"position_embedding_type": "none", "position_bias": ["grape-a", "alibi"], "grape_a_gate": "q"},
    "moved gists": MIXED | FOLDED | SPAN_HEAD | {"position_embedding_type": "none", "position_bias": ["grape-a"]},
}
WAYS: dict[str, tuple[int, Flags]] = {
    "TP2": (2, TP),
    "TP2+SP": (2, TP_SP),
    "PP2": (2, PP),
    "PP2, virtual stages": (2, VPP),
    "CP2": (2, CP),
    "TP2+CP2": (4, TP_SP | CP),
    "DP2, distributed optimizer": (2, DIST_OPT),
    "selective recompute": (1, SELECTIVE_RECOMPUTE),
    "TP2+SP, full recompute": (2, TP_SP | FULL_RECOMPUTE),
}
SOME = {"gated": ("TP2+SP", "CP2", "TP2+SP, full recompute"), "moved gists": ("CP2",)}
LAYOUTS = tuple(
    Layout(name=f"{family}: {way}", ranks=ranks, flags=flags, family=family)
    for family in FAMILIES
    for way, (ranks, flags) in WAYS.items()
    if way in SOME.get(family, WAYS)
)
DIRECT = tuple(layout for layout in LAYOUTS if layout.name.endswith((": TP2+SP", ": CP2")))
SETTINGS = (
    ("global layers", {"bias_fold": None}),
    ("global layers", {"bias_slope_scale": 0.1}),
    ("gated", {"position_bias": ["grape-a"]}),
)
"""What a family has over others, taken away."""


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Return the one-process runs of this file's families."""
    folder = tmp_path_factory.mktemp("folds")
    call(write_corpus, {"prefix": str(folder / "text")}, workdir=folder).check()
    return References(folder / "text", folder, FAMILIES)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_one_process(folds: References, tmp_path: Path, layout: Layout) -> None:
    folds.agrees(layout, tmp_path, steps=STEPS)


@pytest.mark.parametrize("layout", DIRECT, ids=str)
def test_every_rank_holds_whole_gradients(folds: References, tmp_path: Path, layout: Layout) -> None:
    alone = dataclasses.replace(ONE, family=layout.family)
    one, many = (
        folds.train(which, tmp_path / str(which.ranks), steps=1, before=recording.positional_gradients).check()
        for which in (alone, layout)
    )
    [[expected]] = one.values
    assert any("log_slope_scale" in name for name in expected)
    for [found] in many.values:
        assert found.keys() == expected.keys()
        for name, right in expected.items():
            scale = max(map(abs, right))
            assert scale > 0
            assert found[name] == pytest.approx(right, rel=0, abs=TOLERANCE * scale), name


@pytest.mark.parametrize(
    ("family", "without"), SETTINGS, ids=[f"{family}, {' '.join(without)}" for family, without in SETTINGS]
)
def test_setting_is_worth_comparing(folds: References, tmp_path: Path, family: str, without: Flags) -> None:
    """A layout that ignored one of a family's settings would not agree."""
    layout = Layout(name=f"{family} without {', '.join(without)}", family=family, flags=without)
    assert folds.compared(layout, tmp_path, steps=2).excess() > CLEARLY
