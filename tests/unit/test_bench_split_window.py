"""Group M: what two GPUs exchange, and what half of one GPU's time is."""

from __future__ import annotations

import pytest

from scripts.benchmarks import split_window
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.options import Options


def test_a_rank_sends_the_keys_and_values_of_127_rows():
    assert split_window.halo_bytes() == 127 * 8 * 128 * 2 * 2 == 520_192


@pytest.mark.parametrize(("split", "verdict"), [(104.0, "pass"), (106.0, "miss")])
def test_two_gpus_are_compared_with_half_of_one(split: float, verdict: str):
    [ratio] = split_window.row_of(32768, [split, 1.0, 999.0], [200.0]).ratios()
    assert ratio.verdict == verdict
    assert ratio.value == pytest.approx(split / 100)


def test_one_gpu_is_said_to_be_too_few():
    found = Findings()
    split_window.run(Options(), found)
    assert found.absent == "it needs two GPUs"
