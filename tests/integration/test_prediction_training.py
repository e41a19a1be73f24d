"""Training with prediction of coming gists: that it is learned, and that every layout does what one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import parity
from tests.launch import TrainResult, call, train
from tests.parity import CLEARLY, LEVEL, MIXED, ONE, Layout, References
from tests.small import small_flags

BLOCK = 8
PHRASES = 64
"""As many as a sample has blocks, so that no two of its gists are the same."""

DOCUMENTS = 50
LEARNING_STEPS = 50
QUICK_STEPS = 4


def write_cycle(prefix: str) -> int:
    """Write documents in which the same phrases of random bytes follow each other in a circle; return the tokens."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    phrases = np.random.default_rng(1).integers(0, 256, (PHRASES, BLOCK))
    document = torch.from_numpy(np.tile(phrases, (BLOCK, 1)).ravel())
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for _ in range(DOCUMENTS):
        builder.add_document(document, [len(document)])
    builder.finalize(prefix + ".idx")
    return DOCUMENTS * len(document)


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path prefix of text each of whose blocks follows from the one before."""
    folder = tmp_path_factory.mktemp("cycle")
    call(write_cycle, {"prefix": str(folder / "cycle")}, workdir=folder).check()
    return folder / "cycle"


def learned(corpus: Path, workdir: Path, **flags: Any) -> TrainResult:
    """Train the small run on predicting gists of both levels."""
    steps = {"train_iters": LEARNING_STEPS, "lr_decay_iters": LEARNING_STEPS, "lr": 1e-2, "mc_variants": 2}
    unsaved = {"save_interval": None, "eval_interval": 1000, "eval_iters": 0}
    weights = {"mc_predict_level1": 1.0, "mc_predict_level2": 0.5}
    return train(small_flags(corpus, **{**steps, **unsaved, **weights, **flags}), workdir=workdir).check()


@pytest.mark.parametrize(
    ("readout", "agreed", "share"), [("hidden", 0.6, 0.9), ("soft-embed", 0.4, 0.3), ("infonce", 0.6, 0.9)]
)
def test_rows_learn_which_gist_comes_next(
    cycle: Path, tmp_path: Path, readout: str, agreed: float, share: float
) -> None:
    """Agreement alone could rise by predicting what all gists have in common; acceptance tells them apart.

    The distribution that soft-embed reads is also that of the next token, whose embedding is not its block's gist.
    """
    result = learned(cycle, tmp_path, mc_predict_readout=readout)
    agreement, accepted = result.scalars("mc/mp/agreement/1"), result.scalars("mc/mp/accept_rate/1")
    loss = result.scalars("mc/mp/loss/1")
    ends = [f"{values[0]:.3f} -> {values[-1]:.3f}" for values in (agreement, accepted, loss)]
    print(f"{readout}: agreement {ends[0]}, accepted {ends[1]}, loss {ends[2]}")
    assert agreement[0] < 0.3 < agreed < agreement[-1]
    assert accepted[0] < 0.1 < share < accepted[-1]
    assert loss[-1] < 0.6 * loss[0]


GISTNET: parity.Flags = {"mc_gist_kind": "gistnet"}
FAMILIES: dict[str, parity.Flags] = {
    readout: MIXED | LEVEL | {"mc_predict_level1": 0.6, "mc_predict_level2": 0.4, "mc_predict_readout": readout} | more
    for readout, more in (
        ("hidden", GISTNET),
        ("soft-embed", {"untie_embeddings_and_output_weights": True}),
        ("infonce", {"calculate_per_token_loss": True}),
    )
}
TP2_SP = Layout(name="soft-embed, untied, TP2+SP", ranks=2, flags=parity.TP_SP, family="soft-embed")
CP2 = Layout(name="hidden, GistNet, CP2", ranks=2, flags=parity.CP, family="hidden")
LAYOUTS = (TP2_SP, CP2, Layout(name="infonce, per token, TP2+SP", ranks=2, flags=parity.TP_SP, family="infonce"))
MORE = tuple(
    Layout(name=f"{family}, {name}", ranks=2, flags=flags, family=family)
    for family, name, flags in (
        ("hidden", "TP2", parity.TP),
        ("hidden", "TP2+SP", parity.TP_SP),
        ("hidden", "DP2", parity.DIST_OPT),
        ("soft-embed", "TP2", parity.TP),
        ("soft-embed", "CP2", parity.CP),
        ("infonce", "CP2", parity.CP),
    )
)


@pytest.fixture(scope="module")
def predicting(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    """Return the one-process runs of models that predict gists."""
    return References(corpus, tmp_path_factory.mktemp("predicting"), FAMILIES)


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.full) for layout in (*LAYOUTS[1:], *MORE))], ids=str
)
def test_agrees_with_one_process(predicting: References, tmp_path: Path, layout: Layout) -> None:
    result = predicting.agrees(layout, tmp_path, steps=QUICK_STEPS)
    assert {f"mc/mp/{name}/{level}" for name in ("agreement", "accept_rate", "loss") for level in (1, 2)} <= set(
        result.tags("mc/mp/")
    )


def shifted_targets() -> None:
    """Compare every row with the gist behind the one that comes next."""
    from megacontext_megatron.model.prediction import GistPredictor

    real = GistPredictor.__call__

    def shifted(self: GistPredictor, hidden: Any, levels: Any, spans: Any) -> Any:
        return real(self, hidden, [level._replace(vectors=level.vectors.roll(-1, dims=0)) for level in levels], spans)

    GistPredictor.__call__ = shifted


def means_of_own_rows() -> None:
    """Leave the means of predictions at those of one context-parallel rank's rows."""
    from megacontext_megatron.model import objective

    real = objective.prediction_terms
    objective.prediction_terms = lambda predicted, settings, _: real(predicted, settings, lambda value: value)


def expectation_of_own_tokens() -> None:
    """Leave the expected embedding at that of one tensor-parallel rank's part of the vocabulary."""
    from megacontext_megatron.model import gpt

    real = gpt.expected_embedding
    gpt.expected_embedding = lambda logits, table, _: real(logits, table, None)


@pytest.mark.parametrize(
    ("layout", "fault"),
    [(ONE, shifted_targets), (CP2, means_of_own_rows), (TP2_SP, expectation_of_own_tokens)],
    ids=["targets", "CP means", "vocabulary"],
)
def test_fault_is_noticed(predicting: References, tmp_path: Path, layout: Layout, fault: Callable[[], Any]) -> None:
    layout = layout if layout is not ONE else Layout(name="one process", family="hidden")
    found = predicting.compared(layout, tmp_path, steps=QUICK_STEPS, before=fault)
    assert found.excess() > CLEARLY
