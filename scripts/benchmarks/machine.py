"""Facts of the machine and the software that a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "transformer-engine",
    "megatron-core",
    "liger-kernel",
    "flash-attn-4",
    "nvidia-cudnn-frontend",
    "numpy",
)
_QUERIES = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")


def facts(commit: str | None = None) -> dict[str, Any]:
    """Return what results depend on; whatever cannot be read is None or left out. Imports torch."""
    import torch

    out: dict[str, Any] = {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        **{name: _version(name) for name in PACKAGES},
    }
    return out | _readings()


def lines(machine: dict[str, Any]) -> list[str]:
    """Return the facts as lines to print."""
    return [f"{name}: {'absent' if value is None else value}" for name, value in machine.items()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    found = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not found:
        return None
    return found + ("+changes" if _output("git", "-C", str(root), "status", "--porcelain") else "")


def _readings() -> dict[str, str]:
    answer = _output("nvidia-smi", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader")
    if not answer:
        return {}
    cells = answer.splitlines()[0].split(",")
    return dict(zip(_QUERIES, (cell.strip() for cell in cells), strict=False))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
