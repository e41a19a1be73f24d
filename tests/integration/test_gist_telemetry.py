"""What a run says of learned gists: how they move, what rows predict of them, and the terms of its objective."""

# Recorders are planted here by hand.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megacontext_megatron.telemetry.names import TABLE
from megacontext_megatron.telemetry.watching import BINS
from tests import mutations
from tests.integration.test_telemetry import wandb_history
from tests.launch import TrainResult, train
from tests.parity import CP, TP_SP
from tests.small import MICRO_BATCHES, small_flags

FLAGS = {
    "mc_gist_kind": "gistnet",
    "mc_gist_hidden_size": 16,
    "mc_gist_layers": 1,
    "mc_gist_span_head": True,
    "mc_loss_advantage": 0.2,
    "mc_loss_contrast": 0.2,
    "mc_predict_level1": 0.2,
    "mc_predict_level2": 0.1,
    "lr": 1e-2,
    "train_iters": 3,
    "save_interval": 3,
    "eval_iters": 0,
}
BASE_SIGMA = {level: math.sqrt((8 ** (2 * level) - 1) / 12) for level in (1, 2)}
TOLERANCE = 1e-5
BIN = 2 * math.log(4) / BINS
LAYOUTS = {"tp and sp": TP_SP, "cp": CP, "dp": {}}


def trained(corpus: Path, workdir: Path, ranks: int = 1, **flags: Any) -> TrainResult:
    """Train the small run with everything that its gists can be told by."""
    given = {**FLAGS, "save": workdir / "saved", **flags}
    return train(small_flags(corpus, **given), ranks, workdir=workdir, before=heard).check()


def heard() -> Callable[[], dict[str, list[Any]]]:
    """Record what is heard of every micro-batch: moved rows, and the sums of rows and gists."""
    from megacontext_megatron.telemetry.observer import TrainingObserver
    from megacontext_megatron.telemetry.watching import Watch

    mutations.spread_parameters()
    seen: dict[str, list[Any]] = {"moves": [], "gists": [], "rows": []}
    real_moves, real_gists, real_rows = Watch.hear_moves, Watch.hear_gists, TrainingObserver.hear

    def moves(self: Watch, shift: Any, spans: Any) -> None:
        values = {"level": spans.level, "offset": shift.offset.detach(), "log_scale": shift.log_scale.detach()}
        seen["moves"].append({name: value.flatten().tolist() for name, value in values.items()})
        real_moves(self, shift, spans)

    def gists(self: Watch, sums: Any) -> None:
        seen["gists"].append({name: value.tolist() for name, value in sums.items()})
        real_gists(self, sums)

    def rows(self: TrainingObserver, sums: Any) -> None:
        told = ("term/", "predict/")
        seen["rows"].append({name: value.tolist() for name, value in sums.items() if name.startswith(told)})
        real_rows(self, sums)

    Watch.hear_moves, Watch.hear_gists, TrainingObserver.hear = moves, gists, rows
    return lambda: seen


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory) -> dict[str, Any]:
    """The flags that start from a checkpoint of one process."""
    return {"load": trained(corpus, tmp_path_factory.mktemp("start")).save_dir, "finetune": True}


@pytest.fixture(scope="module")
def run(corpus, start, tmp_path_factory) -> TrainResult:
    """A run in one process."""
    return trained(corpus, tmp_path_factory.mktemp("one"), **start)


def of_step(run: TrainResult, kind: str, step: int) -> list[dict[str, Any]]:
    """Return what was heard in a step, counted from 0."""
    return run.values[0][kind][step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]


def test_moves_are_those_of_the_rows(run):
    for step, line in enumerate(run.metrics):
        for level in (1, 2):
            batches = of_step(run, "moves", step)
            offsets, scales = [], []
            for batch in batches:
                rows = [row for row, found in enumerate(batch["level"]) if found == level]
                offsets += [abs(batch["offset"][row]) for row in rows]
                scales += [math.exp(batch["log_scale"][row]) for row in rows]
            assert offsets
            assert any(offset > 1e-4 for offset in offsets)
            assert line[f"mc/pos/offset_mean_abs/{level}"] == pytest.approx(sum(offsets) / len(offsets), rel=TOLERANCE)
            learned = [line[f"mc/pos/sigma_scale/{layer}/{level}"] for layer in (1, 2)]
            mean = BASE_SIGMA[level] * sum(learned) / 2 * sum(scales) / len(scales)
            assert line[f"mc/pos/sigma_mean/{level}"] == pytest.approx(mean, rel=TOLERANCE)
            histogram = line[f"mc/pos/sigma_hist/{level}"]
            least, most = (BASE_SIGMA[level] * pick(learned) * pick(scales) for pick in (min, max))
            assert least * math.exp(-BIN) <= min(histogram) <= max(histogram) <= most * math.exp(BIN)


def test_terms_are_means_over_micro_batches(run):
    for step, line in enumerate(run.metrics):
        rows, gists = of_step(run, "rows", step), of_step(run, "gists", step)
        for name in ("advantage", "predict_level1", "predict_level2"):
            values = [batch[f"term/{name}"][0][0] for batch in rows]
            assert line[f"mc/term/{name}"] == pytest.approx(sum(values) / MICRO_BATCHES, rel=TOLERANCE)
        for name, metric in (("contrast", "mc/term/contrast"), ("spread", "mc/gist/spread")):
            total, count = (sum(batch[name][0][part] for batch in gists) for part in (0, 1))
            assert line[metric] == pytest.approx(total / count, rel=TOLERANCE)
        assert "mc/term/pooling" not in line


def test_predictions_are_means_over_rows(run):
    names = {"loss": "loss", "agreement": "agreement", "accept": "accept_rate"}
    for step, line in enumerate(run.metrics):
        rows = of_step(run, "rows", step)
        for level in (1, 2):
            for name, metric in names.items():
                total, count = (sum(batch[f"predict/{name}"][level - 1][part] for batch in rows) for part in (0, 1))
                assert line[f"mc/mp/{metric}/{level}"] == pytest.approx(total / count, rel=TOLERANCE)
            for row_level in (0, 1, 2):
                place = (level - 1) * 3 + row_level
                total, count = (sum(batch["predict/by_width"][place][part] for batch in rows) for part in (0, 1))
                metric = f"mc/mp/agreement/{level}/from/{row_level}"
                assert (metric in line) == (count > 0)
                if count:
                    assert line[metric] == pytest.approx(total / count, rel=TOLERANCE)
        assert "mc/mp/agreement/1/from/1" in line


def test_every_metric_is_in_the_table(run):
    templates = [re.sub(r"\\{\w+\\}", ".+", re.escape(metric.name)) for metric in TABLE]
    for name in run.metrics[-1].keys() - {"iteration", "consumed_samples"}:
        assert any(re.fullmatch(template, name) for template in templates), name


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_report_what_one_process_reports(run, start, corpus, tmp_path, name):
    result = trained(corpus, tmp_path, 2, **start, **LAYOUTS[name])
    first, expected = result.metrics[0], run.metrics[0]
    assert first.keys() == expected.keys()
    for key, value in expected.items():
        # a prediction nearer to another gist by a rounding error counts for one of many
        assert first[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), key


def test_wandb_knows_the_track(corpus, start, tmp_path):
    wandb = {"wandb_project": "contexts", "wandb_exp_name": "gists", "wandb_save_dir": tmp_path / "wandb"}
    result = trained(corpus, tmp_path, **start, **wandb, train_iters=1)
    (file,) = (tmp_path / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    values = wandb_history(file)[1]
    (line,) = result.metrics
    for name in ("mc/grad/gist/answer", "mc/mp/agreement/1", "mc/gist/spread", "mc/term/contrast"):
        assert values[name] == pytest.approx(line[name], rel=1e-6)
    assert wandb_config(file)["mc/track"] == "A"


def wandb_config(file: Path) -> dict[str, Any]:
    """Return the configuration that an offline W&B run ended with."""
    import json

    from wandb.proto import wandb_internal_pb2

    from tests.integration.test_telemetry import wandb_records

    config: dict[str, Any] = {}
    for raw in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else ()
        config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    return config
