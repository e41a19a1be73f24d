"""Group K: what a run of it asks for and reads, what it predicts, and the whole group on the real command."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks import gist_cost, training
from scripts.benchmarks.gate import Findings, GateFailed
from scripts.benchmarks.gist_cost import CASES, WORK, Case, Outcome
from scripts.benchmarks.on_demand import READY
from scripts.benchmarks.options import Options

ROOT = Path(__file__).parents[2]
CASE = Case(ratio=4, variants=2)
OUTCOMES = {
    "mean": [Outcome(seconds=0.09, first_loss=10.5), Outcome(seconds=0.08, first_loss=10.5)],
    "gistnet": [Outcome(seconds=0.10, first_loss=10.5), Outcome(seconds=0.10, first_loss=10.5)],
}
TINY_MODEL = {
    **{
        name: value
        for name, value in training.MODEL.items()
        if name not in {"transformer_impl", "bf16", "use_distributed_optimizer"}
    },
    **{"cpu": True, "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 320},
    **{"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 16, "null_tokenizer_eod_id": 319},
}
TINY = training.Workload(
    rows=128, source=512, recent=64, micro_batch=2, global_batch=4, steps=6, interval=2, warm_up=2, model=TINY_MODEL
)


def test_the_share_is_that_of_the_step_with_gistnet():
    row = gist_cost.row(WORK, CASE, OUTCOMES)
    predicted, measured = row.readings
    assert measured.rounds == pytest.approx((10.0, 20.0))
    assert predicted.rounds == pytest.approx((100 * gist_cost.predicted_share(WORK, CASE),))
    assert row.ratios()[0].value == pytest.approx(15.0 / predicted.value)


def test_the_prediction_grows_with_the_tokens_of_a_row():
    shares = {case: gist_cost.predicted_share(WORK, case) for case in CASES}
    # four times the tokens in four times the variants are as many tokens to a context
    assert shares[Case(ratio=16, variants=4)] == pytest.approx(shares[Case(ratio=4, variants=1)])
    odds = {case: share / (1 - share) for case, share in shares.items()}
    for ratio in (4, 16):
        assert odds[Case(ratio=ratio, variants=1)] == pytest.approx(4 * odds[Case(ratio=ratio, variants=4)])
    assert 0.01 < min(shares.values()) < max(shares.values()) < 0.5


def test_the_model_is_counted_as_its_products_are():
    h, ffn, vocabulary = (WORK.model[name] for name in ("hidden_size", "ffn_hidden_size", "vocab_size"))
    attention = h * h * (2 + 2 * WORK.model["num_query_groups"] / WORK.model["num_attention_heads"])
    layer = attention + 3 * h * ffn + h * WORK.rows
    whole = 6 * WORK.rows_per_step * (WORK.model["num_layers"] * layer + h * vocabulary)
    entry = 3 * 1024 * 512 + 2 * (12 * 512**2 + 2 * 32 * 512) + 512 * 1024 / 32
    gists = 6 * WORK.global_batch / 2 * 4096 * (1 + 1 / 32) * entry
    assert gist_cost.predicted_share(WORK, CASE) == pytest.approx(gists / (whole + gists))


def test_runs_of_a_case_differ_only_in_their_gists():
    mean, learned = (gist_cost.flags(WORK, CASE, kind, Path("data")) for kind in gist_cost.KINDS)
    assert mean[:-1] == learned[:-1]
    assert (mean[-1], learned[-1]) == ("mean", "gistnet")
    other = gist_cost.flags(WORK, Case(ratio=16, variants=4), "mean", Path("data"))
    changed = {old: new for old, new in zip(mean, other, strict=True) if old != new}
    assert changed == {"4096": "16384", "2": "4"}


def test_another_first_loss_stops_the_group():
    assert gist_cost.check(CASE, OUTCOMES).passed
    moved = {**OUTCOMES, "gistnet": [dataclasses.replace(OUTCOMES["gistnet"][0], first_loss=10.50002)]}
    with pytest.raises(GateFailed, match="C/W = 4, V = 2"):
        Findings().require([gist_cost.check(CASE, moved)])


def test_a_run_that_was_given_up_does_not_train(tmp_path):
    words = ["--cpu", "--seq-length", "128", "--eval-interval", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.on_demand", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == READY


@pytest.mark.full
def test_the_group_measures_the_real_command(tmp_path):
    found, options = Findings(), Options(rounds=1, out=tmp_path)
    gist_cost.measure(TINY, [CASE], options, found)
    (row,) = found.rows
    assert row.case == "C/W = 4, V = 2"
    mean, learned = map(float, re.findall(r"([\d.]+) ms", found.notes[0]))
    # times are printed to a tenth of a millisecond
    assert row.readings[1].value == pytest.approx(100 * (1 - mean / learned), abs=10 / learned * (1 + mean / learned))
    assert [check.passed for check in found.checks] == [True]
    logs = [log.read_text() for log in sorted(tmp_path.glob("gist-cost-0-*.log"))]
    parameters = [int(count) for log in logs for count in re.findall(r"number of parameters on .*: (\d+)", log)]
    assert parameters == sorted(set(parameters))
    assert len(parameters) == 2
    with pytest.raises(RuntimeError, match="--mc-source-length 520 must be a multiple"):
        next(
            gist_cost.train_each(
                [[*gist_cost.flags(TINY, CASE, "mean", tmp_path), "--mc-source-length", "520"]], TINY, tmp_path
            )
        )
