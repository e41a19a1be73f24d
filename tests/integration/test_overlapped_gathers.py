"""A distributed optimizer that gathers parameters while the next forward pass runs, in half precision.

Positional parameters stay in fp32 and so lie in a buffer of their own, which only the modules that hold them wait for.
"""

from pathlib import Path
from typing import Any

import pytest

from tests import recording
from tests.integration.test_kernel_training import FEW_ROWS, through_kernel
from tests.launch import TrainResult, tiny_flags, train
from tests.small import GRAD_NORM_TOLERANCE

STEPS = 4
MODEL: dict[str, Any] = {
    "bf16": True,
    "use_distributed_optimizer": True,
    "megacontext": True,
    "mc_source_length": 512,
    "mc_block_size": 8,
    "mc_variants": 2,
    "mc_recent_tokens": 32,
    "mc_horizon": 32,
    "gaussian_rope_learnable_sigma": "level",
    "lr": 1e-2,
    "train_iters": STEPS,
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def trained(corpus: Path, folder: Path, **more: Any) -> TrainResult:
    flags = tiny_flags(strong=True, **MODEL, data_path=corpus, data_cache_path=folder.parent / "cache", **more)
    return train(flags, 2, workdir=folder, before=recording.sigma_scales).check()


def test_every_rank_reads_the_learned_widths_of_this_step(corpus: Path, tmp_path: Path) -> None:
    plain, overlapped = (trained(corpus, tmp_path / name, **more) for name, more in (("plain", {}), ("over", OVERLAP)))
    first, last = plain.values[0][0], plain.values[0][-1]
    assert first != last
    assert overlapped.values[0] == overlapped.values[1] == plain.values[0]
    assert overlapped.losses == plain.losses


def test_norms_that_the_kernel_applies_are_gathered_first(corpus: Path, tmp_path: Path) -> None:
    """A bucket for every parameter, so that none comes along with a neighbour."""
    runs = []
    for name, more in (("plain", {}), ("over", OVERLAP | {"ddp_bucket_size": 1})):
        values = {**MODEL, **FEW_ROWS, "qk_layernorm": True, "num_layers": 2, "data_path": corpus, **more}
        flags = tiny_flags(strong=True, **values, data_cache_path=tmp_path / "cache")
        kernel = {"before": through_kernel, "before_kwargs": {"kernel": True}}
        runs.append(train(flags, 2, workdir=tmp_path / name, **kernel).check())
    plain, overlapped = runs
    assert overlapped.losses == plain.losses
    # The order in which squares of gradients are added up follows the buckets.
    assert overlapped.grad_norms == pytest.approx(plain.grad_norms, rel=GRAD_NORM_TOLERANCE)


def test_gistnet_and_the_output_weight_that_predictions_read_are_gathered_first(corpus: Path, tmp_path: Path) -> None:
    """The output layer's weight is read beside the layer's own call, by the expected embedding of a prediction."""
    model = {"mc_gist_kind": "gistnet", "mc_gist_hidden_size": 32, "mc_predict_level1": 1.0}
    readout = {"mc_predict_readout": "soft-embed", "untie_embeddings_and_output_weights": True, "num_layers": 2}
    # Without clipping, by a norm whose squares are added up in the order of the buckets.
    runs = [
        trained(corpus, tmp_path / name, **model, **readout, clip_grad=0.0, **more)
        for name, more in (("plain", {}), ("over", OVERLAP | {"ddp_bucket_size": 1}))
    ]
    plain, overlapped = runs
    assert overlapped.losses == plain.losses
    assert overlapped.scalars("mc/mp/loss/1") == plain.scalars("mc/mp/loss/1")
