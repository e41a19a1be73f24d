"""Group T: tokens per second of the training command, mixed contexts against plain rope on as many rows."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.benchmarks.gate import Findings
from scripts.benchmarks.options import Options
from scripts.benchmarks.results import OURS, Comparison, Reading, Row, at_least

TITLE = "training, rows per second"
PLAIN = "plain rope"
BUDGET = 210.0
"""Seconds after which no further round is begun."""

RUN_LIMIT = 170.0
"""Seconds after which one run has failed."""

_ROOT = Path(__file__).parents[2]
_TIME = re.compile(r"iteration\s+(\d+)/.*?elapsed time per iteration \(ms\): ([\d.]+)")
_TAIL_LINES = 60

MODEL: Mapping[str, Any] = {
    "transformer_impl": "transformer_engine",
    "bf16": True,
    "num_layers": 16,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 16,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 128,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "vocab_size": 32000,
    "make_vocab_size_divisible_by": 128,
    "tokenizer_type": "NullTokenizer",
    "null_tokenizer_eod_id": 31999,
    "use_distributed_optimizer": True,
    "lr": 1e-4,
    "min_lr": 1e-5,
    "lr_decay_style": "cosine",
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "eval_iters": 0,
    "eval_interval": 1000,
    "seed": 1234,
    "split": "100,0,0",
}
"""A model of 1.1 billion parameters, by flag."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What both arms train on: rows in a context, contexts in a step, and tokens behind a mixed context."""

    rows: int = 4096
    source: int = 32768
    recent: int = 512
    micro_batch: int = 2
    global_batch: int = 8
    steps: int = 40
    interval: int = 5
    warm_up: int = 10
    model: Mapping[str, Any] = field(default_factory=lambda: MODEL)

    @property
    def rows_per_step(self) -> int:
        """Rows of all contexts of a step."""
        return self.rows * self.global_batch

    @property
    def tokens_needed(self) -> int:
        """Tokens of data that either arm reads, and some more."""
        return (self.steps + 4) * self.global_batch * max(self.source // 2, self.rows) + 2 * self.source


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Ranks of a run and the flags that spread it over them."""

    name: str
    ranks: int
    flags: Mapping[str, Any]


ONE = Layout(name="one GPU", ranks=1, flags={})
TWO = (
    Layout(name="two GPUs, TP2 + SP", ranks=2, flags={"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    Layout(name="two GPUs, DP2", ranks=2, flags={"overlap_grad_reduce": True, "overlap_param_gather": True}),
)
ARMS: Mapping[str, Mapping[str, Any]] = {
    PLAIN: {"position_embedding_type": "rope"},
    OURS: {
        "position_embedding_type": "gaussian_rope",
        "megacontext": True,
        "mc_variants": 2,
        "mc_plan": "random",
        "mc_horizon": 64,
    },
}


def layouts(gpus: int) -> tuple[Layout, ...]:
    """Return the layouts for a machine: the one-GPU one on one, both two-GPU ones where there are more."""
    return (ONE,) if gpus < 2 else TWO


def run(options: Options, found: Findings) -> None:
    """Train both arms in turn, in every layout, as often as the budget allows."""
    import torch

    work = Workload(steps=20, warm_up=10) if options.quick else Workload()
    data = write_data(options.out / "training-data", work)
    chosen = layouts(torch.cuda.device_count())
    speeds: dict[str, dict[str, list[float]]] = {layout.name: {arm: [] for arm in ARMS} for layout in chosen}
    started = time.monotonic()
    for turn in range(1 if options.quick else options.rounds):
        spent = time.monotonic() - started
        if turn and spent * (turn + 1) / turn > BUDGET:
            break
        for layout in chosen:
            # the arm that came first comes second in the next round
            for arm in list(ARMS)[:: 1 if turn % 2 == 0 else -1]:
                log = (
                    options.out
                    / f"training-{layout.name.replace(' ', '-').replace(',', '')}-{arm.split()[0]}-{turn}.log"
                )
                steps = train(flags(work, layout, arm, data), layout.ranks, log)
                speeds[layout.name][arm].append(work.rows_per_step / statistics.median(after(steps, work)))
    found.rows += [row(layout, speeds[layout.name]) for layout in chosen]
    found.notes.append(
        f"Rounds: {len(next(iter(speeds.values()))[PLAIN])}; a run is {work.steps} steps of {work.rows_per_step} rows; "
        f"its median is over intervals of {work.interval} steps after the first {work.warm_up}."
    )


def row(layout: Layout, speeds: Mapping[str, Sequence[float]]) -> Row:
    """Return a layout's rows per second by arm."""
    return Row(
        case=layout.name,
        readings=tuple(Reading(name=arm, rounds=tuple(values)) for arm, values in speeds.items()),
        comparisons=(Comparison(over=OURS, under=PLAIN, target=at_least(0.97)),),
        unit="rows/s",
    )


def flags(work: Workload, layout: Layout, arm: str, data: Path) -> list[str]:
    """Return the command line of one arm."""
    values: dict[str, Any] = {
        **work.model,
        "seq_length": work.rows,
        "max_position_embeddings": work.rows,
        "micro_batch_size": work.micro_batch,
        "global_batch_size": work.global_batch,
        "train_iters": work.steps,
        "log_interval": work.interval,
        "data_path": data,
        "data_cache_path": data.parent / "cache",
        **layout.flags,
        **ARMS[arm],
    }
    if "megacontext" in ARMS[arm]:
        values |= {"mc_source_length": work.source, "mc_recent_tokens": work.recent}
    words: list[str] = []
    for name, value in values.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def train(words: Sequence[str], ranks: int, log: Path) -> list[tuple[int, float]]:
    """Run the training command and return (iteration, seconds per step) of every log interval.

    Its output goes to `log`; raises RuntimeError with the end of it if the command fails or takes too long.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks), "-m", "megacontext_megatron.pretrain", *words]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "4", **os.environ, "PYTHONPATH": path}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        stream.write(" ".join(command) + "\n")
        stream.flush()
        code = _finished(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=_ROOT))
    text = log.read_text(errors="replace")
    steps = parsed(text)
    if code or not steps:
        tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
        raise RuntimeError(f"the training command ended with {code} after {len(steps)} intervals, {log}:\n{tail}")
    return steps


def _finished(process: subprocess.Popen[bytes]) -> int | str:
    """Wait for a launched training; one that takes too long is ended, ranks included."""
    try:
        return process.wait(timeout=RUN_LIMIT)
    except subprocess.TimeoutExpired:
        # the launcher ends its ranks when it is told to stop
        process.terminate()
        process.wait(timeout=60)
        return "a time-out"


def parsed(text: str) -> list[tuple[int, float]]:
    """Return (iteration, seconds per step) of every line that Megatron logged at the end of an interval."""
    return [(int(iteration), float(ms) / 1000.0) for iteration, ms in _TIME.findall(text)]


def after(steps: Sequence[tuple[int, float]], work: Workload) -> list[float]:
    """Return the seconds per step of the intervals behind the warm-up; ValueError if there are none."""
    kept = [seconds for iteration, seconds in steps if iteration > work.warm_up]
    if not kept:
        raise ValueError(f"no interval behind step {work.warm_up} was logged")
    return kept


def write_data(folder: Path, work: Workload) -> Path:
    """Write random tokens as a Megatron data set and return its prefix."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / f"random-{work.model['vocab_size']}-{work.tokens_needed}"
    if not prefix.with_suffix(".idx").exists():
        generator = np.random.default_rng(0)
        made = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=np.uint16)
        length = 4 * work.source
        for _ in range(-(-work.tokens_needed // length)):
            document = generator.integers(0, work.model["vocab_size"] - 1, size=length, dtype=np.uint16)
            made.add_document(torch.from_numpy(document), [length])
        made.finalize(str(prefix) + ".idx")
    return prefix
