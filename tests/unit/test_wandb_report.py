"""The W&B charts: every logged metric in one panel, under a name that the plugin logs, and as objects of W&B's own."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megacontext_megatron.telemetry import names
from scripts import wandb_report

SCRIPT = Path(__file__).parents[2] / "scripts" / "wandb_report.py"
PARTS = {"level": (0, 1, 2), "layer": (1, 12), "variant": ("recency", "1"), "H": (64,), "factor": (0, 0.5, 2)}
LOGGED = [metric for metric in names.TABLE if metric is not names.SUBSTITUTION]


def panels():
    return [panel for section in wandb_report.specification() for panel in section.panels]


def filled(metric):
    """Return names that a metric has in a run."""
    found = [metric.name]
    for part in re.findall(r"\{(\w+)\}", metric.name):
        found = [name.replace(f"{{{part}}}", str(value)) for name in found for value in PARTS.get(part, ("a", "b"))]
    return found


def shows(panel, name):
    return bool(re.search(panel.regex, name)) if panel.regex else name in panel.metrics


@pytest.mark.parametrize("metric", LOGGED, ids=lambda metric: metric.name)
def test_every_logged_metric_is_in_one_panel(metric):
    for name in filled(metric):
        if metric is names.SIGMA_HISTOGRAM and name.endswith("/0"):
            continue
        (panel,) = [panel for panel in panels() if shows(panel, name)]
        assert panel.unit == metric.unit
        assert panel.kind == ("histogram" if metric is names.SIGMA_HISTOGRAM else "line")


def test_panels_show_nothing_that_the_table_does_not_have():
    known = [name for metric in LOGGED for name in filled(metric)]
    assert [panel for panel in panels() if not any(shows(panel, name) for name in known)] == []
    assert {name for panel in panels() for name in panel.metrics} <= set(known)
    assert not any(shows(panel, name) for panel in panels() for name in filled(names.SUBSTITUTION))
    assert not any(shows(panel, "mc/lod_loss/1/more") or shows(panel, "my/mc/lod_loss/1") for panel in panels())


def test_sections_gather_what_belongs_together():
    by_title = {section.title: section.panels for section in wandb_report.specification()}
    for title, name in {
        "Loss": "mc/nll_last/64/recency",
        "Probes": "mc/pos/blur_dnll/2",
        "Gists and terms": "mc/grad/gistnet",
        "Prediction of gists": "mc/mp/agreement/1",
        "Centres and sigma": "mc/pos/sigma_hist/2",
        "Contexts": "mc/compression",
    }.items():
        assert any(shows(panel, name) for panel in by_title[title]), title
    assert list(by_title) == [title for title, _ in wandb_report.SECTIONS if title in by_title]


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd="/",
        timeout=120,
    )


def test_a_dry_run_writes_the_panels_and_needs_no_package(tmp_path):
    # a package of that name that cannot be imported
    (tmp_path / "wandb_workspaces.py").write_text("raise ImportError('absent')\n")
    done = command("--dry-run", str(tmp_path / "new" / "charts.json"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "new" / "charts.json").read_text())
    assert [len(section["panels"]) for section in document["sections"]] == [
        len(section.panels) for section in wandb_report.specification()
    ]
    assert f"{len(panels())} panels" in done.stdout


def test_what_is_missing_is_named(tmp_path):
    done = command()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--entity and --project are needed, or --dry-run FILE.\n"
    if find_spec("wandb_workspaces") is None:
        done = command("--entity", "me", "--project", "gists")
        assert done.returncode == 2
        assert "install the package wandb-workspaces" in done.stderr


def test_panels_become_objects_of_wandb():
    pytest.importorskip("wandb_workspaces")
    sections = wandb_report.specification()
    workspace = wandb_report.workspace(sections, "me", "gists", "charts")
    report = wandb_report.report(sections, "me", "gists", "charts")
    made = {
        "workspace": [plot for section in workspace.sections for plot in section.panels],
        "report": [plot for grid in report.blocks[2::3] for plot in grid.panels],
    }
    for plots in made.values():
        assert [plot.metric_regex or "" for plot in plots] == [panel.regex for panel in panels()]
        assert [len(plot.y) for plot in plots] == [len(panel.metrics) for panel in panels()]
    # what would be sent, without the runs, which W&B is asked for: the interface refuses what its server does not know
    sent = [workspace._to_model(), *(plot._to_model() for plot in made["report"])]
    text = "".join(json.dumps(model.model_dump(mode="json")) for model in sent)
    assert text.count('"metric_regex": "^mc/lod_loss/[^/]+$"') == 2
    assert text.count('"metrics": ["mc/pos/sigma_hist/2"]') == 2
