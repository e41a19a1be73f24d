"""Retrofits in which a pipeline stage has nothing to train: Megatron's optimizers, checkpoints, and the frozen base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import TrainResult, train
from tests.small import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, TOKENS_ONLY, largest, small_flags, small_training

pytestmark = pytest.mark.full

BASE = {**TOKENS_ONLY, "position_embedding_type": "rope", "eval_iters": 0}
SLOPES = {**BASE, "retrofit": ["alibi-lora"], "retrofit_lora_rank": 2}
"""Only the first layer, and so the first stage of two, has a parameter."""

PP = {"pipeline_model_parallel_size": 2}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": PP,
    "pp2, recomputed": {**PP, **RECOMPUTED},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
TRAINED = {f"decoder.layers.0.self_attention.score_biases.alibi-lora.{name}" for name in ("down", "up")}


def fingerprints() -> Callable[[], dict[str, list[str]]]:
    """Record what of a stage's frozen base changes between its first step and the end, and what trains."""
    from megatron.training import training

    from megacontext_megatron.retrofit.freezing import frozen_fingerprint

    real, seen = training.setup_model_and_optimizer, {}

    def set_up(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        seen["model"] = found[0][0]
        seen["before"] = frozen_fingerprint(seen["model"])
        return found

    training.setup_model_and_optimizer = set_up

    def finish() -> dict[str, list[str]]:
        model, before = seen["model"], seen["before"]
        after = frozen_fingerprint(model)
        return {
            "changed": [name for name in before if before[name] != after[name]],
            "frozen": list(before),
            "trained": [n.removeprefix("module.") for n, p in model.named_parameters() if p.requires_grad],
        }

    return finish


def retrofitted(corpus: Path, folder: Path, ranks: int, **overrides: Any) -> TrainResult:
    """Train slopes by query; ``values`` holds what each rank's base did meanwhile."""
    return train(small_flags(corpus, **{**SLOPES, **overrides}), ranks, workdir=folder, before=fingerprints).check()


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """A checkpoint of plain rope."""
    folder = tmp_path_factory.mktemp("base")
    return small_training(corpus, folder, **BASE, train_iters=2, save=folder / "saved").check().save_dir or folder


@pytest.fixture(scope="module")
def alone(corpus, base, tmp_path_factory) -> TrainResult:
    """The retrofit in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return retrofitted(corpus, folder, 1, pretrained_checkpoint=base, save=folder / "saved")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_without_anything_to_train_change_nothing(layout, alone, base, corpus, tmp_path):
    flags = LAYOUTS[layout]
    split = retrofitted(corpus, tmp_path / "a", 2, pretrained_checkpoint=base, save=tmp_path / "saved", **flags)
    assert largest(split.losses, alone.losses) < LOSS_TOLERANCE
    assert largest(split.grad_norms, alone.grad_norms) < GRAD_NORM_TOLERANCE
    assert min(split.grad_norms) > 0
    assert [rank["changed"] for rank in split.values] == [[], []]
    assert all(rank["frozen"] for rank in split.values)
    expected = [TRAINED, set() if "pp2" in layout else TRAINED]
    assert [set(rank["trained"]) for rank in split.values] == expected
    again = retrofitted(corpus, tmp_path / "b", 2, load=tmp_path / "saved", ckpt_step=2, **flags)
    assert again.losses == split.losses[2:]
    assert again.grad_norms == split.grad_norms[2:]
