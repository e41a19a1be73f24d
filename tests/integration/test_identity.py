"""Where the plugin adds nothing it changes nothing: tokens only, and documents that begin elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests import mutations, recording, stock
from tests.launch import MAIN, TrainResult, train
from tests.parity import CLEARLY, LOSS_TOLERANCE, ONE, STEPS, References, difference
from tests.tiny import tiny_flags

PLUGIN = {"position_embedding_type": "gaussian_rope", "gaussian_rope_phase": "megatron"}
STOCK = {"position_embedding_type": "rope"}
FAR = 2**30


class TokensOnly:
    """Runs on plain tokens in which only the code that positions them differs."""

    def __init__(self, references: References, folder: Path) -> None:
        self._references, self._folder = references, folder

    def train(self, name: str, main: str = MAIN, **flags: Any) -> TrainResult:
        """Train and record every gradient."""
        values = {"train_iters": STEPS, "global_batch_size": 4, **self._references.data(), **flags}
        return train(
            tiny_flags(strong=True, **values), workdir=self._folder / name, before=recording.gradients, main=main
        ).check()


@pytest.fixture(scope="module")
def tokens_only(references: References, tmp_path_factory: pytest.TempPathFactory) -> TokensOnly:
    """Return the maker of runs."""
    return TokensOnly(references, tmp_path_factory.mktemp("tokens-only"))


@pytest.fixture(scope="module")
def through_plugin(tokens_only: TokensOnly) -> TrainResult:
    """Return the run whose rows are positioned by the plugin."""
    return tokens_only.train("plugin", **PLUGIN)


def assert_bit_identical(result: TrainResult, expected: TrainResult) -> None:
    """Assert that losses, norms and the gradients of all parameters are the same bits in every step."""
    assert len(expected.losses) == STEPS
    assert result.losses == expected.losses
    assert result.grad_norms == expected.grad_norms
    [gradients], [wanted] = result.values, expected.values
    assert len(wanted) == STEPS
    assert len(wanted[0]) > 20
    for step, (found, right) in enumerate(zip(gradients, wanted, strict=True)):
        assert found.keys() == right.keys()
        assert [name for name in right if found[name] != right[name]] == [], f"step {step}"


def test_rope_through_our_command(tokens_only: TokensOnly, through_plugin: TrainResult) -> None:
    """A token's rotation is Megatron's own, bit for bit, forward and backward."""
    assert_bit_identical(through_plugin, tokens_only.train("rope", **STOCK))


def test_megatron_without_our_data_path(tokens_only: TokensOnly, through_plugin: TrainResult) -> None:
    """Nor do data, batches, norms and the loss differ from Megatron's."""
    assert_bit_identical(through_plugin, tokens_only.train("stock", f"{stock.__name__}:main", **STOCK))


def test_gradients_would_tell(tokens_only: TokensOnly, through_plugin: TrainResult) -> None:
    """Another rotary base changes the gradients, though not their names."""
    other = tokens_only.train("base", **PLUGIN, rotary_base=9999, lr_decay_iters=STEPS, train_iters=1)
    [[found]], [[right, *_]] = other.values, through_plugin.values
    assert found.keys() == right.keys()
    assert all(found[name] != right[name] for name in right if "linear_qkv.weight" in name)


def test_exact_phases_do_not_know_where_a_document_begins(references: References, tmp_path: Path) -> None:
    """A shift of every row by 2^30 tokens changes no loss."""
    found = references.compared(ONE, tmp_path, before=mutations.shifted_starts, offset=FAR)
    assert found.loss <= LOSS_TOLERANCE


def test_fp32_phases_would_know(references: References, tmp_path: Path) -> None:
    """Megatron's fp32 angles are noise so far out, so the shift above does reach the layers."""
    layout = dataclasses.replace(ONE, flags={"gaussian_rope_phase": "megatron"})
    near, far = (
        references.train(
            layout, tmp_path / str(offset), steps=1, before=mutations.shifted_starts, offset=offset
        ).check()
        for offset in (0, FAR)
    )
    assert difference(far, near).excess() > CLEARLY
