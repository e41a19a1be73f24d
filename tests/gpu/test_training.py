"""Training on one GPU, on Megatron's local layers, against the same training on the CPU."""

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.absent import without_transformer_engine
from tests.launch import tiny_flags, train

pytestmark = pytest.mark.gpu

STEPS = 5
CONTEXT: dict[str, Any] = {
    "megacontext": True,
    "mc_source_length": 1024,
    "mc_block_size": 8,
    "mc_variants": 2,
    "mc_recent_tokens": 32,
    "mc_horizon": 32,
    "mc_level2_prob": 0.3,
    "gaussian_rope_learnable_sigma": "level",
    "train_iters": STEPS,
}
ON_GPU: dict[str, Any] = {"cpu": None, "transformer_impl": "local"}


def test_gpu_equals_cpu_in_fp32(corpus: Path, tmp_path: Path) -> None:
    weights = {"data_path": corpus, "data_cache_path": tmp_path / "cache"}
    start = tiny_flags(
        strong=True, **CONTEXT | weights | {"train_iters": 1, "save": tmp_path / "start", "save_interval": 1}
    )
    cpu: dict[str, Any] = {"bare": True, "before": without_transformer_engine}
    train(start, workdir=tmp_path / "w0", **cpu).check()
    load = {"load": tmp_path / "start", "finetune": True}
    on_cpu = train(tiny_flags(strong=True, **CONTEXT | weights | load), workdir=tmp_path / "cpu", **cpu).check()
    on_gpu = train(tiny_flags(strong=True, **CONTEXT | weights | load | ON_GPU), workdir=tmp_path / "gpu").check()
    # fp32 on both: only the order of sums differs, by a few units in the last place of 2^-23 a step.
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=1e-5)


def test_bf16_trains(corpus: Path, tmp_path: Path) -> None:
    flags = tiny_flags(**CONTEXT | ON_GPU | {"bf16": True, "data_path": corpus, "train_iters": 20})
    result = train(flags, workdir=tmp_path).check()
    assert result.losses[-1] < result.losses[0] - 0.3
