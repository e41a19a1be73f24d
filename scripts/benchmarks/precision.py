"""Group G: how far cos and sin of the rotation are from the truth, through fp32 in and out."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

import mpmath
import numpy as np
import torch
from torch import Tensor

from scripts.benchmarks import peers
from scripts.benchmarks.gate import Findings
from scripts.benchmarks.inputs import Inputs, Shape
from scripts.benchmarks.options import Options
from scripts.benchmarks.ours import Rotary
from scripts.benchmarks.results import OURS, Check, Comparison, Reading, Row, at_most

TITLE = "precision of phases"
LEARNED = "ours, a table of learned frequencies"
MEGATRON = "Megatron-Core, fp32 angles"
FUSED = "Transformer Engine, its own table"
MAGNITUDES = (1e3, 3.2e4, 1e6, 2.0**24, 1e8, 1e9, 4e9, 2.0**40, 2.0**51)
"""Centres, in tokens."""

LARGEST_ERROR = 1e-6
_PRECISION = 200
_COUNT = 48


def run(options: Options, found: Findings) -> None:
    """Measure every magnitude; the gate is the target itself, raises GateFailed."""
    rotary, device = Rotary.kernel(), torch.device("cuda")
    found.rows += [row(rotary, size, device, count=8 if options.quick else _COUNT) for size in MAGNITUDES]
    found.require([check for row in found.rows for check in as_checks(row)])


def row(rotary: Rotary, size: float, device: torch.device, *, count: int = _COUNT) -> Row:
    """Return the largest errors of every contender for centres around `size`."""
    doubled = doubled_centres(size, count)
    shape = Shape(rows=count, batch=1)
    inputs = Inputs(shape=shape, device=device, dtype=torch.float32)
    omega = inputs.frequencies.omega.cpu()
    truth = true_waves(doubled, omega)
    fixed, learned = rotary.fixed_table(inputs), rotary.learned_table(inputs.omega(per_group=False))
    readings = [
        Reading(name=name, rounds=(error(waves_of(rotary, table, doubled, inputs), truth),))
        for name, table in ((OURS, fixed), (LEARNED, learned))
    ]
    readings += [_peer(MEGATRON, lambda: _megatron(doubled, device)), _peer(FUSED, lambda: _fused(doubled, device))]
    goal = at_most(LARGEST_ERROR)
    return Row(
        case=f"centres near {size:.3g}",
        readings=tuple(readings),
        comparisons=(Comparison(over=OURS, target=goal), Comparison(over=LEARNED, target=goal)),
        unit="max |error|",
    )


def as_checks(row: Row) -> list[Check]:
    """Return ours of a row as checks of the gate."""
    return [
        Check(name=f"{row.case}: {name}", error=row.reading(name).value, tolerance=LARGEST_ERROR)
        for name in (OURS, LEARNED)
    ]


def doubled_centres(size: float, count: int) -> list[int]:
    """Return twice the centres: whole and half tokens at random between 0.9 `size` and `size`, and `size` itself."""
    generator = np.random.default_rng(int(size) % 2**32)
    drawn = generator.integers(int(1.8 * size), int(2 * size), size=count - 1)
    return [*map(int, drawn), int(2 * size)]


def true_waves(doubled: Sequence[int], omega: Tensor) -> Tensor:
    """Return cos and sin of omega mu, float64 [count, 2, r], from the stored frequencies taken as exact."""
    out = torch.empty(len(doubled), 2, len(omega), dtype=torch.float64)
    with mpmath.workprec(_PRECISION):
        for i, twice in enumerate(doubled):
            for j, frequency in enumerate(omega.tolist()):
                angle = mpmath.mpf(frequency) * twice / 2
                out[i, 0, j], out[i, 1, j] = float(mpmath.cos(angle)), float(mpmath.sin(angle))
    return out


def waves_of(rotary: Rotary, table: object, doubled: Sequence[int], inputs: Inputs) -> Tensor:
    """Return cos and sin that a rotation of (1, 0) pairs gives, fp32 [count, 2, r], worst head by worst head."""
    shape, half = inputs.shape, inputs.shape.head_dim // 2
    centre = torch.tensor(doubled, device=inputs.device).unsqueeze(1)

    def ones(heads: int) -> Tensor:
        x = torch.zeros(shape.rows, 1, heads, shape.head_dim, device=inputs.device)
        x[..., :half] = 1.0
        return x

    given = {"query": ones(shape.query_heads), "key": ones(shape.groups)}
    given |= {"doubled_centre": centre, "anchor": centre[0].clone()}
    with torch.no_grad():
        heads = torch.cat(rotary.rotate(given, table), dim=2)[:, 0]
    return heads.unflatten(-1, (2, half)).cpu()


def error(waves: Tensor, truth: Tensor) -> float:
    """Return the largest absolute error of waves [count, (heads,) 2, r]; inf if any is nan."""
    truth = truth.unsqueeze(1) if waves.dim() == 4 else truth
    found = float((waves.double() - truth).abs().max())
    return math.inf if math.isnan(found) else found


def _peer(name: str, measure: Callable[[], float]) -> Reading:
    try:
        return Reading(name=name, rounds=(measure(),))
    except peers.Absent as absent:
        return Reading(name=name, absent=str(absent))


def _megatron(doubled: Sequence[int], device: torch.device) -> float:
    """Return the error of Megatron's own table at the whole centres below or at those given."""
    module = peers.found(lambda: importlib.import_module("megatron.core.models.common.embeddings.rotary_pos_embedding"))
    embedding = module.RotaryEmbedding(kv_channels=128, rotary_percent=1.0, use_cpu_initialization=True)
    whole = [twice // 2 for twice in doubled]
    angles = torch.cat([embedding.get_freqs_non_repeated(1, offset=centre) for centre in whole]).to(device)
    waves = torch.stack([angles.cos(), angles.sin()], dim=1).cpu()
    return error(waves, true_waves([2 * centre for centre in whole], embedding.inv_freq.cpu()))


def _fused(doubled: Sequence[int], device: torch.device) -> float:
    """Return the error of Transformer Engine's table and fused rotation, against the frequencies it stores."""
    module = peers.found(lambda: importlib.import_module("transformer_engine.pytorch.attention.rope"))
    embedding = module.RotaryPositionEmbedding(128)
    whole = [twice // 2 for twice in doubled]
    table = torch.cat([embedding(1, offset=centre) for centre in whole])
    x = torch.zeros(len(whole), 1, 1, 128, device=device)
    x[..., :64] = 1.0
    out = module.apply_rotary_pos_emb(x, table, tensor_format="sbhd", fused=True)
    waves = out[:, 0, 0].unflatten(-1, (2, 64)).cpu()
    return error(waves, true_waves([2 * centre for centre in whole], embedding.inv_freq.cpu()))
