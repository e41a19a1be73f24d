"""Where metrics go: Megatron's TensorBoard and W&B writers, `metrics.jsonl` beside the checkpoints, and the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacontext_megatron.telemetry import names

if TYPE_CHECKING:
    # The collector needs torch, which the commands that read metrics must not load before their environment is set.
    from megacontext_megatron.telemetry.collector import Interval

METRICS_FILE = "metrics.jsonl"


class Sinks:
    """Writes intervals on the rank that Megatron logs from.

    `folder` is where checkpoints are saved (None: no file).  Lines are only ever appended: a run that resumes, or
    starts anew in the same folder, repeats iterations, and read_metrics leaves out what that replaced.  `track` is
    told to W&B's configuration.
    """

    def __init__(self, folder: str | None, tensorboard: Any, wandb: Any, track: str) -> None:
        self._folder, self._tensorboard, self._wandb, self._track = folder, tensorboard, wandb, track

    def write(self, interval: Interval, iteration: int, consumed_samples: int) -> None:
        """Send one interval to every sink."""
        # Neither TensorBoard nor W&B can draw a histogram of values that are no numbers.
        drawn = {name: values for name, values in interval.histograms.items() if values.isfinite().all()}
        if self._tensorboard is not None:
            for name, value in interval.scalars.items():
                # Megatron writes its own loss.
                if name != names.LOSS.at():
                    self._tensorboard.add_scalar(name, value, iteration)
            for name, values in drawn.items():
                self._tensorboard.add_histogram(name, values, iteration)
        # Megatron ends the W&B run before an early exit.
        if self._wandb is not None and self._wandb.run is not None:
            import wandb

            histograms = {name: wandb.Histogram(v.tolist()) for name, v in drawn.items()}
            own = {k: v for k, v in interval.scalars.items() if k != names.LOSS.at()}
            self._wandb.config.update({names.TRACK: self._track}, allow_val_change=True)
            self._wandb.log({**own, **histograms}, iteration)
        if self._folder is not None:
            path = Path(self._folder) / METRICS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            histograms = {name: values.tolist() for name, values in interval.histograms.items()}
            line = {"iteration": iteration, "consumed_samples": consumed_samples, **interval.scalars, **histograms}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        print(log_line(interval.scalars, iteration), flush=True)


def log_line(scalars: dict[str, float], iteration: int) -> str:
    """Return the line printed beside Megatron's own at every log interval."""
    parts = [f" megacontext iteration {iteration:8d}"]
    shown = ("mc/frac_level/", "mc/lod_loss/", "mc/nll_last/", names.ADVANTAGE.at(), names.SPAN_WIDTH.at())
    parts += [f"{name}: {value:.4f}" for name, value in scalars.items() if name.startswith(shown)]
    return " | ".join(parts)


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Return the lines of a folder's metrics file in order of iteration, without those a later run went back behind."""
    entries: list[dict[str, float]] = []
    for line in (Path(folder) / METRICS_FILE).read_text().splitlines():
        entry = json.loads(line)
        while entries and entries[-1]["iteration"] >= entry["iteration"]:
            entries.pop()
        entries.append(entry)
    return entries
