"""`python -m megacontext_megatron.adapters export --load DIR --out FILE.safetensors`, or `… show FILE.safetensors`.

Takes what the plugin added to a base out of a torch_dist checkpoint, in one process and without a GPU, and prints what
an exported file holds.  `--retrofit-adapters FILE` puts it onto a base again, in any layout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megacontext_megatron.config import ConfigError
from megacontext_megatron.pretrain import exit_with


def main(argv: Sequence[str] | None = None) -> None:
    """Export adapters or show them."""
    asked = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if asked.command == "export":
            export(asked.load, asked.out, asked.ckpt_step)
        else:
            show(asked.file)
    except ConfigError as error:
        exit_with(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megacontext_megatron.adapters", description="Adapters alone.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="take the adapters out of a checkpoint")
    out.add_argument("--load", required=True, help="Folder of the checkpoints of a retrofit.")
    out.add_argument("--out", type=Path, required=True, help="The safetensors file to write.")
    out.add_argument("--ckpt-step", type=int, help="Iteration to export instead of the latest.")
    commands.add_parser("show", help="print what an exported file holds").add_argument("file", type=Path)
    return parser


def export(folder: str, out: Path, step: int | None = None) -> None:
    """Write the adapters of a checkpoint to a file and say how many there are; raises ConfigError."""
    from megacontext_megatron.retrofit.adapters import export_adapters

    names = export_adapters(folder, out, step)
    print(f"{len(names)} tensors, {out.stat().st_size:,} bytes")
    print(f"written to {out}")


def show(path: Path) -> None:
    """Print the tensors of an exported file, and the settings they were trained with; raises ConfigError."""
    from rich.console import Console
    from rich.table import Table

    from megacontext_megatron.retrofit.adapters import read_adapters

    tensors, settings = read_adapters(path)
    table = Table("tensor", "shape", "dtype", "largest")
    for name, value in sorted(tensors.items()):
        shape = " x ".join(map(str, value.shape))
        table.add_row(name, shape, str(value.dtype).removeprefix("torch."), f"{value.abs().max().item():.3g}")
    # A pipe has no width of its own, and names must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for name, value in settings.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
