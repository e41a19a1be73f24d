"""What runs on GPUs showed, on stdout and, where MC_REPORT_DIR names a folder, in files there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.launch import LOG_TAIL_LINES, TrainResult
from tests.parity import Difference, Layout

HEADER = (
    "| layout | against | loss | grad norm | allowed loss | allowed grad norm |",
    "|---|---|---|---|---|---|",
)


class Report:
    """Writes as it hears: ``layouts.md`` (comparisons), ``notes.md``, ``runs.jsonl`` (every run), ``failures.log``."""

    def __init__(self) -> None:
        """Write to the folder that MC_REPORT_DIR names, if it does."""
        folder = os.environ.get("MC_REPORT_DIR")
        self._folder = Path(folder) if folder else None
        self._compared: set[tuple[str, str]] = set()

    def run(self, layout: Layout, result: TrainResult) -> None:
        """Report one run: its figures by step, or the end of its log where it failed."""
        row: dict[str, Any] = {"family": layout.family, "layout": layout.name, "seconds": round(result.seconds, 1)}
        if result.returncode:
            row["error"] = result.error
            tail = "\n".join(result.log.splitlines()[-LOG_TAIL_LINES:])
            self._append("failures.log", f"##### {layout.family}, {layout.name}\n{tail}\n")
        else:
            row |= {"loss": result.losses, "grad_norm": result.grad_norms}
            row["attention"] = [seen.get("attention") for seen in result.values if isinstance(seen, dict)]
        self._append("runs.jsonl", json.dumps(row))
        brief = row.get("error") or f"loss {result.losses[0]:.6f} to {result.losses[-1]:.6f} {row['attention']}"
        print(f"{layout.family}, {layout.name}: {brief}, {result.seconds:.0f} s", flush=True)

    def comparison(
        self, layout: Layout, one: Layout, found: Difference, spread: Difference | None = None, times: int = 0
    ) -> None:
        """Report how far two runs are apart, once; with what they may be where `spread` is given."""
        if (layout.name, one.name) in self._compared:
            return
        self._compared.add((layout.name, one.name))
        allowed = ("", "") if spread is None else (f"{times * spread.loss:.2e}", f"{times * spread.grad_norm:.2e}")
        cells = (layout.name, one.name, f"{found.loss:.2e}", f"{found.grad_norm:.2e}", *allowed)
        line = "| " + " | ".join(cells) + " |"
        if len(self._compared) == 1:
            self._append("layouts.md", "\n".join(HEADER))
        self._append("layouts.md", line)
        print(line, flush=True)

    def note(self, text: str) -> None:
        """Report a sentence."""
        self._append("notes.md", f"- {text}")
        print(text, flush=True)

    def _append(self, name: str, text: str) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("a") as file:
            print(text, file=file)
