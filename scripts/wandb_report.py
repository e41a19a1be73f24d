"""Charts of a project's runs on Weights & Biases: a workspace, or a report, with every metric that trainings log.

    python scripts/wandb_report.py --entity me --project gists                     a workspace
    python scripts/wandb_report.py --entity me --project gists --as report         a report
    python scripts/wandb_report.py --dry-run charts.json                           what would be made, as JSON

What is charted follows the plugin's table of metrics.  Needs the package wandb-workspaces and a login, but not with
--dry-run.  The metrics are logged by trainings with --wandb-project.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
MISSING = 2
LEVELS = (1, 2)
"""Levels of gists that can have a histogram of their own."""

SECTIONS = (
    ("Loss", ("lm loss", "mc/lod_loss/", "mc/nll_last/", "mc/adv_delta")),
    ("Gists and terms", ("mc/gist", "mc/term", "mc/grad")),
    ("Prediction of gists", ("mc/mp/",)),
    ("Probes", ("mc/shuffled", "mc/permuted", "mc/pos/blur", "mc/guard")),
    ("Centres and sigma", ("mc/pos/",)),
    ("Contexts", ("",)),
)
"""Sections and what the names of their metrics begin with; the first that fits takes a metric."""

_PART = re.compile(r"\{\w+\}")
_COLUMNS = 3
_GRID = 24
"""Columns of the grid in which reports place panels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One chart over the iterations of all runs.

    `metrics` are names; where `regex` is not empty it is every name that matches, such as those of all levels.  A
    histogram has one metric, which is drawn as bins over time.
    """

    title: str
    unit: str
    meaning: str
    kind: Literal["line", "histogram"] = "line"
    metrics: tuple[str, ...] = ()
    regex: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


def specification() -> tuple[Section, ...]:
    """Return all panels by section; every metric that trainings log is in exactly one."""
    from megacontext_megatron.telemetry import names

    found: dict[str, list[Panel]] = {title: [] for title, _ in SECTIONS}
    for metric in names.TABLE:
        # only evaluate knows it, which writes to a file
        if metric is not names.SUBSTITUTION:
            section = next(title for title, starts in SECTIONS if metric.name.startswith(starts))
            found[section] += panels_of(metric, histogram=metric is names.SIGMA_HISTOGRAM)
    return tuple(Section(title=title, panels=tuple(panels)) for title, panels in found.items() if panels)


def panels_of(metric: Any, *, histogram: bool = False) -> list[Panel]:
    """Return the panels of a metric of telemetry.names: one, and of histograms one for each level."""
    panel = Panel(title=metric.name, unit=metric.unit, meaning=metric.meaning)
    if histogram:
        each = [metric.at(level=level) for level in LEVELS]
        return [replace(panel, title=name, kind="histogram", metrics=(name,)) for name in each]
    if not _PART.search(metric.name):
        return [replace(panel, metrics=(metric.name,))]
    fixed = (re.escape(text) for text in _PART.split(metric.name))
    return [replace(panel, regex=f"^{'[^/]+'.join(fixed)}$")]


def line_plot(panel: Panel, **options: Any) -> Any:
    """Return a panel as the line plot of the W&B interface; histograms too, which it draws by the type of the data."""
    interface: Any = import_module("wandb_workspaces.reports.v2")

    return interface.LinePlot(
        title=panel.title,
        x="Step",
        y=list(panel.metrics),
        metric_regex=panel.regex or None,
        title_x="iteration",
        title_y=panel.unit,
        **options,
    )


def workspace(sections: Sequence[Section], entity: str, project: str, name: str) -> Any:
    """Return the W&B workspace, not saved."""
    interface: Any = import_module("wandb_workspaces.workspaces")

    return interface.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            interface.Section(name=section.title, panels=[line_plot(panel) for panel in section.panels], is_open=True)
            for section in sections
        ],
    )


def report(sections: Sequence[Section], entity: str, project: str, name: str) -> Any:
    """Return the W&B report, not saved."""
    interface: Any = import_module("wandb_workspaces.reports.v2")

    blocks: list[Any] = []
    for section in sections:
        runs = interface.Runset(entity=entity, project=project)
        panels = [line_plot(panel, layout=_place(interface, place)) for place, panel in enumerate(section.panels)]
        meanings = [f"{panel.title}: {panel.meaning}" for panel in section.panels]
        blocks += [
            interface.H1(text=section.title),
            interface.UnorderedList(items=meanings),
            interface.PanelGrid(runsets=[runs], panels=panels),
        ]
    return interface.Report(entity=entity, project=project, title=name, blocks=blocks)


def _place(interface: Any, number: int) -> Any:
    width, height = _GRID // _COLUMNS, 6
    return interface.Layout(x=number % _COLUMNS * width, y=number // _COLUMNS * height, w=width, h=height)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="scripts/wandb_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--entity", help="user or team on W&B")
    made.add_argument("--project", help="the trainings' --wandb-project")
    made.add_argument("--name", default="MegaContext", help="title (default: MegaContext)")
    made.add_argument("--as", choices=("workspace", "report"), default="workspace", dest="kind", help="what to make")
    made.add_argument("--dry-run", type=Path, metavar="FILE", help="write the panels as JSON and contact nobody")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write the panels or save them on W&B; 0, or 2 where something that this needs is missing."""
    asked = parser().parse_args(argv)
    sections = specification()
    if asked.dry_run is not None:
        document = {"kind": asked.kind, "name": asked.name, "sections": [asdict(section) for section in sections]}
        asked.dry_run.parent.mkdir(parents=True, exist_ok=True)
        asked.dry_run.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{sum(len(section.panels) for section in sections)} panels: {asked.dry_run}")
        return 0
    if asked.entity is None or asked.project is None:
        print("--entity and --project are needed, or --dry-run FILE.", file=sys.stderr)
        return MISSING
    try:
        made = (workspace if asked.kind == "workspace" else report)(sections, asked.entity, asked.project, asked.name)
    except ModuleNotFoundError as error:
        print(f"{error}: install the package wandb-workspaces, or ask for --dry-run FILE.", file=sys.stderr)
        return MISSING
    made.save()
    print(made.url)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
