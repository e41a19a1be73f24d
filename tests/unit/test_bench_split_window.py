"""Group M: what two GPUs exchange, and what half of one GPU's time is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megacontext_megatron import cpu
from scripts.benchmarks import split_layer, split_window
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.layer_step import Size
from scripts.benchmarks.options import Options
from tests.launch import call


def test_a_rank_sends_the_keys_and_values_of_127_rows():
    assert split_window.halo_bytes() == 127 * 8 * 128 * 2 * 2 == 520_192


@pytest.mark.parametrize(("split", "verdict"), [(104.0, "pass"), (106.0, "miss")])
def test_two_gpus_are_compared_with_half_of_one(split: float, verdict: str):
    [ratio] = split_window.row_of("", [[split, 1.0, 999.0], [1.0, 2.0, 3.0]], [[200.0], [9.0]]).ratios()
    assert ratio.verdict == verdict
    assert ratio.value == pytest.approx(split / 100)


def test_one_gpu_is_said_to_be_too_few():
    found = Findings()
    split_window.run(Options(), found)
    assert found.absent == "it needs two GPUs"


def errors_of_a_layer() -> dict[str, float]:
    """Return how far a small layer over the ranks of a job is from one rank's, in fp32, on the CPU."""
    cpu.install()
    torch.distributed.init_process_group("gloo")
    size = Size(hidden=64, ffn=64, query_heads=4, groups=2, impl="local", dtype=torch.float32, device="cpu")
    with cpu.pretended_device():
        checks = split_layer.gate(split_layer.Sides.built(size, 15, 64))
    torch.distributed.destroy_process_group()
    return {check.name.split(": ")[1]: check.error for check in checks}


def test_a_layer_over_two_ranks_is_that_of_one(tmp_path: Path):
    for errors in call(errors_of_a_layer, {}, ranks=2, workdir=tmp_path).check().values:
        assert set(errors) == {"output", "d hidden", "d weight"}
        assert all(0 < error < 1e-6 for error in errors.values()), errors
