"""What a run says of itself: metrics beside the checkpoints, TensorBoard and W&B, against what it really did."""

# Faults are planted here by hand, and some libraries export less than they offer.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacontext_megatron.config import ContextConfig
from megacontext_megatron.spans.plan import plan_rows
from megacontext_megatron.telemetry.sinks import METRICS_FILE, read_metrics
from tests.launch import TrainResult, call
from tests.parity import PP, TP, TWO_RANKS
from tests.small import MICRO_BATCHES, SMALL, STEPS, TOKENS_ONLY, small_training

CONTEXT = ContextConfig(
    window=64,
    source_length=512,
    variants=2,
    block_size=8,
    recent_tokens=16,
    horizon=16,
    level2_prob=0.3,
)
SEED, TRAIN, VALID = 1234, 0, 1
BATCH = 8
VARIANTS = ("recency", "random")
LEVELS = (0, 1, 2)
BASE_SIGMA = {level: math.sqrt((8 ** (2 * level) - 1) / 12) for level in LEVELS}
TENSORBOARD_TOLERANCE = 1e-6
"""Relative; TensorBoard keeps fp32."""
TOLERANCE = 1e-5
"""For sums of fp32 values in another order, relative where values exceed 1."""


def plans(split: int, first: int, count: int = BATCH) -> list[Any]:
    """Return the plans of consecutive contexts of a split, as they are numbered before any parallel layout."""
    return [plan_rows(CONTEXT, (SEED, split, *divmod(item, len(VARIANTS)))) for item in range(first, first + count)]


def stacked(micro_batches: list[dict[str, Any]], key: str) -> np.ndarray:
    """Return one value of consecutive micro-batches of two contexts, [contexts, rows]."""
    return np.concatenate([np.array(each[key]) for each in micro_batches])


def step_rows(result: TrainResult, step: int) -> list[dict[str, Any]]:
    """Return the recorded micro-batches of a step, counted from 0."""
    return result.values[0]["training"][step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]


def histograms(result: TrainResult) -> dict[str, list[Any]]:
    """Return the histograms in a run's TensorBoard folder by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.tensorboard_dir), size_guidance={"histograms": 0})
    events.Reload()
    return {tag: [event.histogram_value for event in events.Histograms(tag)] for tag in events.Tags()["histograms"]}


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Return the scalar metrics of a line of the metrics file; histograms are lists there."""
    counters = ("iteration", "consumed_samples")
    return {name: value for name, value in line.items() if name not in counters and not isinstance(value, list)}


def differ(value: float, expected: float) -> float:
    """Return how far two values are apart, relative where they exceed 1."""
    return abs(value - expected) / max(1.0, abs(expected))


def test_rows_by_level_are_those_of_the_plans(small_run):
    assert [line["iteration"] for line in small_run.metrics] == [1, 2, 3, 4]
    assert [line["consumed_samples"] for line in small_run.metrics] == [8, 16, 24, 32]
    seen = set()
    for step, line in enumerate(small_run.metrics):
        planned = plans(TRAIN, step * BATCH)
        recorded = step_rows(small_run, step)
        assert np.array_equal(stacked(recorded, "start"), [plan.start for plan in planned])
        assert np.array_equal(stacked(recorded, "level"), [plan.level for plan in planned])
        mixed = np.concatenate([plan.level for plan in planned[1::2]])
        for level in LEVELS:
            assert line[f"mc/lod_count/{level}"] == (mixed == level).sum()
            assert line[f"mc/frac_level/{level}"] == pytest.approx((mixed == level).mean())
        assert line["mc/span_width_mean"] == pytest.approx((8.0**mixed).mean())
        assert line["mc/compression"] == 512 / 64
        assert line["mc/shortened_tokens_mean"] == 0
        seen |= set(mixed)
    assert seen == set(LEVELS)


def test_losses_by_level_and_variant_are_means_of_the_rows_losses(small_run):
    for step, line in enumerate(small_run.metrics):
        recorded = step_rows(small_run, step)
        loss, level = stacked(recorded, "loss"), stacked(recorded, "level")
        for each in LEVELS:
            assert line[f"mc/lod_loss/{each}"] == pytest.approx(loss[level == each].mean(), rel=TOLERANCE)
        last = [loss[variant::2, -CONTEXT.horizon :].mean() for variant in range(2)]
        for name, expected in zip(VARIANTS, last, strict=True):
            assert line[f"mc/nll_last/16/{name}"] == pytest.approx(expected, rel=TOLERANCE)
        assert line["mc/adv_delta_mean"] == pytest.approx(last[1] - last[0], abs=TOLERANCE)
        assert line["lm loss"] == pytest.approx(loss.mean(), rel=TOLERANCE)


def test_losses_by_level_add_up_to_megatrons_loss(small_run):
    recency_rows = BATCH // 2 * CONTEXT.window
    for line, loss in zip(small_run.metrics, small_run.losses, strict=True):
        counts = {level: line[f"mc/lod_count/{level}"] + (recency_rows if level == 0 else 0) for level in LEVELS}
        assert sum(counts.values()) == BATCH * CONTEXT.window
        total = sum(line[f"mc/lod_loss/{level}"] * count for level, count in counts.items())
        assert total / sum(counts.values()) == pytest.approx(loss, rel=TOLERANCE)
        assert line["lm loss"] == pytest.approx(loss, rel=TOLERANCE)


def test_tensorboard_holds_what_the_metrics_file_holds(small_run):
    names = {name for line in small_run.metrics for name in scalars(line)} - {"lm loss"}
    # what validation adds has a space in its name
    assert names == {tag for tag in small_run.tags("mc/") if " " not in tag}
    for name in names:
        for value, line in zip(small_run.scalars(name), small_run.metrics, strict=True):
            assert differ(value, line[name]) <= TENSORBOARD_TOLERANCE, name


def test_the_log_shows_a_line_an_interval(small_run):
    lines = [line for line in small_run.log.splitlines() if line.startswith(" megacontext iteration")]
    assert len(lines) == STEPS
    for line, metrics in zip(lines, small_run.metrics, strict=True):
        for name in ("mc/frac_level/2", "mc/lod_loss/1", "mc/nll_last/16/random", "mc/adv_delta_mean"):
            assert f"{name}: {metrics[name]:.4f}" in line


def read_log_scales(path: str) -> list[list[float]]:
    """Return the learned logarithms of the factors on sigma in a checkpoint, [layers, levels], without Megatron."""
    import torch
    import torch.distributed.checkpoint as dcp

    key = "decoder.layers.self_attention.rotary.sigma_scale.log_scale"
    state: dict[str, Any] = {key: torch.empty(2, 2)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return state[key].tolist()


def test_sigma_scalars_and_histograms_are_those_of_the_parameters(small_run, tmp_path):
    # step 3 runs with the parameters of the checkpoint after step 2
    path = small_run.save_dir / "iter_0000002"
    stored = call(read_log_scales, {"path": str(path)}, workdir=tmp_path).check().values[0]
    found = histograms(small_run)
    assert set(found) == {"mc/pos/sigma_hist/1", "mc/pos/sigma_hist/2"}
    for level in (1, 2):
        scales = [small_run.scalars(f"mc/pos/sigma_scale/{layer}/{level}") for layer in (1, 2)]
        for layer, scale in enumerate(scales):
            assert scale[2] == pytest.approx(math.exp(stored[layer][level - 1]), rel=TOLERANCE)
            assert len(set(scale)) == STEPS
            assert 1 not in scale
        means = small_run.scalars(f"mc/pos/sigma_mean/{level}")
        events = found[f"mc/pos/sigma_hist/{level}"]
        for step, (mean, event) in enumerate(zip(means, events, strict=True)):
            sigmas = [BASE_SIGMA[level] * scale[step] for scale in scales]
            assert small_run.metrics[step][f"mc/pos/sigma_hist/{level}"] == pytest.approx(sigmas, rel=TOLERANCE)
            assert mean == pytest.approx(sum(sigmas) / 2, rel=TOLERANCE)
            assert event.num == 2
            assert event.min == pytest.approx(min(sigmas), rel=TOLERANCE)
            assert event.max == pytest.approx(max(sigmas), rel=TOLERANCE)
            assert event.sum == pytest.approx(sum(sigmas), rel=TOLERANCE)


def test_validation_reports_the_last_rows_by_variant(small_run):
    recorded = small_run.values[0]["evaluation"]
    for evaluation, step in enumerate((2, 4)):
        batch = recorded[evaluation * MICRO_BATCHES : (evaluation + 1) * MICRO_BATCHES]
        assert np.array_equal(stacked(batch, "start"), [plan.start for plan in plans(VALID, evaluation * BATCH)])
        loss = stacked(batch, "loss")
        assert small_run.scalars("lm loss validation")[evaluation] == pytest.approx(loss.mean(), rel=TOLERANCE)
        for variant, name in enumerate(VARIANTS):
            expected = loss[variant::2, -CONTEXT.horizon :].mean()
            found = small_run.scalars(f"mc/nll_last/16/{name} validation")[evaluation]
            assert found == pytest.approx(expected, rel=TOLERANCE)
            assert f"validation loss at iteration {step} " in small_run.log
            assert f"mc/nll_last/16/{name} value: {found:.6E}" in small_run.log


def test_a_resumed_run_appends_and_the_last_line_of_an_iteration_holds(small_run, corpus, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(small_run.save_dir, own)
    lines = (own / METRICS_FILE).read_text().splitlines()
    # how contexts are planned is free to change on a resume
    again = {"load": own, "save": own, "ckpt_step": 2, "mc_plan": "heuristic", "mc_level2_prob": None}
    resumed = small_training(corpus, tmp_path, **again).check()
    written = (own / METRICS_FILE).read_text().splitlines()
    assert written[:STEPS] == lines
    assert [json.loads(line)["iteration"] for line in written] == [1, 2, 3, 4, 3, 4]
    read = read_metrics(own)
    assert read == [json.loads(line) for line in (*lines[:2], *written[STEPS:])]
    assert "mc/nll_last/16/heuristic" in read[-1]
    assert "mc/nll_last/16/heuristic" not in read[1]
    assert read[-1]["lm loss"] == pytest.approx(resumed.losses[-1], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ([1, 2, 3], [0, 1, 2]),
        ([1, 2, 3, 2, 3], [0, 3, 4]),
        ([10, 20, 30, 20, 25, 30, 35], [0, 3, 4, 5, 6]),
        ([1, 2, 3, 4, 1, 2], [4, 5]),
    ],
    ids=["one run", "resumed", "resumed with another interval", "started anew"],
)
def test_reading_metrics_leaves_out_what_a_later_run_replaced(tmp_path, written, kept):
    lines = [{"iteration": iteration, "line": line} for line, iteration in enumerate(written)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [entry["line"] for entry in read_metrics(tmp_path)] == kept


def test_wandb_gets_every_metric_and_histogram(small_run, corpus, tmp_path):
    wandb = {"wandb_project": "contexts", "wandb_exp_name": "small", "wandb_save_dir": tmp_path / "wandb"}
    quick = {"train_iters": 2, "lr_decay_iters": STEPS, "save": None}
    result = small_training(corpus, tmp_path, fresh=True, **wandb, **quick).check()
    assert result.losses == small_run.losses[:2]
    (file,) = (tmp_path / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    steps = wandb_history(file)
    assert sorted(steps) == [1, 2]
    for step, values in steps.items():
        line = small_run.metrics[step - 1]
        for name in scalars(line):
            assert differ(values[name], line[name]) <= TENSORBOARD_TOLERANCE, name
        for level in (1, 2):
            assert values[f"mc/pos/sigma_hist/{level}/_type"] == "histogram"
            assert sum(values[f"mc/pos/sigma_hist/{level}/values"]) == 2
    for name in VARIANTS:
        found = steps[2][f"mc/nll_last/16/{name} validation"]
        # the evaluation after training has the number of the last step too
        assert found == pytest.approx(
            result.scalars(f"mc/nll_last/16/{name} validation")[-1], rel=TENSORBOARD_TOLERANCE
        )


def wandb_history(file: Path) -> dict[int, dict[str, Any]]:
    """Return what an offline W&B run logged, by step."""
    from wandb.proto import wandb_internal_pb2

    steps: dict[int, dict[str, Any]] = {}
    for raw in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
            values = {name: json.loads(item.value_json) for name, item in items.items()}
            steps.setdefault(values["_step"], {}).update(values)
    return steps


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Return the records of a W&B file: LevelDB's log format behind a header of 7 bytes."""
    block, header, whole, last = 2**15, 7, 1, 4
    assert data.startswith(b":W&B")
    place, record = header, b""
    while place + header <= len(data):
        left = block - place % block
        if left < header:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + header : place + header + length]
        place += header + length
        if kind in (whole, last):
            yield record
            record = b""


@pytest.mark.full
def test_an_interval_of_two_steps_reports_their_mean(small_run, corpus, tmp_path):
    result = small_training(corpus, tmp_path, fresh=True, save=tmp_path / "saved", log_interval=2).check()
    assert result.losses == small_run.losses
    assert [line["iteration"] for line in result.metrics] == [2, 4]
    for line, (first, second) in zip(result.metrics, (small_run.metrics[:2], small_run.metrics[2:]), strict=True):
        assert line["lm loss"] == pytest.approx((first["lm loss"] + second["lm loss"]) / 2, rel=TOLERANCE)
        for level in LEVELS:
            counts = first[f"mc/lod_count/{level}"], second[f"mc/lod_count/{level}"]
            assert line[f"mc/lod_count/{level}"] == sum(counts) / 2
        for name in VARIANTS:
            values = [each[f"mc/nll_last/16/{name}"] for each in (first, second)]
            assert line[f"mc/nll_last/16/{name}"] == pytest.approx(sum(values) / 2, rel=TOLERANCE)


HEADS = {"gaussian_rope_learnable_sigma": "head"}
LAYOUTS = {
    **TWO_RANKS,
    "virtual stages": {**PP, "num_layers": 4, "num_layers_per_virtual_pipeline_stage": 1},
    "heads over tp": {**TP, **HEADS},
    "heads over pp": {**PP, **HEADS},
    "a layer without rotary": {**PP, "no_rope_freq": "([0]*1+[1]*1)"},
}
ONE_PROCESS = {
    name: {key: value for key, value in flags.items() if key in ("num_layers", "no_rope_freq", *HEADS)}
    for name, flags in LAYOUTS.items()
}


@pytest.fixture(scope="module")
def one_process(small_run, corpus, tmp_path_factory):
    """Train in one process, once for each model, and return the run and the checkpoint it started from."""
    made: dict[str, tuple[TrainResult, Path]] = {}

    def train(model: dict[str, Any]) -> tuple[TrainResult, Path]:
        key = repr(model)
        if key not in made:
            folder = tmp_path_factory.mktemp("one")
            saved = small_run.save_dir
            if model:
                saved = folder / "start"
                start = {"train_iters": 1, "save_interval": 1, "eval_iters": 0}
                small_training(corpus, folder / "make", fresh=True, save=saved, **start, **model).check()
            run = {"load": saved, "finetune": True, "train_iters": 2, "save": folder / "saved"}
            made[key] = small_training(corpus, folder, **run, **model).check(), saved
        return made[key]

    return train


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_log_what_one_process_logs(one_process, corpus, tmp_path, name):
    expected, saved = one_process(ONE_PROCESS[name])
    run = {"load": saved, "finetune": True, "train_iters": 2, "save": tmp_path / "saved"}
    result = small_training(corpus, tmp_path, 2, **run, **LAYOUTS[name]).check()
    assert len(result.metrics) == 2
    for line, right in zip(result.metrics, expected.metrics, strict=True):
        assert line.keys() == right.keys()
        for key in scalars(line):
            assert differ(line[key], right[key]) <= TOLERANCE, key
        for level in (1, 2):
            sigmas, expected_sigmas = (each[f"mc/pos/sigma_hist/{level}"] for each in (line, right))
            assert sigmas == pytest.approx(expected_sigmas, rel=TOLERANCE)
    assert result.tags("") == expected.tags("")
    for tag in (*result.tags("mc/"), "lm loss validation", "grad-norm"):
        for value, right in zip(result.scalars(tag), expected.scalars(tag), strict=True):
            assert differ(value, right) <= TOLERANCE, tag
    assert_same_histograms(histograms(result), histograms(expected))
    assert sum(line.startswith(" megacontext iteration") for line in result.log.splitlines()) == 2


def assert_same_histograms(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    assert found.keys() == expected.keys() == {"mc/pos/sigma_hist/1", "mc/pos/sigma_hist/2"}
    for tag in found:
        for event, right in zip(found[tag], expected[tag], strict=True):
            assert event.num == right.num
            for moment in ("min", "max", "sum", "sum_squares"):
                assert differ(getattr(event, moment), getattr(right, moment)) <= TOLERANCE, tag


@pytest.mark.full
def test_a_layer_without_rotary_has_no_sigma(one_process):
    result, _ = one_process(ONE_PROCESS["a layer without rotary"])
    assert result.tags("mc/pos/sigma_scale/") == ["mc/pos/sigma_scale/1/1", "mc/pos/sigma_scale/1/2"]
    for events in histograms(result).values():
        assert [event.num for event in events] == [1, 1]


@pytest.mark.full
def test_runs_without_learned_sigma_report_the_rule(corpus, tmp_path):
    quick = {"train_iters": 1, "eval_iters": 0, "save": tmp_path / "saved"}
    result = small_training(corpus, tmp_path, **quick, gaussian_rope_learnable_sigma=None).check()
    assert result.tags("mc/pos/sigma_scale") == []
    for level in (1, 2):
        assert result.scalars(f"mc/pos/sigma_mean/{level}") == [pytest.approx(BASE_SIGMA[level], rel=TOLERANCE)]
        assert histograms(result)[f"mc/pos/sigma_hist/{level}"][0].num == 1


@pytest.mark.full
def test_a_stock_run_reports_its_tokens(corpus, tmp_path):
    quick = {"train_iters": 1, "eval_iters": 0, "save": tmp_path / "saved", "position_embedding_type": "rope"}
    result = small_training(corpus, tmp_path, **{**TOKENS_ONLY, **quick}).check()
    (line,) = result.metrics
    assert [name for name in line if name.startswith("mc/pos")] == []
    assert line["mc/compression"] == line["mc/span_width_mean"] == line["mc/frac_level/0"] == 1
    assert line["mc/lod_loss/0"] == pytest.approx(result.losses[0], rel=TOLERANCE)
    assert line["mc/lod_count/0"] == BATCH * SMALL["seq_length"]
    assert "mc/nll_last/64/recency" in line
    assert "mc/adv_delta_mean" not in line
