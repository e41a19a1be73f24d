"""The benchmarks' own logic: ratios and targets, groups that stop, JSON, figure, training, command line."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from scripts import bench
from scripts.benchmarks import (
    figure,
    layer_step,
    report,
    results,
    training,
)
from scripts.benchmarks.inputs import SHAPES, Shape
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import Check, Comparison, GroupResult, Reading, Row, at_least, at_most
from tests.launch import call

ROOT = Path(__file__).parents[2]
ROW = Row(
    case="4096x4",
    readings=(
        Reading(name="copy of q and k", rounds=(87.0, 88.0, 86.0), host=9.0),
        Reading(name="ours", rounds=(87.0, 86.0, 90.0), host=40.0),
        Reading(name="Liger", absent="ModuleNotFoundError: No module named 'liger_kernel'"),
    ),
    comparisons=(
        Comparison(over="ours", under="copy of q and k", target=at_most(1.03)),
        Comparison(over="ours", under=results.FLOOR),
        Comparison(over="copy of q and k", under="ours", target=at_least(1.75)),
        Comparison(over="Liger", under="ours", target=at_least(1.0)),
    ),
    floor_bytes=2 * SHAPES[1].qk_bytes,
)
PRECISION = tuple(
    Row(
        case=f"centres near {size:.3g}",
        readings=(Reading(name="ours", rounds=(2e-7,)), Reading(name="Megatron-Core", rounds=(min(2.0, size * 3e-8),))),
        comparisons=(Comparison(over="ours", target=at_most(1e-6)),),
        unit="max |error|",
    )
    for size in (1e3, 1e6, 1e9)
)
GROUPS = (
    GroupResult(
        group="A", title="rotary", rows=(ROW,), checks=(Check(name="q", error=1e-3, tolerance=4e-3),), seconds=1.5
    ),
    GroupResult(group="G", title="precision", rows=PRECISION),
    GroupResult(group="C", title="norm", checks=(Check(name="k", error=math.inf, tolerance=4e-3),), stopped="wrong"),
)
MACHINE = {"gpus": ["NVIDIA H200"], "torch": "2.11.0", "transformer-engine": None}


# ratios and targets


def test_ratios_are_of_medians_and_spread_over_rounds():
    copy, floor, over, absent = ROW.ratios()
    assert copy.value == 1.0
    assert (copy.low, copy.high) == (86.0 / 88.0, 90.0 / 86.0)
    assert floor.value == pytest.approx(87.0 / 78.03, rel=1e-3)
    assert over.value == 1.0
    assert math.isnan(absent.value)
    assert [r.verdict for r in (copy, floor, over, absent)] == ["pass", "", "miss", "absent"]


@pytest.mark.parametrize(
    ("target", "met", "missed"),
    [(at_most(1.03), 1.03, 1.0301), (at_least(0.97), 0.97, 0.9699), (at_most(1), 0, math.nan)],
)
def test_targets_include_their_bound_and_exclude_nan(target, met, missed):
    assert target.met(met)
    assert not target.met(missed)


def test_a_comparison_without_a_divisor_is_the_value():
    (ratio,) = PRECISION[0].ratios()
    assert ratio.comparison.name == "ours"
    assert ratio.value == 2e-7
    assert ratio.verdict == "pass"


def test_a_failed_gate_stops_its_group():
    def run(found):
        found.require([Check(name="key", error=0.001, tolerance=0.004)])
        found.rows.append(ROW)
        found.require([Check(name="query", error=0.5, tolerance=0.004)])
        found.rows.append(ROW)

    found = bench.run_group("A", "rotary", run)
    assert found.stopped == "wrong results, query: 5.00e-01 > 4.00e-03"
    assert [check.error for check in found.checks] == [0.001, 0.5]
    assert found.rows == (ROW,)


def test_an_error_stops_its_group_and_is_named(capsys):
    found = bench.run_group("B", "rotary", lambda found: found.rows.append(1 / 0))
    assert found.stopped == "ZeroDivisionError: division by zero"
    assert "STOPPED: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is there")
def test_what_cannot_run_is_absent_and_no_error(capsys):
    found = bench.run_group("J", "layer", partial(layer_step.run, Options()))
    assert not found.stopped
    assert found.notes == ("Absent: ModuleNotFoundError: No module named 'transformer_engine'",)
    assert "Absent: " in capsys.readouterr().out


# what is kept


def test_json_holds_everything_and_no_nan():
    document = as_loaded()
    assert document["schema"] == results.SCHEMA
    assert document["machine"] == MACHINE
    first, _, stopped = document["groups"]
    (row,) = first["rows"]
    assert [set(reading) for reading in row["readings"]] == [
        {"name", "median", "low", "high", "rounds", "host_us", "absent"}
    ] * 3
    assert row["readings"][1] == {
        "name": "ours",
        "median": 87.0,
        "low": 86.0,
        "high": 90.0,
        "rounds": [87.0, 86.0, 90.0],
        "host_us": 40.0,
        "absent": "",
    }
    assert row["readings"][2]["median"] is None
    assert [(r["target"], r["verdict"]) for r in row["ratios"]] == [
        ("<= 1.03", "pass"),
        ("", ""),
        (">= 1.75", "miss"),
        (">= 1", "absent"),
    ]
    assert first["checks"] == [{"name": "q", "error": 1e-3, "tolerance": 4e-3, "passed": True}]
    assert stopped["stopped"] == "wrong"
    assert stopped["checks"][0]["error"] is None
    assert not stopped["checks"][0]["passed"]


def as_loaded():
    """Return the recorded groups as they come back from a file."""
    return json.loads(json.dumps(results.as_json(MACHINE, GROUPS), allow_nan=False))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_drawn_from_json(tmp_path, ending):
    path = tmp_path / f"bench.{ending}"
    figure.draw(as_loaded(), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 5000


def test_rotary_groups_show_their_last_shape():
    cases = ["4096x1", "4096x4, forward", "4096x4, backward: q, k"]
    group = {"group": "B", "title": "rotary", "rows": [{"case": case} for case in cases]}
    shown = figure._last_shape(group)
    assert shown["title"] == "rotary, 4096x4"
    assert [row["case"] for row in shown["rows"]] == ["forward", "backward: q, k"]
    assert figure._last_shape({**group, "group": "J"})["rows"] == group["rows"]


def test_there_is_no_figure_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        figure.draw(results.as_json(MACHINE, GROUPS[2:]), tmp_path / "bench.png")
    bench.keep(dict(MACHINE), GROUPS[2:], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_printed_tables_say_what_missed():
    lines = list(report.group_lines(GROUPS[0]))
    assert any("1 of 1 passed" in line for line in lines)
    assert sum("| MISS |" in line for line in lines) == 1
    assert any(line.startswith("| 4096x4 | Liger | absent | ModuleNotFoundError") for line in lines)
    assert any("STOPPED: wrong" in line for line in report.group_lines(GROUPS[2]))
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {7}


@pytest.mark.parametrize(("error", "closest"), [(0.0, "near"), (1e-30, "bits")])
def test_equal_bits_are_no_closer_than_an_error_within_its_tolerance(error, closest):
    checks = (Check(name="bits", error=error, tolerance=0.0), Check(name="near", error=1e-3, tolerance=4e-3))
    result = GroupResult(group="H", title="appends", checks=checks, seconds=1.0)
    line = next(line for line in report.group_lines(result) if line.startswith("Gates:"))
    assert f"closest to its tolerance {closest}," in line
    assert f"{2 - bool(error)} of 2 passed" in line


# training


LOG = """
 [2026-11-22 12:05:49.364700] iteration        5/      40 | consumed samples:           40 | elapsed time per iteration (ms): 1210.5 | learning rate: 3.25E-05 |
 megacontext iteration        5 | mc/lod_loss/0: 10.3886
 [2026-11-22 12:05:52.364700] iteration       10/      40 | consumed samples:           80 | elapsed time per iteration (ms): 610.0 | learning rate: 3.25E-05 |
 [2026-11-22 12:05:55.364700] iteration       15/      40 | consumed samples:          120 | elapsed time per iteration (ms): 600.0 | learning rate: 3.25E-05 |
"""  # noqa: E501  (lines as Megatron logs them)


def test_steps_are_read_from_the_log_and_warm_up_is_left_out():
    steps = training.parsed(LOG)
    assert steps == [(5, 1.2105), (10, 0.61), (15, 0.6)]
    assert training.after(steps, training.Workload()) == [0.6]
    with pytest.raises(ValueError, match="step 10"):
        training.after(steps[:2], training.Workload())


@pytest.mark.parametrize("layout", [training.ONE, *training.TWO])
def test_arms_differ_only_in_positions_and_contexts(layout):
    work = training.Workload()
    plain, ours = (training.flags(work, layout, arm, Path("data")) for arm in (training.PLAIN, results.OURS))
    extra = [word for word in ours if word not in plain and word.startswith("--")]
    assert all((word.startswith("--m") and "mc" in word) or word == "--megacontext" for word in extra)
    assert plain[: plain.index("--position-embedding-type") + 1] == ours[: ours.index("--position-embedding-type") + 1]
    assert training.layouts(1) == (training.ONE,)
    assert training.layouts(8) == training.TWO


@pytest.mark.full
def test_training_measures_the_real_command(tmp_path):
    model = {
        name: value
        for name, value in training.MODEL.items()
        if name not in {"transformer_impl", "bf16", "use_distributed_optimizer", "no_gradient_accumulation_fusion"}
    }
    model |= {"cpu": True, "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 320}
    model |= {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 16, "null_tokenizer_eod_id": 319}
    work = training.Workload(
        rows=128, source=1024, recent=64, global_batch=2, steps=4, interval=2, warm_up=2, model=model
    )
    data = training.write_data(tmp_path, work)
    assert training.write_data(tmp_path, work) == data
    steps = training.train(training.flags(work, training.ONE, results.OURS, data), 1, tmp_path / "run.log")
    assert [iteration for iteration, _ in steps][-2:] == [2, 4]
    assert all(seconds > 0 for _, seconds in steps)
    with pytest.raises(RuntimeError, match="--mc-source-length 1000 must be a multiple"):
        training.train(
            training.flags(dataclasses.replace(work, source=1000), training.ONE, results.OURS, data),
            1,
            tmp_path / "refused.log",
        )


# one layer


def layer_gate() -> list[tuple[str, bool]]:
    """Build small layers without a GPU, check them as group J does, and run each contender's step."""
    from megacontext_megatron import cpu

    cpu.install()
    size = layer_step.Size(
        hidden=128, ffn=256, query_heads=4, groups=2, impl="local", dtype=torch.float32, device="cpu"
    )
    checks = []
    with cpu.pretended_device(), layer_step.one_rank("gloo"):
        for qk_norm in (False, True):
            layers = layer_step.Layers.built(size, qk_norm=qk_norm, learned=True)
            checks += layer_step.gate(layers, rows=192)
            for contender in layer_step.case(layers, Shape(rows=64, batch=1), qk_norm).contenders:
                assert contender.call is not None
                contender.call()
            learned = layers.layers[layer_step.LEARNED]
            (gradient,) = (p.grad for name, p in learned.named_parameters() if name.endswith("log_scale"))
            assert gradient is not None
            checks.append(Check(name="d sigma", error=0.0, tolerance=float(gradient.norm()) - 1e-12))
    return [(check.name, check.passed) for check in checks]


def test_layers_agree_where_they_must(tmp_path):
    (found,) = call(layer_gate, workdir=tmp_path).check().values
    assert len(found) == 10
    assert all(passed for _, passed in found), found


# the command line


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd="/",
        timeout=60,
    )


def test_without_a_gpu_one_sentence_says_so(tmp_path):
    run = command("--out", str(tmp_path / "out"))
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == "scripts/bench.py needs a GPU that PyTorch can use, and there is none."
    assert not (tmp_path / "out").exists()


def test_help_and_list_need_no_gpu():
    for word in ("--help", "--list"):
        run = command(word)
        assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(bench.GROUPS)


def test_a_figure_can_be_drawn_again(tmp_path):
    (tmp_path / "first").mkdir()
    bench.keep(dict(MACHINE), GROUPS, tmp_path / "first")
    run = command("--draw", str(tmp_path / "first" / "bench.json"), "--out", str(tmp_path / "second"))
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "second" / "bench.png").read_bytes() == (tmp_path / "first" / "bench.png").read_bytes()


def test_groups_are_letters():
    assert bench.groups_of("a,G,a") == ("A", "G")
    for text in ("X", "A,X", ""):
        with pytest.raises(SystemExit):
            bench.parser().parse_args(["--groups", text])


def test_every_group_has_a_module():
    for letter, (name, _) in bench.GROUPS.items():
        module = importlib.import_module(f"scripts.benchmarks.{name}")
        assert module.TITLE, letter
        assert callable(module.run)
