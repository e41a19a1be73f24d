"""What others offer for the same job; each peer is a contender, or an absence with its reason.

All peers rotate by a table of fp32 angles for places 0, 1, 2, ..., the only places most of them know.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rotation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q [s, b, np, hn], k [s, b, ng, hn], angles fp32 [s, 1, 1, hn]) -> rotated q and k."""

MEGATRON = "Megatron-Core unfused"
COMPILED = "Megatron-Core under torch.compile"
FUSED = "Transformer Engine fused"
LIGER = "Liger, in place, its own layout"
LIGER_STRIDED = "Liger, on [s, b, n, h]"
PER_HEAD = "eager, a learned table per head (GRAPE-M)"
EAGER = "eager, the same gradients"
EAGER_COMPILED = "the same under torch.compile"


class Absent(Exception):
    """A peer that this machine does not have; the message says why."""


def found(load: Callable[[], Any]) -> Any:
    """Return what `load` returns; raises Absent where it cannot be imported or loaded."""
    try:
        return load()
    except Exception as error:  # a package that is there but broken raises what it likes
        first = (str(error).splitlines() or [""])[0]
        raise Absent(f"{type(error).__name__}: {first}") from error


def angles(omega: Tensor, rows: int) -> Tensor:
    """Return the table of angles Megatron and Transformer Engine read: fp32 [s, 1, 1, 2 r] for omega fp32 [r]."""
    half = torch.outer(torch.arange(rows, dtype=torch.float32, device=omega.device), omega)
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def megatron() -> Rotation:
    """Return Megatron-Core's rotation without fusion."""
    module = found(lambda: importlib.import_module("megatron.core.models.common.embeddings.rope_utils"))
    turn = module._apply_rotary_pos_emb_bshd

    def rotate(query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return turn(query, table), turn(key, table)

    return rotate


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function under torch.compile, one graph for each shape, whose backward can be repeated."""
    settings: dict[str, tuple[str, object]] = {
        # Donated buffers would be overwritten by the first of several backward passes through one graph.
        "torch._functorch.config": ("donated_buffer", False),
        # Beyond the limit a function would silently run uncompiled.
        "torch._dynamo.config": ("recompile_limit", 64),
    }
    for module, (name, value) in settings.items():
        setattr(importlib.import_module(module), name, value)
    return torch.compile(function, dynamic=False)


def fused() -> Rotation:
    """Return Transformer Engine's fused rotation: one launch for q, one for k."""
    module = found(lambda: importlib.import_module("transformer_engine.pytorch.attention.rope"))
    turn = functools.partial(module.apply_rotary_pos_emb, tensor_format="sbhd", fused=True)

    def rotate(query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return turn(query, table), turn(key, table)

    return rotate


def liger() -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return Liger's rotation of q and k [b, n, s, hn] by cos and sin [1, s, hn]; overwrites q and k."""
    module = found(lambda: importlib.import_module("liger_kernel.ops.rope"))
    return module.LigerRopeFunction.apply


def liger_layout(x: Tensor) -> Tensor:
    """Return [s, b, n, hn] as Liger's [b, n, s, hn] over memory ordered (b, s, n, hn), which it need not copy."""
    return x.transpose(0, 1).contiguous().transpose(1, 2)


def learned_rotation(
    query: Tensor, key: Tensor, places: Tensor, omega: Tensor, sigma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate, and damp where `sigma` is given, in plain PyTorch by frequencies that may be learned.

    places, sigma: fp32 [s, b] in tokens; omega: fp32 [1 or ng, r].  Each head that has frequencies of its own gets
    tables of cos and sin of its own, in fp32.
    """

    def turned(x: Tensor) -> Tensor:
        each = omega if omega.shape[0] == 1 else omega.repeat_interleave(x.shape[2] // omega.shape[0], dim=0)
        angle = places[..., None, None] * each
        cos, sin = angle.cos(), angle.sin()
        if sigma is not None:
            damp = torch.exp(-0.5 * (sigma[..., None, None] * each).square())
            cos, sin = cos * damp, sin * damp
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return turned(query), turned(key)


def head_norm(width: int, eps: float, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return Transformer Engine's RMSNorm of heads with a given weight [hn]; raises Absent without it."""
    engine = found(lambda: importlib.import_module("transformer_engine.pytorch"))
    norm = engine.RMSNorm(width, eps=eps, dtype=weight.dtype, device=weight.device)
    norm.weight.data.copy_(weight)
    return norm


def split(mixed: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [s, b, np, hn], k and v [s, b, ng, hn] of Megatron's mixed projection, as Megatron splits it."""
    query, key, value = mixed.split([mixed.shape[-1] - 2 * width, width, width], dim=-1)
    return query.reshape(*query.shape[:2], -1, width), key, value
