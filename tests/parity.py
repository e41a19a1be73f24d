"""Layouts against one process: the runs that are compared, and how far apart they may be.

Every run of a family starts from one checkpoint that one process wrote, because Megatron seeds the weights of
pipeline stages differently.  The regime is strong: large initial weights, so that the loss depends on positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megacontext_megatron.telemetry import names
from tests import mutations, recording
from tests.launch import TrainResult, train
from tests.tiny import tiny_flags

LOSS_TOLERANCE = 1e-6
GRAD_NORM_TOLERANCE = 1e-5
METRIC_TOLERANCE = 1e-5
"""Metrics are means over fewer rows than the loss, and some are differences of such means."""

CLEARLY = 100
"""A fault moves the loss, the gradient norm or a metric by more than this many tolerances."""

STEPS = 20
COMPARED_STEPS = 6
"""Of most layouts: faults show clearly within as many."""

MOE_STEPS = 10
TIMEOUT = 600.0

Flags = dict[str, Any]
"""Overrides of tests.tiny.tiny_flags."""

MIXED: Flags = {
    "megacontext": True,
    "mc_source_length": 512,
    "mc_block_size": 8,
    "mc_variants": 2,
    "mc_recent_tokens": 32,
    "mc_horizon": 32,
    "mc_level2_prob": 0.3,
    "seq_length": 128,
    "micro_batch_size": 2,
    "global_batch_size": 16,
    "lr_decay_iters": STEPS,
    # With the default a gradient that happens to be near 0 moves a weight by up to the learning rate, in a direction
    # that the rounding of sums decides.
    "adam_eps": 1e-5,
}
"""128 rows of levels 0 to 2 over 512 tokens; eight micro-batches a step, twice the stages of the deepest pipeline."""

DOCUMENTS: Flags = {"mc_eod_policy": "no-cross", "mc_plan": "mix", "mc_level2_prob": 0.8, "eod_mask_loss": True}
"""Plans that depend on the text, and rows without loss."""

LEVEL: Flags = {"gaussian_rope_learnable_sigma": "level"}

GISTNET: Flags = {
    "mc_gist_kind": "gistnet",
    "mc_gist_hidden_size": 32,
    "mc_loss_advantage": 0.5,
    "mc_loss_gist_rows": 0.5,
}
"""Learned gists, narrower than the model, and losses that tell variants and levels apart."""

SPAN_HEAD: Flags = GISTNET | {"mc_gist_span_head": True}

MOE: Flags = {
    "num_experts": 4,
    "moe_layer_freq": "([0]*1+[1]*3)",
    "moe_ffn_hidden_size": 128,
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
    "moe_shared_expert_intermediate_size": 128,
    "moe_token_dispatcher_type": "alltoall",
}

GRAPE: Flags = {
    "transformer_impl": "local",
    "position_embedding_type": "grapem",
    "grapem_learnable_freq": True,
    "window_size": "16,0",
    "window_attn_skip_freq": 4,
    "no_rope_freq": 4,
    "grape_a": True,
    "grape_a_learnable": True,
    "bias_slope_scale": 0.5,
}
"""The positions of examples/grape_recipe.sh: slopes of which the gentlest lowers scores by 1 over all 512 tokens."""

FAMILIES: Mapping[str, Flags] = {
    "dense": MIXED | LEVEL,
    "head-sigma": MIXED | {"gaussian_rope_learnable_sigma": "head"},
    "log-width": MIXED | LEVEL | {"gaussian_rope_log_width_bias": True},
    "windowed": MIXED
    | LEVEL
    | {"window_size": "16,0", "window_attn_skip_freq": "([1]*3+[0]*1)", "no_rope_freq": "([0]*3+[1]*1)"},
    "documents": MIXED | LEVEL | DOCUMENTS,
    "per-token": MIXED | LEVEL | DOCUMENTS | {"calculate_per_token_loss": True},
    "moe": MIXED | LEVEL | MOE,
    "grape recipe": MIXED | MOE | GRAPE,
    "gistnet": MIXED | LEVEL | GISTNET,
    "span head": MIXED | LEVEL | SPAN_HEAD,
    "slot": MIXED | LEVEL | GISTNET | {"mc_gist_pooling": "slot", "mc_gist_layers": 1},
    "gistnet, per token": MIXED | LEVEL | GISTNET | DOCUMENTS | {"calculate_per_token_loss": True},
}
"""Models and contexts that share a checkpoint and a one-process run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a family's model is spread over ranks."""

    name: str
    ranks: int = 1
    flags: Flags = dataclasses.field(default_factory=dict)
    family: str = "dense"

    def __str__(self) -> str:
        return self.name


ONE = Layout(name="one process")

FULL_RECOMPUTE: Flags = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE_RECOMPUTE: Flags = {"recompute_granularity": "selective"}

TP: Flags = {"tensor_model_parallel_size": 2}
TP_SP: Flags = TP | {"sequence_parallel": True}
PP: Flags = {"pipeline_model_parallel_size": 2}
VPP: Flags = PP | {"num_layers_per_virtual_pipeline_stage": 1}
CP: Flags = {"context_parallel_size": 2}
DIST_OPT: Flags = {"use_distributed_optimizer": True}
TWO_RANKS: Mapping[str, Flags] = {"tp": TP, "sp": TP_SP, "pp": PP, "cp": CP, "dp": {}}
"""The plain layouts of two ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest differences over all steps of two runs: relative, and for metrics below 1 absolute."""

    loss: float
    grad_norm: float
    metric: float
    metric_name: str

    def __str__(self) -> str:
        metric = f"metrics {self.metric:.1e} ({self.metric_name})"
        return f"loss {self.loss:.1e}, grad norm {self.grad_norm:.1e}, {metric}"

    def excess(self) -> float:
        """Return the largest multiple of a tolerance: up to 1, the runs differ by the order of fp32 sums alone."""
        return max(self.loss / LOSS_TOLERANCE, self.grad_norm / GRAD_NORM_TOLERANCE, self.metric / METRIC_TOLERANCE)


def difference(result: TrainResult, reference: TrainResult) -> Difference:
    """Compare the steps of `result` with the first steps of `reference`."""
    metric, name = _metric_difference(result, reference)
    return Difference(
        loss=_largest(result.losses, reference.losses),
        grad_norm=_largest(result.grad_norms, reference.grad_norms),
        metric=metric,
        metric_name=name,
    )


def _largest(values: list[float], expected: list[float], least: float = 0.0) -> float:
    """Return the largest difference, relative to `expected` or to `least` where that is larger."""
    assert values
    assert all(map(math.isfinite, [*values, *expected]))
    pairs = zip(values, expected[: len(values)], strict=True)
    return max(abs(value - right) / max(abs(right), least) for value, right in pairs)


def _metric_difference(result: TrainResult, reference: TrainResult) -> tuple[float, str]:
    tags = reference.tags("mc/")
    assert tags
    assert tags == result.tags("mc/")
    return max((_largest(result.scalars(tag), reference.scalars(tag), 1.0), tag) for tag in tags)


class References:
    """The checkpoints and one-process runs of a session, each made when it is first needed."""

    def __init__(
        self,
        corpus: Path,
        folder: Path,
        families: Mapping[str, Flags] = FAMILIES,
        record: Callable[[], Any] = recording.plans,
    ) -> None:
        """Take the data's path prefix, a folder for the runs, and what to record in the one-process runs."""
        self._corpus, self._folder, self._families, self._record = corpus, folder, families, record
        self._checkpoints: dict[str, Path] = {}
        self._runs: dict[str, TrainResult] = {}

    def data(self) -> dict[str, Any]:
        """Return the flags that name the data."""
        return {"data_path": str(self._corpus), "data_cache_path": str(self._folder / "cache")}

    def checkpoint(self, family: str) -> Path:
        """Return a checkpoint of one process, in which nothing that starts at 0 is at its initial value."""
        if family not in self._checkpoints:
            self._checkpoints[family] = self._save(family)
        return self._checkpoints[family]

    def _save(self, family: str) -> Path:
        folder = self._folder / family / "checkpoint"
        once = {"train_iters": 1, "lr": 1e-6, "min_lr": 1e-6, "save": folder, "save_interval": 1, "no_save_optim": True}
        flags = tiny_flags(strong=True, **{**self._families[family], **self.data(), **once})
        train(flags, workdir=self._folder / family / "init", before=mutations.spread_parameters).check()
        return folder

    def one_process(self, family: str) -> TrainResult:
        """Return the run that the family's layouts are compared with; its values are those of its recorder.

        Every step of it has rows of levels 0, 1 and 2.
        """
        if family not in self._runs:
            self._runs[family] = self._run_alone(family)
        return self._runs[family]

    def _run_alone(self, family: str) -> TrainResult:
        steps, recorder = (MOE_STEPS, recording.routing) if family == "moe" else (STEPS, self._record)
        layout = dataclasses.replace(ONE, family=family)
        result = self.train(layout, self._folder / family / "one", steps=steps, before=recorder).check()
        for level in range(3):
            assert min(result.scalars(names.LOD_COUNT.at(level=level))) > 0
        return result

    def train(
        self,
        layout: Layout,
        workdir: Path,
        *,
        steps: int = STEPS,
        before: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> TrainResult:
        """Train a layout from its family's checkpoint, with `before(**kwargs)` called in every rank."""
        flags = self.flags(layout, steps)
        return train(flags, layout.ranks, workdir=workdir, before=before, before_kwargs=kwargs, timeout=TIMEOUT)

    def flags(self, layout: Layout, steps: int) -> list[str]:
        """Return the command line that trains a layout from its family's checkpoint."""
        start = {"load": self.checkpoint(layout.family), "finetune": True, "exit_on_missing_checkpoint": True}
        values = {**self._families[layout.family], **self.data(), **start, "train_iters": steps, **layout.flags}
        return tiny_flags(strong=True, **values)

    def compared(self, layout: Layout, workdir: Path, *, steps: int = STEPS, **kwargs: Any) -> Difference:
        """Train a layout as `train` does and return its difference from one process."""
        return self._compared(layout, self.train(layout, workdir, steps=steps, **kwargs), steps)

    def agrees(self, layout: Layout, workdir: Path, *, steps: int = STEPS, **kwargs: Any) -> TrainResult:
        """Train a layout as `train` does and assert that it does what one process does."""
        result = self.train(layout, workdir, steps=steps, **kwargs)
        found = self._compared(layout, result, steps)
        assert found.excess() <= 1, found
        return result

    def _compared(self, layout: Layout, result: TrainResult, steps: int) -> Difference:
        found = difference(result.check(), self.one_process(layout.family))
        assert len(result.losses) == len(result.grad_norms) == steps
        print(f"{layout}: {found} over {steps} steps, {result.seconds:.0f} s")
        return found
