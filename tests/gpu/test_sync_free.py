"""No training step stops the host to wait for the GPU, except where Megatron itself does.

From the second step on, all forward and backward passes run where PyTorch makes every synchronisation it detects an
error, reports of telemetry included; the rest of the step runs where it warns, and the warnings are collected.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megacontext_megatron.context.assembly import assemble_rows
from megacontext_megatron.context.gists import mean_gists
from tests.gpu.matrix import GISTNET, HEAD, LEVEL, LOCAL, MODEL, ON_TE, SPAN_HEAD, needs_te
from tests.launch import TrainResult, train
from tests.parity import FULL_RECOMPUTE, Flags
from tests.tiny import tiny_flags
from tests.unit.test_assembly import embeddings, planned, small

pytestmark = pytest.mark.gpu

STEPS = 5
SYNC = "called a synchronizing CUDA operation"
LIBRARIES = ("megacontext_megatron", "megatron", "transformer_engine")

MEGATRONS_OWN = {
    # whether the loss, and the gradients of each bucket, are numbers
    "megatron.core.rerun_state_machine:validate_result",
    # whether any rank asked for the step to be run again
    "megatron.core.rerun_state_machine:_reduce_any",
    # the gradient norm: one for all parameters, without Transformer Engine one for each
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
    "megatron.core.utils:local_multi_tensor_l2_norm",
    # whether every rank updated its parameters, and the largest of their gradient norms
    "megatron.training.utils.common_utils:logical_and_across_model_parallel_group",
    "megatron.training.utils.common_utils:reduce_max_stat_across_model_parallel_group",
}
"""Functions of a training step in which Megatron waits for the GPU."""

MODELS: dict[str, Flags] = {
    "local, fp32, sigma by level": LOCAL | LEVEL,
    "local, sigma by head, full recompute": LOCAL | HEAD | FULL_RECOMPUTE | {"bf16": True},
    "local, loader workers, tokens only": LOCAL
    | {"bf16": True, "num_workers": 1, **{name: None for name in MODEL if name.startswith(("mc_", "megacontext"))}},
    "te, sigma by level": ON_TE | LEVEL,
    "te, sigma by head, full recompute": ON_TE | HEAD | FULL_RECOMPUTE,
    "local, gistnet, advantage": LOCAL | LEVEL | GISTNET | {"bf16": True},
    "te, gistnet, advantage": ON_TE | LEVEL | GISTNET,
    "te, span head, full recompute": ON_TE | LEVEL | SPAN_HEAD | FULL_RECOMPUTE,
}


def watch(fault: str | None = None) -> Callable[[], dict[str, Any]]:
    """Run every step but the first without leave to synchronise; ``fault`` names a function here to call before."""
    from megatron.core.rerun_state_machine import RerunStateMachine
    from megatron.training import training

    if fault is not None:
        globals()[fault]()
    seen: dict[str, Any] = {"steps": 0, "synchronised": []}
    step, validate = training.train_step, RerunStateMachine.validate_result
    parameters = inspect.signature(step)

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        seen["steps"] += 1
        if seen["steps"] == 1:
            return step(*args, **kwargs)
        given = parameters.bind(*args, **kwargs)
        given.arguments["forward_backward_func"] = under("error", given.arguments["forward_backward_func"])
        with collected(seen["synchronised"]):
            return under("warn", step)(*given.args, **given.kwargs)

    training.train_step = watched_step
    # Called amid the passes, for each micro-batch and each bucket of gradients.
    RerunStateMachine.validate_result = under("warn", validate)
    return lambda: seen


def under(mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function under which synchronising is what `mode` says, if it mattered before."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        if function.__name__ == "validate_result" and before == 0:
            return function(*args, **kwargs)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return changed


@contextmanager
def collected(places: list[str]) -> Iterator[None]:
    """Append to `places` the function of a library in which the host waited, for every time it did."""

    def note(message: Warning | str, *_: Any) -> None:
        if SYNC in str(message):
            places.append(place())

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


def place() -> str:
    """Return the innermost function of a library on the stack, as module:function."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in LIBRARIES:
            return f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of all libraries"


def reading_a_value() -> None:
    """Let the forward read one number from the GPU."""
    from megacontext_megatron.model.step import ForwardStep

    real = ForwardStep._local_spans

    def read(self: ForwardStep, batch: Any) -> Any:
        spans = real(self, batch)
        assert spans.start.max().item() > 0
        return spans

    ForwardStep._local_spans = read


def sending_a_value() -> None:
    """Let the loss send one number to the GPU from memory that is not pinned."""
    from megacontext_megatron.model import step

    real = step.row_sums

    def send(losses: Any, *args: Any) -> Any:
        return real(losses * torch.tensor(1.0, device=losses.device), *args)

    step.row_sums = send


def waiting_in_the_backward() -> None:
    """Let the gradient of the rows be read on the host."""
    from megacontext_megatron.model import gpt

    real = gpt.assemble_rows

    def listen(*args: Any, **kwargs: Any) -> Any:
        assembly = real(*args, **kwargs)
        assembly.rows.register_hook(lambda gradient: gradient * float(gradient.isfinite().all()))
        return assembly

    gpt.assemble_rows = listen


def trained(corpus: Path, workdir: Path, flags: Flags, fault: Callable[[], None] | None = None) -> TrainResult:
    """Train under `watch`."""
    values = {**MODEL, "data_path": corpus, "data_cache_path": workdir / "cache", "train_iters": STEPS, **flags}
    kwargs = {"fault": fault and fault.__name__}
    return train(tiny_flags(**values), workdir=workdir, before=watch, before_kwargs=kwargs)


def cases(names: dict[str, Flags]) -> list[Any]:
    return [
        pytest.param(flags, id=name, marks=needs_te if name.startswith("te") else ()) for name, flags in names.items()
    ]


@pytest.mark.parametrize("flags", cases(MODELS))
def test_only_megatron_waits_for_the_gpu(corpus: Path, tmp_path: Path, flags: Flags) -> None:
    result = trained(corpus, tmp_path, flags).check()
    [seen] = result.values
    counts = {place: seen["synchronised"].count(place) for place in sorted(set(seen["synchronised"]))}
    print(f"synchronised in {STEPS - 1} steps: {counts}")
    assert seen["steps"] == STEPS
    assert counts.keys() <= MEGATRONS_OWN
    # what Megatron reads of every step shows that the warnings are heard
    assert counts["megatron.training.utils.common_utils:logical_and_across_model_parallel_group"] >= STEPS - 1
    assert result.log.count(" megacontext iteration ") == STEPS


@pytest.mark.parametrize("fault", [reading_a_value, sending_a_value, waiting_in_the_backward])
def test_a_synchronising_step_is_noticed(corpus: Path, tmp_path: Path, fault: Callable[[], None]) -> None:
    result = trained(corpus, tmp_path, LOCAL | LEVEL | {"bf16": True}, fault)
    assert result.returncode
    assert SYNC in result.log


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assembly_is_the_cpus_and_repeats_itself(dtype: torch.dtype) -> None:
    """Rows and gradients are the same bits in every run, and within rounding what the CPU computes in float64."""
    context, raw = small(variants=3), 2
    tokens, spans = embeddings(context, raw, seed=1), planned(context, raw)
    weights = torch.randn(context.window, 3 * raw, tokens.shape[2], generator=torch.Generator().manual_seed(1))
    exact = tokens.to(dtype).double().requires_grad_()
    expected = assemble_rows(exact, spans, context, mean_gists).rows
    expected.backward(weights.to(dtype).double())
    there = type(spans)(**{name: getattr(spans, name).cuda() for name in ("start", "width", "level", "modality")})
    runs = []
    for _ in range(3):
        moved = tokens.to("cuda", dtype).requires_grad_()
        gradient = weights.to("cuda", dtype)
        torch.cuda.set_sync_debug_mode("error")
        try:
            rows = assemble_rows(moved, there, context, mean_gists).rows
            rows.backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert moved.grad is not None
        runs.append((rows.detach(), moved.grad))
    assert exact.grad is not None
    for got, right in zip(runs[0], (expected.detach(), exact.grad), strict=True):
        rtol = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.cpu().double(), right, rtol=rtol, atol=rtol * right.abs().max().item())
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))
