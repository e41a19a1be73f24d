"""What probes change and count: the far rows' order, the last rows' numbers, predictions, shares of samples."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megacontext_megatron.attention_config import AttentionConfig
from megacontext_megatron.config import ConfigError, ContextConfig, RotaryConfig, Settings, WatchConfig
from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.evaluation import ratio
from megacontext_megatron.model.measures import far_permutation, predictions
from megacontext_megatron.model.step import needs_mask
from megacontext_megatron.telemetry.probes import check_probes, masks_by_place, measures, micro_batch_size
from tests.launch import call

CONTEXT = ContextConfig(window=64, source_length=512, block_size=8, recent_tokens=12, horizon=5)
PROTECTED = 16


def test_only_far_rows_change_their_order():
    order = far_permutation(CONTEXT)
    far = len(order) - PROTECTED
    assert order[far:].tolist() == list(range(far, 64))
    assert sorted(order[:far].tolist()) == list(range(far))
    assert (order[:far] != torch.arange(far)).sum() > far // 2
    assert far_permutation(CONTEXT).equal(order)


def test_a_permutation_draws_no_random_number_of_the_run():
    before = torch.random.get_rng_state()
    far_permutation(CONTEXT)
    assert torch.random.get_rng_state().equal(before)


def in_ranks(vocabulary: int) -> dict[str, Any]:
    """Return predictions of a tensor-parallel rank, and which of the last rows a context-parallel rank holds."""
    import torch.distributed as dist

    from megacontext_megatron.model.measures import last_rows
    from megacontext_megatron.spans.context_parallel import zigzag_rows

    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    logits = whole_logits()
    share = logits.shape[-1] // 2
    own = logits[..., rank * share : (rank + 1) * share]
    rows = zigzag_rows(64, 2, rank)
    return {
        "predicted": predictions(own, vocabulary, group).tolist(),
        "last": rows[last_rows(CONTEXT, group)].tolist(),
        "rows": rows.tolist(),
    }


def whole_logits() -> torch.Tensor:
    """Return logits [3, 2, 8]: winners in both halves, equal ones, and the largest of all beyond the vocabulary."""
    logits = torch.zeros(3, 2, 8)
    logits[0, 0, 1] = logits[0, 1, 5] = 3.0
    logits[1, 0, 2] = logits[1, 0, 4] = 2.0
    logits[1, 1, 6] = logits[1, 1, 7] = 9.0
    logits[2] = -1.0
    logits[2, 0, 3] = logits[2, 1, 0] = -0.5
    return logits


@pytest.mark.parametrize(("vocabulary", "expected"), [(8, [[1, 5], [2, 6], [3, 0]]), (6, [[1, 5], [2, 0], [3, 0]])])
def test_predictions_are_of_the_whole_vocabulary_without_its_padding(tmp_path: Path, vocabulary: int, expected: Any):
    found = call(in_ranks, {"vocabulary": vocabulary}, 2, workdir=tmp_path).check().values
    assert [each["predicted"] for each in found] == [expected, expected]


def test_every_last_row_is_on_one_context_parallel_rank(tmp_path: Path):
    found = call(in_ranks, {"vocabulary": 8}, 2, workdir=tmp_path).check().values
    for each in found:
        assert each["last"] == [row for row in each["rows"] if row >= 64 - CONTEXT.horizon]
    assert sorted(found[0]["last"] + found[1]["last"]) == list(range(64 - CONTEXT.horizon, 64))
    # the first rank of two holds the last chunk, so the other has none
    assert found[1]["last"] == []


def test_errors_are_those_of_a_ratio():
    counts = torch.tensor([4.0, 1.0, 2.0, 0.0])
    totals = torch.tensor([8.0, 1.0, 7.0, 0.0])
    found = ratio(totals, counts)
    assert found.value == pytest.approx(16 / 7)
    residuals = [float(t - 16 / 7 * n) for t, n in zip(totals, counts, strict=True)]
    spread = (sum(each**2 for each in residuals) / 3) ** 0.5
    assert found.error == pytest.approx(spread / (7 / 4) / 2, rel=1e-6)
    # equal counts make it the standard error of a mean
    plain = ratio(totals, torch.full_like(totals, 2.0))
    assert plain.error == pytest.approx(float((totals / 2).std()) / 2, rel=1e-6)
    assert ratio(totals[:1], counts[:1]).error is None


def arguments(**changed: Any) -> argparse.Namespace:
    """Return what sharing out samples reads of a run's arguments."""
    values = {
        "mc_probe_samples": 8,
        "micro_batch_size": 4,
        "data_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "microbatch_group_size_per_vp_stage": None,
        "log_interval": 10,
        "masked_softmax_fusion": True,
        "fp16": False,
        "bf16": False,
        "transformer_impl": "local",
        "context_parallel_size": 1,
        "window_size": None,
        "num_layers": 2,
    }
    return argparse.Namespace(**{**values, **changed})


VIRTUAL = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("changed", "size"),
    [
        ({}, 4),
        ({"micro_batch_size": 1}, 2),
        ({"micro_batch_size": 1, "mc_probe_samples": 1}, 1),
        ({"data_parallel_size": 4}, 2),
        ({"data_parallel_size": 8}, 1),
        ({**VIRTUAL}, 4),
        ({**VIRTUAL, "mc_probe_samples": 6}, 3),
        ({**VIRTUAL, "mc_probe_samples": 8, "microbatch_group_size_per_vp_stage": 4}, 2),
    ],
)
def test_samples_are_shared_out_in_equal_micro_batches(changed: dict[str, Any], size: int):
    assert micro_batch_size(arguments(**changed)) == size


@pytest.mark.parametrize("changed", [{"data_parallel_size": 16}, {**VIRTUAL, "mc_probe_samples": 1}])
def test_too_few_samples_are_refused(changed: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"--mc-probe-samples .* needs a multiple of (16|2)"):
        micro_batch_size(arguments(**changed))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"transformer_impl": "transformer_engine"}, False),
        ({"context_parallel_size": 2}, False),
        ({"window_size": (16, 0)}, False),
        ({"bf16": True}, False),
        ({"bf16": True, "masked_softmax_fusion": False}, True),
    ],
)
def test_a_mask_by_places_needs_dense_attention(changed: dict[str, Any], expected: bool):
    assert masks_by_place(arguments(**changed), settings(10)) is expected


def test_a_mask_by_places_needs_scores_without_biases():
    biased = replace(settings(10), biases=(BiasConfig(name="alibi", layers=(2,)),))
    assert not masks_by_place(arguments(num_layers=2), biased)
    assert masks_by_place(arguments(num_layers=1), biased)


def test_kernels_take_no_mask():
    kernels = replace(settings(10), attention=AttentionConfig(backends=("megatron", "triton")))
    assert not masks_by_place(arguments(num_layers=2), kernels)
    assert masks_by_place(arguments(num_layers=1), kernels)
    assert needs_mask(arguments(num_layers=2), kernels)
    alone = replace(kernels, attention=AttentionConfig(backends=("triton", "cudnn")))
    assert not needs_mask(arguments(num_layers=2), alone)
    assert not needs_mask(arguments(num_layers=2, transformer_impl="transformer_engine"), kernels)


def test_rows_out_of_order_are_not_measured_where_reach_reads_their_order():
    given = arguments(num_layers=2)
    assert any(measure.permuted for measure in measures(given, settings(10)).values())
    skipping = replace(settings(10), attention=AttentionConfig(backends=("triton", "triton"), reach_skip=True))
    assert not any(measure.permuted for measure in measures(given, skipping).values())


def settings(interval: int, plan: Any = "random") -> Settings:
    """Return settings of a probed run."""
    context = ContextConfig(window=64, source_length=512, block_size=8, recent_tokens=12, horizon=5, plan=plan)
    watch = WatchConfig(probe_interval=interval)
    return Settings(encoding="gaussian_rope", rotary=RotaryConfig(head_dim=8), context=context, watch=watch)


@pytest.mark.parametrize(
    ("asked", "held_out", "expected"),
    [
        (settings(10, "recency"), True, "--mc-plan recency"),
        (settings(15), True, "multiple of --log-interval 10"),
        (settings(20), False, "--valid-data-path"),
    ],
)
def test_probes_without_a_use_are_refused(asked: Settings, held_out: bool, expected: str):
    with pytest.raises(ConfigError, match=expected):
        check_probes(arguments(), asked, held_out=held_out)


def test_probes_that_can_run_are_not_refused():
    check_probes(arguments(), settings(20), held_out=True)
    check_probes(arguments(mc_probe_samples=0), settings(0, "recency"), held_out=False)
