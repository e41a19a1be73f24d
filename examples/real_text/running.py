"""Runs: each a training and an evaluation by the real commands, several at a time, and what came of it as JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.command_line import words
from examples.real_text.documents import Corpus
from examples.real_text.recipe import CACHE, FULL, NEWEST, Recipe, evaluation_flags, newest_flags, training_flags
from megacontext_megatron.telemetry.report import EVALUATION_FILE

RESULT_FILE = "result.json"

_ROOT = Path(__file__).parents[2]
_PARAMETERS = re.compile(r"number of parameters on .*: (\d+)")
_STEP = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
_TAIL_LINES = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One arm with one seed, in a folder of its own."""

    recipe: Recipe
    corpus: Corpus
    arm: str
    seed: int
    folder: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What another run must share for its result to be this one's."""
        corpus = {name: value for name, value in asdict(self.corpus).items() if name != "prefix"}
        return {"arm": self.arm, "seed": self.seed, "recipe": self.recipe.as_dict(), "corpus": corpus}


def run_all(runs: Sequence[Run], jobs: int, *, keep_checkpoints: bool) -> list[str]:
    """Run everything, `jobs` at a time, and return one sentence for each run that failed."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        said = list(pool.map(lambda run: _tried(run, keep_checkpoints=keep_checkpoints), runs))
    return [sentence for sentence in said if sentence]


def _tried(run: Run, *, keep_checkpoints: bool) -> str:
    """Run one and say so; returns why it failed, or nothing.  A result that is there already is kept."""
    name = f"{run.arm}, seed {run.seed}, C = {run.recipe.source_length}"
    if _finished(run):
        print(f"{name}: kept", flush=True)
        return ""
    try:
        result = execute(run)
    except (RuntimeError, OSError) as error:
        print(f"{name}: FAILED, {error}", flush=True)
        return f"{name}: {str(error).splitlines()[0]}"
    finally:
        if not keep_checkpoints:
            _remove_checkpoints(run.folder)
    print(f"{name}: {result['seconds']:.0f} s, {_shown(result['evaluation'])}", flush=True)
    return ""


def execute(run: Run) -> dict[str, Any]:
    """Train and evaluate, and write the result; RuntimeError with the end of the log if a command fails."""
    started = time.monotonic()
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    flags = training_flags(run.recipe, run.arm, run.seed, run.corpus, run.folder)
    trained = _command(run, "pretrain", [*words(flags), *run.recipe.more])
    ended = time.monotonic()
    evaluation = _evaluated(run)
    steps = [float(milliseconds) for milliseconds in _STEP.findall(trained)]
    result = {
        **run.identity,
        "parameters": int(_PARAMETERS.findall(trained)[-1]),
        "steps": run.recipe.steps,
        "raw_tokens": run.recipe.raw_tokens,
        "rows": run.recipe.trained_rows(run.arm),
        "step_ms": sorted(steps)[len(steps) // 2],
        "training_seconds": ended - started,
        "seconds": time.monotonic() - started,
        "evaluation": evaluation,
    }
    (run.folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _evaluated(run: Run) -> dict[str, Any]:
    """Evaluate a run's checkpoint; of a model trained on all rows, also the loss on the newest alone."""
    flags = evaluation_flags(run.recipe, run.arm, run.corpus, run.folder)
    written = run.folder / EVALUATION_FILE
    _command(run, "evaluate", words(flags))
    evaluation = json.loads(written.read_text())
    if run.arm == FULL:
        _command(run, "evaluate", words({**flags, **newest_flags(run.recipe)}))
        newest = json.loads(written.read_text())
        evaluation[NEWEST] = newest["recency"]
        evaluation["errors"][NEWEST] = newest["errors"]["recency"]
    return evaluation


def _finished(run: Run) -> bool:
    path = run.folder / RESULT_FILE
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    return all(found.get(name) == value for name, value in run.identity.items())


def _command(run: Run, module: str, flags: Sequence[str]) -> str:
    """Run a command of the plugin in one process and return its log, which is kept in the run's folder."""
    launcher = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "1", "-m"]
    # evaluate starts by itself
    before = launcher if module == "pretrain" else []
    command = [sys.executable, "-m", *before, f"megacontext_megatron.{module}", *flags]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    log = run.folder / f"{module}.log"
    with log.open("w") as stream:
        stream.write(" ".join(command) + "\n")
        stream.flush()
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=_ROOT).returncode
    text = log.read_text(errors="replace")
    if code:
        tail = "\n".join(text.splitlines()[-_TAIL_LINES:])
        raise RuntimeError(f"{module} ended with {code}, see {log}\n{tail}")
    return text


def _remove_checkpoints(folder: Path) -> None:
    for large in (*folder.glob("iter_*"), folder / CACHE):
        shutil.rmtree(large, ignore_errors=True)


def _shown(evaluation: dict[str, Any]) -> str:
    inputs = ("recency", "mixed", "shuffled", "full")
    return ", ".join(f"{name} {evaluation[name]:.4f}" for name in inputs if evaluation.get(name) is not None)
