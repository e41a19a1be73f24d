"""Trainings on GPUs: the models, the layouts, and how far each may be from one GPU.

bf16 rounds every activation, so two ways to compute one thing differ.  How far they may is read off the same model:
one-GPU runs that differ only in how the batch is cut into micro-batches are apart by the spread, and a layout may be by
twice that.  Tensor-parallel ranks round their parts of a sum before these are added, which no such cut does; how much
that is, is read off Megatron's own rope in the same layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests import parity
from tests.gpu import watching
from tests.gpu.reporting import Report
from tests.launch import TrainResult, train
from tests.parity import TP_SP, Difference, Flags, Layout, difference
from tests.tiny import tiny_flags

needs_te = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")

STEPS = parity.STEPS
TIMEOUT = 240.0
TIMES_SPREAD = 2
"""A layout may be this many times what rounding alone does from one GPU."""

CLEARLY = 10
"""A fault exceeds what a layout may by this factor."""

RESUMED = 3
"""Steps before a checkpoint is taken, and after."""

LOCAL: Flags = {"cpu": None, "transformer_impl": "local"}
ON_TE: Flags = {
    "cpu": None,
    "transformer_impl": "transformer_engine",
    "bf16": True,
}

MODEL: Flags = {
    "num_layers": 4,
    "hidden_size": 512,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "seq_length": 512,
    "megacontext": True,
    "mc_source_length": 2048,
    "mc_block_size": 8,
    "mc_variants": 2,
    "mc_recent_tokens": 128,
    "mc_horizon": 64,
    "mc_level2_prob": 0.3,
    "micro_batch_size": 4,
    "global_batch_size": 16,
    "lr": 3e-4,
    "min_lr": 3e-5,
    "lr_decay_iters": STEPS,
    "adam_eps": 1e-5,
    # logits of the size that the tiny model's strong weights give at its width
    "init_method_std": 0.053,
}
"""Heads of 64 channels, which flash and cuDNN attention take, and groups that two ranks can share out."""

LEVEL: Flags = {"gaussian_rope_learnable_sigma": "level"}
HEAD: Flags = {"gaussian_rope_learnable_sigma": "head"}
WINDOWS: Flags = {"window_size": "63,0", "window_attn_skip_freq": "[1,1,1,0]"}
STEEP = 16.0
"""On the standard slopes: what lies beyond the nearest tenth of a context is out of reach of most heads."""

GRAPE: Flags = WINDOWS | {
    "no_rope_freq": "[0,0,0,1]",
    "grape_a": True,
    "grape_a_learnable": True,
    "bias_slope_scale": STEEP,
}
"""Rotary in windows, and a learned linear bias on the one layer that sees everything."""

STRIPS: Flags = {"window_size": "127,0", "kv_channels": 128, "num_query_groups": 2}
"""Windows and heads for which Hopper has kernels of its own."""

STOCK_ROPE: Flags = {name: value for name, value in MODEL.items() if not name.startswith("mc_")} | {
    "position_embedding_type": "rope",
    "megacontext": False,
}

MOE: Flags = {
    "num_experts": 4,
    "moe_layer_freq": "([0]*1+[1]*3)",
    "moe_ffn_hidden_size": 512,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
}

GISTNET: Flags = {
    "mc_gist_kind": "gistnet",
    "mc_gist_hidden_size": 128,
    "mc_loss_advantage": 0.5,
    "mc_loss_gist_rows": 0.5,
}
SPAN_HEAD: Flags = GISTNET | {"mc_gist_span_head": True}
PREDICTION: Flags = GISTNET | {"mc_predict_level1": 0.1, "mc_predict_level2": 0.1}

FAMILIES = {
    "te": MODEL | LEVEL | ON_TE,
    "te, sigma by head": MODEL | HEAD | ON_TE,
    "te, QK-norm": MODEL | LEVEL | ON_TE | {"qk_layernorm": True},
    "te, experts": MODEL | LEVEL | ON_TE | MOE,
    "local bf16": MODEL | LEVEL | LOCAL | {"bf16": True},
    "te, stock rope": STOCK_ROPE | ON_TE,
    "local, stock rope": STOCK_ROPE | LOCAL | {"bf16": True},
    "te, gistnet": MODEL | LEVEL | ON_TE | GISTNET,
    "te, span head": MODEL | LEVEL | ON_TE | SPAN_HEAD,
    "te, prediction": MODEL | LEVEL | ON_TE | PREDICTION,
    "local, kernels": MODEL | GRAPE | LOCAL | {"bf16": True},
    "local, strips": MODEL | GRAPE | LOCAL | STRIPS | {"bf16": True},
    "local, kernels, QK-norm": MODEL | GRAPE | LOCAL | {"bf16": True, "qk_layernorm": True},
    "folded": MODEL | GRAPE | LOCAL | {"bf16": True, "bias_fold": True},
    "te, folded": MODEL | GRAPE | ON_TE | {"bias_fold": True},
    "local fp32": parity.FAMILIES["dense"] | LOCAL,
    "local fp32, gistnet": parity.FAMILIES["gistnet"] | LOCAL,
    "local fp32, span head": parity.FAMILIES["span head"] | LOCAL,
}
"""Models that share a checkpoint."""

ONE = Layout(name="one GPU", family="te")
SPLITS = {"halved": 2, "doubled": 8}
"""Other sizes of micro-batches that the spread is read off."""


def one_gpu(name: str, family: str = "te", **flags: Any) -> Layout:
    """Return a one-GPU run of a family with more flags."""
    return Layout(name=name, family=family, flags=flags)


class Matrix(parity.References):
    """The checkpoints and runs of a session on GPUs, each made when it is first needed, and their report."""

    def __init__(self, corpus: Path, folder: Path, report: Report) -> None:
        """Take the data's path prefix, a folder for the runs, and where their figures go."""
        super().__init__(corpus, folder, FAMILIES, watching.watch)
        self._report = report
        self._made: dict[str, TrainResult] = {}

    def train(
        self,
        layout: Layout,
        workdir: Path,
        *,
        steps: int = STEPS,
        before: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> TrainResult:
        """Train a layout from its family's checkpoint and check that it ended well; its figures are reported."""
        result = super().train(layout, workdir, steps=steps, before=before or watching.watch, **kwargs)
        self._report.run(layout, result)
        result.check()
        assert len(result.losses) == len(result.grad_norms) == steps
        return result

    def made(self, layout: Layout) -> TrainResult:
        """Train a layout once a session, and return that run whenever it is asked for again."""
        key = f"{layout.family}, {layout.name}"
        if key not in self._made:
            self._made[key] = self.train(layout, self._folder / key.replace(", ", "-").replace(" ", "-"))
        return self._made[key]

    def spread(self, one: Layout) -> Difference:
        """Return how far a one-GPU run is from the same with smaller and with larger micro-batches, at most."""
        found = [self._split(one, name, size) for name, size in SPLITS.items()]
        return larger(*found)

    def _split(self, one: Layout, name: str, size: int) -> Difference:
        other = dataclasses.replace(
            one, name=f"{one.name}, {name} micro-batches", flags={**one.flags, "micro_batch_size": size}
        )
        found = self.apart(other, one)
        assert found.loss > 0
        assert found.grad_norm > 0
        return found

    def compared(  # type: ignore[override]
        self, layout: Layout, one: Layout, workdir: Path, **options: Any
    ) -> tuple[Difference, Difference, TrainResult]:
        """Train a layout; return its difference from a one-GPU run, what rounding alone does, and the run."""
        result, rounding = self.train(layout, workdir, **options), self.spread(one)
        if layout.flags.get("tensor_model_parallel_size"):
            rounding = larger(rounding, self.stock_difference(layout))
        found = difference(result, self.made(one))
        self._report.comparison(layout, one, found, rounding, TIMES_SPREAD)
        return found, rounding, result

    def apart(self, layout: Layout, one: Layout) -> Difference:
        """Return how far two runs are apart, each made once a session."""
        found = difference(self.made(layout), self.made(one))
        self._report.comparison(layout, one, found)
        return found

    def within(self, layout: Layout, one: Layout, workdir: Path, **options: Any) -> TrainResult:
        """Train a layout and assert that its losses and gradient norms are within what it may be from one GPU."""
        found, rounding, result = self.compared(layout, one, workdir, **options)
        explained(found, rounding)
        return result

    def stock_difference(self, layout: Layout) -> Difference:
        """Return how far Megatron's own rope, on tokens, is from one GPU under a layout's tensor parallelism."""
        family = f"{FAMILIES[layout.family]['transformer_impl']}, stock rope".replace("transformer_engine", "te")
        flags = {name: layout.flags[name] for name in TP_SP if name in layout.flags}
        ranks = Layout(name="stock rope, tensor parallel", ranks=layout.ranks, family=family, flags=flags)
        return self.apart(ranks, one_gpu("stock rope, one GPU", family=family))

    def resumed(self, name: str, ranks: int, workdir: Path, **flags: Any) -> tuple[TrainResult, TrainResult]:
        """Train with a checkpoint in the middle; return that run's second half and the same steps resumed from there.

        Every kernel sums in one order.
        """
        save = {"save": workdir / "checkpoints", "save_interval": RESUMED, "train_iters": 2 * RESUMED}
        base = {**FAMILIES["te"], **self.data(), "deterministic_mode": True, **flags}
        runs = {"through": save, "resumed": {"load": save["save"], "ckpt_step": RESUMED, "train_iters": 2 * RESUMED}}
        found = []
        for part, more in runs.items():
            result = train(tiny_flags(**{**base, **more}), ranks, workdir=workdir / part, timeout=TIMEOUT)
            self._report.run(Layout(name=f"{name}, {part}", ranks=ranks, family="te"), result)
            found.append(result.check())
        return found[0], found[1]

    def note(self, text: str) -> None:
        """Put a sentence into the report."""
        self._report.note(text)


def larger(*found: Difference) -> Difference:
    """Return the largest of several differences."""
    return dataclasses.replace(
        found[0], loss=max(each.loss for each in found), grad_norm=max(each.grad_norm for each in found)
    )


def explained(found: Difference, rounding: Difference) -> None:
    """Assert that what rounding alone does explains a difference."""
    assert found.loss <= TIMES_SPREAD * rounding.loss, (found, rounding)
    assert found.grad_norm <= TIMES_SPREAD * rounding.grad_norm, (found, rounding)


def steps_of(result: TrainResult) -> list[tuple[float, float]]:
    """Return the loss and the gradient norm of every step, fp32: what two runs without a differing bit share."""
    return list(zip(result.losses, result.grad_norms, strict=True))


def attention_of(result: TrainResult) -> set[str]:
    """Return the names of the attention that Transformer Engine chose on the ranks of a run."""
    return {seen["attention"] for seen in result.values}


def rotary_of(result: TrainResult) -> str:
    """Return the line that the layer table of a run has for layer 1."""
    return next(line for line in result.log.splitlines() if line.startswith("> 1 | "))
