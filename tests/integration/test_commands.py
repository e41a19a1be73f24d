"""What the commands around training say of themselves."""

# Faults are planted here by hand, and some libraries export less than they offer.
# pyright: reportAttributeAccessIssue=false, reportOptionalSubscript=false

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import command

REPOSITORY = Path(__file__).parents[2]

HELP = {
    "pretrain": [
        "gaussian rope:",
        "megacontext:",
        "running:",
        "--mc-source-length",
        "--gaussian-rope-learnable-sigma {none,level,layer,head}",
        "--cpu",
        "network size:",
        "--tensor-model-parallel-size",
        "learning rate and weight decay:",
    ],
    "evaluate": ["evaluation:", "--mc-eval-samples", "megacontext:", "--tensor-model-parallel-size"],
    "doctor": ["--tables", "FLAGS", "layer by layer"],
    "telemetry.report": ["folder"],
    "data.corpus": ["--output-prefix", "--held-out"],
}


@pytest.mark.parametrize("module", HELP)
def test_help_shows_every_group(module, tmp_path):
    result = command(module, ["--help"], workdir=tmp_path)
    assert result.returncode == 0, result.log
    assert "usage: " in result.log
    for part in HELP[module]:
        assert part in result.log
    assert "error" not in result.log.split("usage: ")[0].lower()


@pytest.mark.full
@pytest.mark.parametrize("module", HELP)
def test_the_commands_start_as_modules(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"megacontext_megatron.{module}", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in HELP[module])
