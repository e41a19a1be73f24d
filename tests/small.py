"""The smallest run whose contexts hold levels 0 to 2, and the commands around it."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import mutations
from tests.launch import CallResult, TrainResult, call, run_main, train
from tests.tiny import tiny_flags

SMALL: Mapping[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "seq_length": 64,
    "megacontext": True,
    "mc_source_length": 512,
    "mc_block_size": 8,
    "mc_variants": 2,
    "mc_recent_tokens": 16,
    "mc_horizon": 16,
    "mc_level2_prob": 0.3,
    "gaussian_rope_learnable_sigma": "level",
    "train_iters": 4,
    "save_interval": 2,
    "eval_interval": 2,
    "eval_iters": 1,
}
TOKENS_ONLY: Mapping[str, Any] = {
    **{name: None for name in SMALL if name.startswith(("mc_", "megacontext"))},
    "gaussian_rope_learnable_sigma": None,
}
"""Overrides that leave out the contexts, for runs whose rows are all tokens."""

STEPS = 4
MICRO_BATCHES = 4

LOSS_TOLERANCE = 1e-6
GRAD_NORM_TOLERANCE = 1e-5
"""Relative, for fp32 sums in another order."""


def largest(values: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference between two equally long series."""
    assert values
    return max(abs(value - right) / abs(right) for value, right in zip(values, expected, strict=True))


def small_flags(corpus: Path, **overrides: Any) -> list[str]:
    """Return the small run's command line on a corpus; overrides as in `tiny_flags`."""
    data = {"data_path": corpus, "data_cache_path": corpus.parent / "cache"}
    return tiny_flags(strong=True, **{**SMALL, **data, **overrides})


def small_training(
    corpus: Path, workdir: Path, ranks: int = 1, *, fresh: bool = False, **overrides: Any
) -> TrainResult:
    """Train the small run; ``values`` holds the rows of its micro-batches, see `rows`.

    ``fresh`` starts positional parameters away from 0, where one at its initial value would pass for a loaded one.
    """
    return train(small_flags(corpus, **overrides), ranks, workdir=workdir, before=rows, before_kwargs={"fresh": fresh})


def rows(fresh: bool = False) -> Callable[[], dict[str, list[dict[str, Any]]]]:
    """Record the rows [b, s] of this rank's micro-batches, in training and in evaluation: places, levels and losses."""
    from megacontext_megatron.model import step

    if fresh:
        mutations.spread_parameters()
    seen: dict[str, list[dict[str, Any]]] = {"training": [], "evaluation": []}
    real = step.row_sums

    def record(losses: Any, targets: Any, spans: Any, context: Any) -> Any:
        kind = "training" if losses.requires_grad else "evaluation"
        places = {"start": spans.start.tolist(), "level": spans.level.tolist()}
        seen[kind].append({**places, "loss": losses.tolist()})
        return real(losses, targets, spans, context)

    step.row_sums = record
    return lambda: seen


def command(
    module: str,
    argv: Sequence[str],
    ranks: int = 1,
    *,
    workdir: Path,
    before: Callable[..., Any] | None = None,
) -> CallResult:
    """Run `python -m megacontext_megatron.MODULE` with `argv` in forked ranks."""
    hook = before and f"{before.__module__}:{before.__qualname__}"
    main = f"megacontext_megatron.{module}:main"
    return call(
        run_main, {"main": main, "argv": list(map(str, argv)), "before": hook, "kwargs": {}}, ranks, workdir=workdir
    )


def parse_only(lines: Sequence[Sequence[str]], workdir: Path, world_size: int = 1) -> list[dict[str, Any]]:
    """Start the training command with each command line, in one process, and stop where training would begin.

    Each outcome has the exit `code` (0 where training would begin), what was written to `out` and `err`, and the
    `settings` training would have had.
    """
    words = [list(map(str, line)) for line in lines]
    found = call(parse_in_rank, {"lines": words, "world_size": world_size}, workdir=workdir)
    return found.check().values[0]


def parse_in_rank(lines: list[list[str]], world_size: int) -> list[dict[str, Any]]:
    """Do what `parse_only` says, in a rank."""
    from megatron.training import global_vars

    from megacontext_megatron import pretrain

    os.environ["WORLD_SIZE"] = str(world_size)
    reached: list[str] = []
    pretrain._train = lambda args, settings, started: reached.append(repr(settings))
    outcomes = []
    for line in lines:
        global_vars.unset_global_variables()
        global_vars._GLOBAL_TIMERS = global_vars._GLOBAL_ENERGY_MONITOR = None
        out, err, code = io.StringIO(), io.StringIO(), 0
        reached.clear()
        sys.argv = ["pretrain"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                pretrain.main(line)
            except SystemExit as stop:
                code = stop.code
        assert bool(reached) == (code == 0), (line, code)
        texts = {"out": out.getvalue(), "err": err.getvalue()}
        outcomes.append({"code": code, "settings": "".join(reached), **texts})
    return outcomes


def refusal(outcome: Mapping[str, Any]) -> str:
    """Return the one sentence with which a command line was refused; AssertionError if it was not."""
    lines = [line for line in outcome["err"].splitlines() if "error:" in line]
    assert outcome["code"] == 2, outcome
    assert len(lines) == 1, outcome["err"]
    assert outcome["err"].rstrip().endswith(lines[0])
    return lines[0]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the size and time of change of everything under a folder, by path."""
    return {
        str(path.relative_to(folder)): (0 if path.is_dir() else path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }
