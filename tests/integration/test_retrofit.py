"""A retrofit starts as its base, bit for bit, and trains nothing but its adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import recording
from tests.corpus import write_corpus
from tests.launch import TrainResult, call, train
from tests.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, TP_SP, difference
from tests.tiny import tiny_flags

ROPE = {"position_embedding_type": "rope"}
ADAPTERS = {
    **ROPE,
    "retrofit": ["damping", "alibi-lora", "slow-bands"],
    "retrofit_lora_length": 128,
    "slow_band_periods": [60, 400],
    "gaussian_rope_phase": "megatron",
}
STRETCH = {"rope_stretch": 4, "rope_stretch_rule": "ntk"}


class Runs:
    """Trainings on plain tokens from one stock checkpoint."""

    def __init__(self, folder: Path) -> None:
        call(write_corpus, {"prefix": str(folder / "text")}, workdir=folder).check()
        self.folder = folder
        self.base = folder / "base"
        self.train("base-run", **{**ROPE, "train_iters": 2, "save": self.base, "save_interval": 2})

    def train(self, name: str, ranks: int = 1, before: Any = recording.logits, **flags: Any) -> TrainResult:
        """Train and record the logits."""
        data = {"data_path": self.folder / "text", "data_cache_path": self.folder / "cache"}
        values = {"global_batch_size": 4, "train_iters": 2, "lr_decay_iters": 8, **data, **flags}
        return train(tiny_flags(strong=True, **values), ranks, workdir=self.folder / name, before=before)

    def retrofit(self, name: str, ranks: int = 1, before: Any = recording.logits, **flags: Any) -> TrainResult:
        """Train a retrofit of the base."""
        return self.train(name, ranks, before, **{**ADAPTERS, "pretrained_checkpoint": self.base, **flags})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the runs of this file."""
    return Runs(tmp_path_factory.mktemp("retrofit"))


@pytest.fixture(scope="module")
def adapted(runs: Runs) -> TrainResult:
    """Return a retrofit of four steps, saved after the second and the last."""
    saved = {"save": runs.folder / "adapted", "save_interval": 2}
    return runs.retrofit("adapted-run", train_iters=4, **saved).check()


def test_a_retrofit_starts_as_its_base_bit_for_bit(runs: Runs, adapted: TrainResult) -> None:
    """Damping of tokens, a LoRA whose second matrix is 0 and bands of amplitude 0 change no logit."""
    start = {"pretrained_checkpoint": runs.base, "finetune": True, "train_iters": 1}
    base = runs.train("again", **{**ROPE, **start}).check()
    [expected], [found] = base.values, adapted.values
    assert len(expected) == 2
    assert found[:2] == expected
    assert found[4:6] != found[:2]


def test_a_stretch_changes_the_logits(runs: Runs, adapted: TrainResult) -> None:
    parts = ["stretch", *ADAPTERS["retrofit"]]
    stretched = runs.retrofit("stretched", retrofit=parts, **STRETCH, train_iters=1).check()
    [expected], [found] = adapted.values, stretched.values
    assert found[0] != expected[0]
    assert stretched.losses[0] == pytest.approx(adapted.losses[0], rel=0.5)


def test_nothing_of_the_base_moves(runs: Runs) -> None:
    result = runs.retrofit("frozen", before=recording.frozen, train_iters=3).check()
    [(first, last)] = result.values
    assert len(first) > 20
    assert first == last


def test_a_resumed_retrofit_repeats_every_bit(runs: Runs, adapted: TrainResult) -> None:
    place = runs.folder / "adapted"
    resumed = runs.retrofit("resumed", load=place, ckpt_step=2, train_iters=4).check()
    assert resumed.losses == adapted.losses[2:]
    [through], [again] = adapted.values, resumed.values
    assert again == through[4:]


def test_exported_adapters_start_another_run(runs: Runs, adapted: TrainResult) -> None:
    """On the base they give what the checkpoint gives; with other settings they are refused."""
    file = runs.folder / "adapters.safetensors"
    command = [sys.executable, "-m", "megacontext_megatron.adapters", "export"]
    command += ["--load", str(runs.folder / "adapted"), "--out", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    imported = runs.retrofit("imported", retrofit_adapters=file, train_iters=1).check()
    loaded = runs.retrofit("loaded", load=runs.folder / "adapted", finetune=True, train_iters=1).check()
    [expected], [found] = loaded.values, imported.values
    assert found == expected
    assert found[0] != adapted.values[0][0]
    refused = runs.retrofit("refused", retrofit_adapters=file, slow_band_periods=[60, 500])
    assert refused.returncode == 2
    assert "--retrofit-adapters" in refused.error


def test_a_base_that_is_no_base_is_refused(runs: Runs, adapted: TrainResult) -> None:
    wider = runs.retrofit("wider", ffn_hidden_size=192)
    assert wider.returncode == 2
    assert "--ffn-hidden-size" in wider.error
    idle = runs.retrofit("idle", retrofit=["damping"], retrofit_lora_length=None, slow_band_periods=None)
    assert idle.returncode == 2
    assert "leaves nothing to train" in idle.error


def test_tensor_parallel_ranks_agree_with_one_process(runs: Runs, adapted: TrainResult) -> None:
    place = runs.folder / "adapted"
    after = {"load": place, "finetune": True, "train_iters": 4}
    alone, split = (
        runs.retrofit(f"after-{ranks}", ranks, recording.positional_gradients, **after, **flags).check()
        for ranks, flags in ((1, {}), (2, TP_SP))
    )
    found = difference(split, alone)
    assert found.loss <= LOSS_TOLERANCE
    assert found.grad_norm <= GRAD_NORM_TOLERANCE
    [expected] = alone.values
    for rank in split.values:
        assert rank[0].keys() == expected[0].keys()
        for name, right in expected[0].items():
            worst = max(abs(x - y) for x, y in zip(rank[0][name], right, strict=True))
            assert worst <= 1e-4 * max(map(abs, right)), name
