"""Draw one working context: a history of tokens, the rows that stand for it, and what each row's place becomes.

    python examples/draw_context.py [FILE]     writes an SVG, examples/context.svg if no file is named

Needs matplotlib and torch, no GPU and no training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch

from megacontext_megatron.config import ContextConfig, RotaryConfig
from megacontext_megatron.position.frequencies import rotary_frequencies, wavelengths
from megacontext_megatron.position.gaussian import damping
from megacontext_megatron.spans.metadata import SpanMetadata, base_sigma
from megacontext_megatron.spans.plan import plan_rows

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Polygon

COLOURS = ("#4477aa", "#ee8866", "#aa3377")
CONTEXT = ContextConfig(
    window=30, source_length=256, block_size=4, recent_tokens=8, horizon=8, plan="heuristic", level2_prob=0.0
)


def draw_rows(axes: Axes, context: ContextConfig) -> None:
    """Draw the history on top, the equally wide rows below, and what belongs to what."""
    plan = plan_rows(context, (0, 0, 0, 0))
    width = context.source_length / context.window
    for row, (start, level) in enumerate(zip(plan.start, plan.level, strict=True)):
        span = context.block_size**level
        corners = [(start, 1.0), (start + span, 1.0), ((row + 1) * width, 0.0), (row * width, 0.0)]
        axes.add_patch(Polygon(corners, facecolor=COLOURS[level], edgecolor="white", alpha=0.55, linewidth=0.8))
        axes.add_patch(
            Polygon(
                [(row * width, -0.25), ((row + 1) * width, -0.25), ((row + 1) * width, 0), (row * width, 0)],
                facecolor=COLOURS[level],
                edgecolor="white",
            )
        )
    axes.set_xlim(0, context.source_length)
    axes.set_ylim(-0.3, 1.05)
    axes.set_yticks([-0.125, 1.0], [f"{context.window} rows", f"{context.source_length} tokens"])
    axes.set_xticks([])
    handles = [Polygon([(0, 0)], facecolor=c) for c in COLOURS]
    names = ["token"] + [f"gist of {context.block_size**level} tokens" for level in (1, 2)]
    axes.legend(handles, names, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.02), frameon=False)
    axes.set_title("A window of rows over a history of tokens")


def draw_damping(axes: Axes) -> None:
    """Draw how much of each rotary pair a row of each level keeps (K = 32, head dimension 64, base 10000)."""
    frequencies = rotary_frequencies(RotaryConfig(head_dim=64))
    spans = SpanMetadata.of_nodes(torch.zeros(3, dtype=torch.long), torch.arange(3), block_size=32)
    kept = damping(base_sigma(spans.width, "uniform"), frequencies.omega)
    for level, colour in enumerate(COLOURS):
        axes.semilogx(wavelengths(frequencies), kept[level], color=colour, label=f"width {int(spans.width[level])}")
    axes.set_xlabel("wavelength of a rotary pair, tokens")
    axes.set_title("How much of it a row keeps")
    axes.legend(frameon=False)


def main() -> None:
    """Write the figure."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "context.svg"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.4), width_ratios=(2.4, 1), constrained_layout=True)
    draw_rows(left, CONTEXT)
    draw_damping(right)
    figure.savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main()
