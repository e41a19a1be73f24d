"""What the command line asks of every group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Rounds in which contenders take turns, whether only a first look is wanted, and where results go."""

    rounds: int = 3
    quick: bool = False
    out: Path = Path("runs/bench")
