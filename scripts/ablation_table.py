"""Results of scripts/ablation.sh: read from the log and the checkpoint of each run, kept, and made into a table.

    python scripts/ablation_table.py finished RUN SETTINGS            exit code 0 if its result is of these settings
    python scripts/ablation_table.py record RUN ARM SEED SETTINGS     what came of a run that has ended, RUN/result.json
    python scripts/ablation_table.py table RUN...                     those with a result, as Markdown

RUN is the folder of a run, with its checkpoints and all that was printed in RUN/log.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULT = "result.json"
LOG = "log"
FAILED = 1
MISUSED = 2

_PARAMETERS = re.compile(r"number of parameters on \(.*?\) model parallel rank \((.*?)\): (\d+)")
_STEP = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
_VALIDATION = re.compile(r"validation loss at iteration (\d+) on validation set \| (.*)")
_VALUE = re.compile(r"([^|:]+) value: (\S+)")
_LAST_ROWS = re.compile(r"mc/nll_last/\d+/(\w+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One finished run.

    `settings` is its command line without the launcher.  `parameters` are those of all model-parallel ranks and `flops`
    those of the whole training by Megatron's formula, which knows neither windows nor encodings.  `loss` is in nats a
    row over the held-out text, `last` that of the newest rows by the context before them.
    """

    arm: str
    seed: int
    settings: str
    iterations: int
    parameters: int
    flops: float
    step_ms: float
    loss: float
    last: dict[str, float]


def measured(log: str) -> dict[str, Any]:
    """Return what a training has printed, as fields of Result; ValueError if its last validation is not there."""
    validations = _VALIDATION.findall(log)
    if not validations:
        raise ValueError("its last validation is not in its log")
    iterations, rest = validations[-1]
    values = {name.strip(): float(value) for name, value in _VALUE.findall(rest)}
    # printed again by every start that goes on with a run
    parameters = dict(_PARAMETERS.findall(log))
    steps = [float(milliseconds) for milliseconds in _STEP.findall(log)]
    return {
        "iterations": int(iterations),
        "parameters": sum(map(int, parameters.values())),
        # the first time includes what happens once
        "step_ms": statistics.median(steps[1:] or steps),
        "loss": values["lm loss"],
        "last": {found[1]: value for name, value in values.items() if (found := _LAST_ROWS.fullmatch(name))},
    }


def trained_flops(run: Path) -> float:
    """Return the floating-point operations that a run's last checkpoint has counted; OSError if there is none."""
    iteration = int((run / "latest_checkpointed_iteration.txt").read_text())
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(run / f"iter_{iteration:07d}"))
    return float(common["num_floating_point_operations_so_far"])


def record(run: Path, arm: str, seed: int, settings: str) -> Result:
    """Write and return the result of a run; ValueError or OSError if it has not come to its end."""
    printed = measured((run / LOG).read_text(errors="replace"))
    result = Result(arm=arm, seed=seed, settings=settings, flops=trained_flops(run), **printed)
    (run / RESULT).write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def read(run: Path) -> Result | None:
    """Return the result of a run, None if it has none."""
    path = run / RESULT
    return Result(**json.loads(path.read_text())) if path.is_file() else None


def table_lines(results: Sequence[Result]) -> Iterator[str]:
    """Yield a Markdown table with a line for each arm, in the order in which they come first."""
    contexts = sorted({name for result in results for name in result.last}, key=lambda name: (name != "recency", name))
    titles = ["arm", "seeds", "parameters", "FLOPs", "ms a step", "held-out loss"]
    titles += [f"newest rows, {name} context" for name in contexts]
    yield f"| {' | '.join(titles)} |"
    yield f"|---|{'---:|' * (len(titles) - 1)}"
    for arm in dict.fromkeys(result.arm for result in results):
        runs = [result for result in results if result.arm == arm]
        cells = [
            arm,
            str(len(runs)),
            " / ".join(f"{count:,}" for count in dict.fromkeys(run.parameters for run in runs)),
            " / ".join(f"{count:.4g}" for count in dict.fromkeys(run.flops for run in runs)),
            f"{statistics.median(run.step_ms for run in runs):.0f}",
            _mean([run.loss for run in runs]),
            *(_mean([run.last[name] for run in runs if name in run.last]) for name in contexts),
        ]
        yield f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    """Return a mean, with the standard deviation of several values."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    match list(sys.argv[1:] if argv is None else argv):
        case ["finished", run, settings]:
            found = read(Path(run))
            return 0 if found is not None and found.settings == settings else FAILED
        case ["record", run, arm, seed, settings]:
            try:
                result = record(Path(run), arm, int(seed), settings)
            except (ValueError, OSError) as error:
                print(f"{arm}, seed {seed}: {error}", file=sys.stderr)
                return FAILED
            print(f"{arm}, seed {seed}: loss {result.loss:.4f}, {result.step_ms:.0f} ms a step")
            return 0
        case ["table", *runs]:
            results = [result for run in runs if (result := read(Path(run))) is not None]
            print("\n".join(table_lines(results)) if results else "No run has a result yet.")
            return 0
        case _:
            print(__doc__, file=sys.stderr)
            return MISUSED


if __name__ == "__main__":
    raise SystemExit(main())
