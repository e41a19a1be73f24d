"""Group K: GistNet's share of a training step, measured and as its floating-point operations predict."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripts.benchmarks import training
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.on_demand import READY
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import OURS, Check, Comparison, Reading, Row

TITLE = "GistNet's share of a training step"
UNIT = "% of the step"
MEASURED = "measured"
PREDICTED = "predicted from FLOPs"
KINDS = ("mean", "gistnet")
BUDGET = 165.0
"""Seconds within which another round is expected to end, or is not begun."""

RUN_LIMIT = 90.0
"""Seconds after which one run has failed."""

PRINTED = 1e-6
"""Relative precision of the losses that Megatron prints."""

_LOSS = re.compile(r"iteration\s+1/.*?lm loss: ([\d.E+-]+)")
_TAIL_LINES = 60

MODEL: Mapping[str, Any] = {
    **training.MODEL,
    "num_layers": 12,
    "hidden_size": 1024,
    "ffn_hidden_size": 2816,
    "kv_channels": 64,
}
"""A model of 0.2 billion parameters, by flag."""

WORK = training.Workload(
    rows=1024, source=4096, recent=128, micro_batch=8, global_batch=16, steps=24, interval=4, warm_up=8, model=MODEL
)
"""What is common to all runs; the source is that of the first case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Contexts of `ratio` tokens to a row, `variants` of each raw sample; rows in a step are the same in every case."""

    ratio: int
    variants: int

    @property
    def name(self) -> str:
        """The printed name."""
        return f"C/W = {self.ratio}, V = {self.variants}"

    def work(self, work: training.Workload) -> training.Workload:
        """Return the workload with this case's source."""
        return replace(work, source=self.ratio * work.rows)


CASES = tuple(Case(ratio=ratio, variants=variants) for ratio in (4, 16) for variants in (1, 2, 4))


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One run: its median seconds per step and the loss of its first step."""

    seconds: float
    first_loss: float


def run(options: Options, found: Findings) -> None:
    """Train every case with mean gists and with GistNet, in turn, as often as the budget allows."""
    cases = CASES[1:2] if options.quick else CASES
    measure(WORK, cases, options, found)


def measure(work: training.Workload, cases: Sequence[Case], options: Options, found: Findings) -> None:
    """Fill in the rows, a note for each case, and the check that both kinds start from the same loss."""
    data = training.write_data(options.out / "gist-cost-data", replace(work, source=cases[-1].ratio * work.rows))
    outcomes: dict[Case, dict[str, list[Outcome]]] = {case: {kind: [] for kind in KINDS} for case in cases}
    started = time.monotonic()
    for turn in range(1 if options.quick else options.rounds):
        if turn and (time.monotonic() - started) * (turn + 1) / turn > BUDGET:
            break
        # the kind that came first comes second in the next round
        order = [(case, kind) for case in cases for kind in KINDS[:: 1 if turn % 2 == 0 else -1]]
        lines = [flags(work, case, kind, data) for case, kind in order]
        for (case, kind), outcome in zip(order, train_each(lines, work, options.out, turn), strict=True):
            outcomes[case][kind].append(outcome)
    for case in cases:
        found.rows.append(row(work, case, outcomes[case]))
        times = {kind: statistics.median(o.seconds for o in outcomes[case][kind]) * 1e3 for kind in KINDS}
        found.notes.append(f"{case.name}: mean {times['mean']:.1f} ms a step, GistNet {times['gistnet']:.1f} ms.")
    found.notes.append(
        f"Rounds: {len(outcomes[cases[0]]['mean'])}; {work.rows_per_step} rows a step in every run; medians over "
        f"intervals of {work.interval} steps after the first {work.warm_up} of {work.steps}."
    )
    found.require([check(case, outcomes[case]) for case in cases])


def row(work: training.Workload, case: Case, outcomes: Mapping[str, Sequence[Outcome]]) -> Row:
    """Return a case's share as measured in every round, and as predicted."""
    shares = [
        100.0 * (1.0 - mean.seconds / learned.seconds)
        for mean, learned in zip(outcomes["mean"], outcomes["gistnet"], strict=True)
    ]
    return Row(
        case=case.name,
        readings=(
            Reading(name=PREDICTED, rounds=(100.0 * predicted_share(work, case),)),
            Reading(name=f"{OURS}, {MEASURED}", rounds=tuple(shares)),
        ),
        comparisons=(Comparison(over=f"{OURS}, {MEASURED}", under=PREDICTED),),
        unit=UNIT,
    )


def check(case: Case, outcomes: Mapping[str, Sequence[Outcome]]) -> Check:
    """Compare the first losses: GistNet starts as the mean, so they are those of the same training."""
    mean, learned = (outcomes[kind][0].first_loss for kind in KINDS)
    return Check(name=f"first loss, {case.name}", error=abs(learned - mean) / abs(mean), tolerance=PRINTED)


def predicted_share(work: training.Workload, case: Case) -> float:
    """Return GistNet's part of a step's operations, forward and backward, as Megatron and telemetry.flops count."""
    from megatron.training.training import num_floating_point_operations

    from megacontext_megatron.telemetry.flops import gist_flops

    model = work.model
    counted = SimpleNamespace(
        **{
            **dict.fromkeys(_ABSENT),
            **{name: model[name] for name in _COUNTED},
            "seq_length": work.rows,
            "padded_vocab_size": model["vocab_size"],
        }
    )
    whole = num_floating_point_operations(counted, work.global_batch)
    gists = gist_flops(settings(work, case), work.global_batch)
    return gists / (whole + gists)


_COUNTED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "swiglu",
)
_ABSENT = (
    "num_experts",
    "mtp_num_layers",
    "moe_ffn_hidden_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "multi_latent_attention",
    "attention_output_gate",
    "experimental_attention_variant",
    "hybrid_layer_pattern",
)
"""Arguments that Megatron's count reads: those of the model, and those of parts that it does not have."""


def settings(work: training.Workload, case: Case) -> Any:
    """Return the settings of a case's GistNet run, as far as its operations depend on them."""
    from megacontext_megatron.config import ContextConfig, GistConfig, RotaryConfig, Settings

    hidden = work.model["hidden_size"]
    return Settings(
        encoding="gaussian_rope",
        rotary=RotaryConfig(head_dim=work.model["kv_channels"]),
        context=ContextConfig(
            window=work.rows,
            source_length=case.ratio * work.rows,
            variants=case.variants,
            recent_tokens=work.recent,
        ),
        gist=GistConfig(hidden=hidden, kind="gistnet", hidden_size=min(hidden, 512)),
    )


def flags(work: training.Workload, case: Case, kind: str, data: Path) -> list[str]:
    """Return the command line of one run."""
    words = training.flags(case.work(work), training.ONE, OURS, data)
    return [*words, "--mc-variants", str(case.variants), "--mc-gist-kind", kind]


def train_each(lines: Sequence[Sequence[str]], work: training.Workload, out: Path, turn: int = 0) -> Iterator[Outcome]:
    """Run the training command with each command line, one after another, and yield what each showed.

    All load their libraries before the first begins.  Raises RuntimeError with the end of the log of a run that fails
    or takes too long.
    """
    logs = [out / f"gist-cost-{turn}-{number:02d}.log" for number in range(len(lines))]
    waiting = [_prepared(words, log) for words, log in zip(lines, logs, strict=True)]
    try:
        for process, log in zip(waiting, logs, strict=True):
            _await_ready(process, log)
        for process, log in zip(waiting, logs, strict=True):
            yield _outcome(_finished(process), log, work)
    finally:
        for process in waiting:
            process.kill()
            process.wait()


def _prepared(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a training that waits to be told to begin."""
    command = [sys.executable, "-m", "scripts.benchmarks.on_demand", *words]
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "4", **os.environ, "PYTHONPATH": path}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        stream.write(" ".join(command) + "\n")
        stream.flush()
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=root
        )


def _await_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a prepared training is ready, or has failed, or should have been ready."""
    end = time.monotonic() + RUN_LIMIT
    while process.poll() is None and time.monotonic() < end and READY not in log.read_text(errors="replace"):
        time.sleep(0.1)


def _finished(process: subprocess.Popen[bytes]) -> int | str:
    """Let a waiting training begin and wait for its end."""
    try:
        # one that has failed already is told in vain, and its exit code says so
        process.communicate(b"begin\n", timeout=RUN_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "a time-out"
    return process.returncode


def _outcome(code: int | str, log: Path, work: training.Workload) -> Outcome:
    text = log.read_text(errors="replace")
    steps = training.parsed(text)
    first = _LOSS.search(text)
    if code or first is None or not any(iteration > work.warm_up for iteration, _ in steps):
        tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
        raise RuntimeError(f"the training command ended with {code} after {len(steps)} intervals, {log}:\n{tail}")
    return Outcome(seconds=statistics.median(training.after(steps, work)), first_loss=float(first[1]))
