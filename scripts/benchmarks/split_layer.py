"""A whole layer with a window of 128 rows over two GPUs, and on one of them.

The layer is that of group J.  Gradients of its weights, which the optimizer's step adds up over ranks, are not
exchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacontext_megatron.config import ContextConfig, GaussianRopeConfig, RotaryConfig, Settings
from scripts.benchmarks.layer_step import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    Size,
    carrier,
    causal_mask,
    copy_weights,
    decoder_layers,
    missing,
    relative,
)
from scripts.benchmarks.ranks import times_together
from scripts.benchmarks.results import Check

REPEATS = 10


def measured(look_back: int, rows: int) -> dict[str, Any]:
    """Return, in each rank, checks, and microseconds of its part of the rows and of all of them."""
    size = Size(impl="local" if missing() else "transformer_engine")
    sides = Sides.built(size, look_back, rows)
    checks = gate(sides)
    split, whole = (times_together(sides.step(part), REPEATS) for part in (True, False))
    return {"checks": [dataclasses.asdict(check) for check in checks], "split": split, "whole": whole}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """The layer for a rank's rows and the layer for all rows, with the same weights, and what goes through both."""

    split: torch.nn.Module
    whole: torch.nn.Module
    hidden: Tensor
    upstream: Tensor
    own: Tensor

    @classmethod
    def built(cls, size: Size, look_back: int, rows: int) -> Sides:
        """Build both in every rank of a job."""
        from megacontext_megatron.spans.context_parallel import zigzag_rows

        split, whole = (_layer(size, look_back, rows, ranks) for ranks in (dist.get_world_size(), 1))
        copy_weights(whole, split)
        generator = torch.Generator(size.device).manual_seed(1)
        hidden, upstream = (
            torch.randn(rows, 1, size.hidden, generator=generator, device=size.device).to(size.dtype) for _ in range(2)
        )
        own = zigzag_rows(rows, dist.get_world_size(), dist.get_rank(), hidden.device)
        return cls(split=split, whole=whole, hidden=hidden, upstream=upstream, own=own)

    def step(self, part: bool) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        """Return a call that returns the output, and gradients of the input and of the projection, of a side."""
        module: Any = self.split if part else self.whole
        rows = self.own if part else torch.arange(len(self.hidden), device=self.hidden.device)
        hidden, upstream = self.hidden[rows].requires_grad_(), self.upstream[rows]
        positions, mask = carrier(rows[None], torch.zeros_like(rows[None])), causal_mask(module, hidden)

        def both_ways() -> tuple[Tensor, Tensor, Tensor]:
            hidden.grad = None
            module.zero_grad(set_to_none=True)
            out, _ = module(hidden_states=hidden, attention_mask=mask, rotary_pos_emb=positions)
            out.backward(upstream)
            return out.detach(), hidden.grad, module.self_attention.linear_qkv.weight.grad  # pyright: ignore

        return both_ways


def _layer(size: Size, look_back: int, rows: int, ranks: int) -> torch.nn.Module:
    """Return the layer for so many context-parallel ranks, whose weights are the same in all ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megacontext_megatron.attention_config import AttentionConfig

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    torch.manual_seed(1234)
    chosen = Settings(
        encoding="gaussian_rope",
        rotary=RotaryConfig(head_dim=size.head_dim),
        context=ContextConfig.tokens_only(rows),
        gaussian=GaussianRopeConfig(),
        megacontext=True,
        backend="triton" if size.device == "cuda" else "torch",
        attention=AttentionConfig(backends=("triton",)),
    )
    [made] = decoder_layers(size, chosen, qk_norm=False, window_size=(look_back, 0), context_parallel_size=ranks)
    return made


def gate(sides: Sides) -> list[Check]:
    """Compare this rank's part of the output and of gradients with those of all rows."""
    out, hidden_grad, weight_grad = sides.step(True)()
    expected_out, expected_hidden_grad, expected_weight_grad = sides.step(False)()
    summed = weight_grad.float()
    dist.all_reduce(summed)
    found = {
        "output": (relative(out, expected_out[sides.own]), OUTPUT_TOLERANCE),
        "d hidden": (relative(hidden_grad, expected_hidden_grad[sides.own]), GRADIENT_TOLERANCE),
        "d weight": (relative(summed, expected_weight_grad), GRADIENT_TOLERANCE),
    }
    return [
        Check(name=f"a layer over two GPUs: {name}", error=error, tolerance=tolerance)
        for name, (error, tolerance) in found.items()
    ]
