"""Benchmarks of the plugin on one GPU machine, peers beside it in the same process.

    python scripts/bench.py --out runs/bench                 everything
    python scripts/bench.py --groups A,G --quick             a first look
    python scripts/bench.py --list                           what the groups are

Every group first compares its outputs and gradients with float64; a group that fails is not timed, and the exit code
is 1.  Writes bench.json and bench.png to --out and prints Markdown tables.  Peers that are not installed are named as
absent.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

GROUPS = {
    "A": ("rotary_forward", "rotary, forward: copy, Megatron, its torch.compile, Transformer Engine, Liger, GRAPE-M"),
    "B": (
        "rotary_backward",
        "rotary, backward alone and with forward: q and k; with omega, sigma and mu; per KV group",
    ),
    "C": ("split_norm", "split of the mixed projection, QK-norm and rotary in one pass against separate ones"),
    "D": ("sliding_window", "attention in a window of 128 rows, plain and with rotary inside, against five peers"),
    "E": ("global_bias", "causal attention with a linear bias, folded or in the kernel, against the same without one"),
    "F": ("reach_skip", "a linear bias that skips what is out of reach, against cuDNN without a bias"),
    "G": ("precision", "error of cos and sin for centres of 1e3 to 2^51 tokens, against mpmath"),
    "H": ("kv_append", "new rows into a paged cache in one launch, against a rotation and two index_copy_"),
    "I": ("pooling", "gists of 32 rows pooled by a learned query, against attention on batches of blocks"),
    "J": ("layer_step", "one Transformer Engine layer's step against the same layer with plain fused rope"),
    "K": ("gist_cost", "GistNet's share of a training step against mean gists, at C/W = 4 and 16 with V = 1, 2, 4"),
    "L": ("recipe_step", "a step of three local layers and a global one, against plain rope and TE's windows"),
    "M": ("split_window", "a window of 128 rows over two GPUs against one, attention and layer; what they exchange"),
    "T": ("training", "rows per second of the training command, mixed contexts against plain rope"),
}
NO_GPU = 2
FIGURE = "bench.png"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="scripts/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--groups", type=groups_of, default=tuple(GROUPS), help="letters with commas between (default: all)"
    )
    made.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of bench.json, bench.png and logs")
    made.add_argument("--rounds", type=int, default=3, help="times that contenders take turns (default: 3)")
    made.add_argument("--quick", action="store_true", help="the smallest shapes, one round, short trainings")
    made.add_argument("--commit", help="commit to record where this is no git checkout")
    made.add_argument("--draw", type=Path, metavar="JSON", help="only draw the figure of an earlier bench.json")
    made.add_argument("--list", action="store_true", help="list the groups and leave")
    return made


def groups_of(text: str) -> tuple[str, ...]:
    """Return the letters in a list such as A,B; raises ArgumentTypeError naming those that are no group."""
    letters = tuple(dict.fromkeys(text.upper().replace(",", " ").split()))
    if not letters or (unknown := [letter for letter in letters if letter not in GROUPS]):
        named = ", ".join(unknown) if letters else "no group"
        raise argparse.ArgumentTypeError(f"{named}: choose from {', '.join(GROUPS)}")
    return letters


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0, 1 where a group was stopped, 2 without a GPU."""
    asked = parser().parse_args(argv)
    if asked.list:
        for letter, (_, meaning) in GROUPS.items():
            print(f"{letter}  {meaning}")
        return 0
    if asked.draw:
        from scripts.benchmarks.figure import draw

        try:
            kept = json.loads(asked.draw.read_text())
        except (OSError, ValueError) as error:
            parser().error(f"--draw {asked.draw}: {error}")
        asked.out.mkdir(parents=True, exist_ok=True)
        draw(kept, asked.out / FIGURE)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("scripts/bench.py needs a GPU that PyTorch can use, and there is none.", file=sys.stderr)
        return NO_GPU
    return bench(asked)


def bench(asked: argparse.Namespace) -> int:
    """Run the groups one after another, keeping what is there after each."""
    from scripts.benchmarks.machine import facts, lines
    from scripts.benchmarks.options import Options
    from scripts.benchmarks.timing import copy_rate

    asked.out.mkdir(parents=True, exist_ok=True)
    # first, so that the clocks among the facts are those of a busy device
    rate = copy_rate()
    machine = {**facts(asked.commit), "copy of 2 GiB, TB/s": round(rate * 1e-12, 3)}
    print("\n".join([f"# {' '.join(['scripts/bench.py', *sys.argv[1:]])}", "", *lines(machine), ""]), flush=True)
    options = Options(rounds=1 if asked.quick else asked.rounds, quick=asked.quick, out=asked.out)
    results = []
    for letter in asked.groups:
        module = importlib.import_module(f"scripts.benchmarks.{GROUPS[letter][0]}")
        results.append(run_group(letter, module.TITLE, partial(module.run, options)))
        keep(machine, results, asked.out)
    return int(any(result.stopped for result in results))


def run_group(letter: str, title: str, run: Callable[[Any], None]) -> Any:
    """Return what a group found, timed and printed; an error stops the group and is part of the result."""
    import torch

    from scripts.benchmarks.gate import Findings, GateFailed
    from scripts.benchmarks.report import group_lines
    from scripts.benchmarks.results import GroupResult

    started, found, stopped = time.monotonic(), Findings(), ""
    try:
        run(found)
    except GateFailed as failed:
        stopped = str(failed)
    except Exception as error:  # whatever ends a group, the others are still measured
        traceback.print_exc()
        stopped = f"{type(error).__name__}: {error}"
    # what comes next may be another process on the same device
    gc.collect()
    torch.cuda.empty_cache()
    result = GroupResult(
        group=letter,
        title=title,
        rows=tuple(found.rows),
        checks=tuple(found.checks),
        notes=(*found.notes, *((f"Absent: {found.absent}",) if found.absent else ())),
        stopped=stopped,
        seconds=round(time.monotonic() - started, 1),
    )
    print("\n".join(group_lines(result)), flush=True)
    return result


def keep(machine: dict[str, Any], results: Sequence[Any], out: Path) -> None:
    """Write bench.json and, where a group has rows and matplotlib is there, bench.png."""
    from scripts.benchmarks.figure import draw
    from scripts.benchmarks.results import as_json

    document = as_json(machine, results)
    (out / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    if any(result.rows for result in results):
        try:
            draw(document, out / FIGURE)
        except ImportError:
            print("No figure: matplotlib is absent; draw it elsewhere with --draw bench.json.", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
