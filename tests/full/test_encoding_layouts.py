"""Encodings and score biases in each layout against one process: one family for each mechanism."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests import recording
from tests.corpus import write_corpus
from tests.launch import call, train
from tests.parity import (
    CLEARLY,
    CP,
    DIST_OPT,
    FULL_RECOMPUTE,
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    MIXED,
    ONE,
    SELECTIVE_RECOMPUTE,
    TP_SP,
    VPP,
    Flags,
    Layout,
    References,
)
from tests.tiny import tiny_flags

pytestmark = pytest.mark.full

STEPS = 8
FEWER_STEPS = {"contextual": 2, "clex": 2}
"""Places that follow from what rows hold, and frequencies that a network moves, make the rounding of a step grow many
times in the next: pipelines, in which no sum is made otherwise, part from one process as fast."""

TOLERANCE = 1e-4
"""Of a positional parameter's largest gradient: these are sums over all rows that largely cancel."""

NO_GRADIENT = "fire.bias1"
"""What is added to all scores of a head alike, which a softmax does not see: its gradient is rounding."""

BIASES = ["alibi", "t5", "fire", "fox", "slow-bands", "grape-a"]
GATED: Flags = {"grape_a_gate": "qk", "grape_a_learnable": True, "slow_band_periods": [50, 700]}
LONGROPE: Flags = {
    "gaussian_rope_base": "longrope",
    "rope_stretch": 4,
    "rope_original_length": 128,
    "longrope_short_factors": [1] * 8,
    "longrope_long_factors": [1, 1, 1.5, 2, 2.5, 3, 3.5, 4],
    "longrope_start_tokens": 100,
}
FAMILIES: dict[str, Flags] = {
    "rotary rule": MIXED | LONGROPE,
    "per head, biases": MIXED | GATED | {"position_embedding_type": "grapem", "grapem_per_head": True}
    | {"position_bias": BIASES},
    "contextual": MIXED | {"position_embedding_type": "grapem", "grapem_contextual": True},
    "clex": MIXED | {"position_embedding_type": "clex", "rope_original_length": 128},
    "additive, row scan": MIXED
    | {"position_embedding_type": "learned_absolute", "position_bias": ["cope"], "cope_count": "width"},
    "additive": MIXED | {"position_embedding_type": "learned_absolute"},
    "shared": MIXED | {"position_embedding_type": "rope", "gaussian_rope_learnable_sigma": None}
    | {"position_bias": ["fire"], "fire_shared": True},
    "unrotated, shared": MIXED
    | {"position_embedding_type": "none", "position_bias": ["fire", "grape-a"], "fire_shared": True},
}  # fmt: skip
FAMILIES = {name: flags | {"max_position_embeddings": 512} for name, flags in FAMILIES.items()}

WAYS: dict[str, tuple[int, Flags]] = {
    "TP2+SP": (2, TP_SP),
    "PP2, virtual stages": (2, VPP),
    "CP2": (2, CP),
    "DP2, distributed optimizer": (2, DIST_OPT),
    "selective recompute": (1, SELECTIVE_RECOMPUTE),
    "TP2+SP, full recompute": (2, TP_SP | FULL_RECOMPUTE),
}
LEFT_OUT = {
    # refused, and shown to be in tests/integration/test_encoding_refusals.py
    ("additive, row scan", "CP2"),
    ("unrotated, shared", "PP2, virtual stages"),
    # the mechanism is that of a neighbour
    *(("rotary rule", way) for way in ("DP2, distributed optimizer", "selective recompute")),
    *(("contextual", way) for way in ("DP2, distributed optimizer", "selective recompute")),
    *(("clex", way) for way in ("selective recompute", "CP2")),
    *(("additive", way) for way in WAYS if way not in ("CP2", "DP2, distributed optimizer")),
    *(("additive, row scan", way) for way in ("DP2, distributed optimizer",)),
    *(("shared", way) for way in WAYS if way != "TP2+SP"),
    *(("unrotated, shared", way) for way in ("DP2, distributed optimizer", "selective recompute")),
}
LAYOUTS = tuple(
    Layout(name=f"{family}: {way}", ranks=ranks, flags=flags, family=family)
    for family in FAMILIES
    for way, (ranks, flags) in WAYS.items()
    if (family, way) not in LEFT_OUT
)
DIRECT = tuple(
    layout
    for layout in LAYOUTS
    if layout.name.endswith((": TP2+SP", ": CP2")) and layout.family in ("per head, biases", "contextual", "clex")
)
SETTINGS = (
    ("rotary rule", {"longrope_start_tokens": None}),
    ("rotary rule", {"gaussian_rope_sigma": "none"}),
    ("per head, biases", {"bias_slope_scale": 0.5}),
    ("per head, biases", {"fire_length": 64}),
    ("contextual", {"grapem_log_freq_scale": 8.0}),
)
"""What a family has over others, taken away."""


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Return the one-process runs of this file's families."""
    folder = tmp_path_factory.mktemp("encodings")
    call(write_corpus, {"prefix": str(folder / "text")}, workdir=folder).check()
    return References(folder / "text", folder, FAMILIES)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_one_process(encodings: References, tmp_path: Path, layout: Layout) -> None:
    encodings.agrees(layout, tmp_path, steps=FEWER_STEPS.get(layout.family, STEPS))


@pytest.mark.parametrize("layout", DIRECT, ids=str)
def test_every_rank_holds_whole_gradients(encodings: References, tmp_path: Path, layout: Layout) -> None:
    alone = dataclasses.replace(ONE, family=layout.family)
    one, many = (
        encodings.train(which, tmp_path / str(which.ranks), steps=1, before=recording.positional_gradients).check()
        for which in (alone, layout)
    )
    [[expected]] = one.values
    assert expected
    assert all(rank[0].keys() == expected.keys() for rank in many.values)
    off = {
        name: max(_relative(rank[0][name], right) for rank in many.values)
        for name, right in expected.items()
        if not name.endswith(NO_GRADIENT)
    }
    worst = max(off, key=lambda name: off[name])
    print(f"{layout}: gradients of {len(off)} positional parameters {off[worst]:.1e} ({worst})")
    assert off[worst] < TOLERANCE


def _relative(found: list[float], right: list[float]) -> float:
    assert max(map(abs, right)) > 0
    return max(abs(x - y) for x, y in zip(found, right, strict=True)) / max(map(abs, right))


@pytest.mark.parametrize(
    ("family", "without"), SETTINGS, ids=[f"{family}, {' '.join(without)}" for family, without in SETTINGS]
)
def test_setting_is_worth_comparing(encodings: References, tmp_path: Path, family: str, without: Flags) -> None:
    """A layout that ignored one of a family's settings would not agree."""
    layout = Layout(name=f"{family} without {', '.join(without)}", family=family, flags=without)
    assert encodings.compared(layout, tmp_path, steps=2).excess() > CLEARLY


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE, SELECTIVE_RECOMPUTE], ids=["none", "full", "selective"])
def test_paths_agree_with_one_process_on_tokens(encodings: References, tmp_path: Path, recompute: Flags) -> None:
    """Path integrals are not defined for gists, so no family has them."""
    flags = {"position_embedding_type": "none", "position_bias": ["grape-ap"], "global_batch_size": 4}
    values = {**flags, **encodings.data(), "train_iters": 1}
    first = {"save": tmp_path / "saved", "save_interval": 1, "no_save_optim": True}
    train(tiny_flags(strong=True, **values, **first), workdir=tmp_path / "first").check()
    values |= {"load": tmp_path / "saved", "finetune": True, "train_iters": 4}
    alone, split = (
        train(tiny_flags(strong=True, **values, **more), ranks, workdir=tmp_path / str(ranks)).check()
        for ranks, more in ((1, {}), (2, {**TP_SP, **recompute}))
    )
    assert split.losses == pytest.approx(alone.losses, rel=LOSS_TOLERANCE)
    assert split.grad_norms == pytest.approx(alone.grad_norms, rel=GRAD_NORM_TOLERANCE)
