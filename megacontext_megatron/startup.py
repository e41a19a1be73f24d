"""What the published megatron-core wheel needs on any machine before its training loop can start.

Idempotent, and reported by the doctor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_MARK = "_megacontext_adapted"


def install() -> list[str]:
    """Adapt the wheel where it needs it; returns one sentence for each adaptation that is in place."""
    parts = (
        _skip_helper_build,
        _repair_distributed_optimizer,
        _repair_distributed_order,
        _repair_half_precision_optimizer,
        _repair_reshardable_state,
    )
    return [said for said in (part() for part in parts) if said]


def _skip_helper_build() -> str:
    """Keep Megatron from compiling data set helpers that the wheel already has, without the Makefile it lacks."""
    import megatron.core.datasets.utils as dataset_utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401  (its presence is the question)
    except ImportError:
        return ""
    if not hasattr(dataset_utils.compile_helpers, _MARK):

        def compiled_already() -> None:
            return None

        setattr(compiled_already, _MARK, True)
        dataset_utils.compile_helpers = compiled_already
    return "data set helpers: the wheel's compiled module is used, nothing is built"


def _repair_distributed_optimizer() -> str:
    """Let Megatron's distributed optimizer load checkpoints over PyTorch's AdamW, where TE and Apex are absent.

    Its state_dict expects exactly one step counter, which a fresh AdamW does not have, and loading leaves all
    parameters with one shared step tensor, which AdamW would then advance once per parameter.
    """
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    said = "distributed optimizer: PyTorch's AdamW gets the step counters its checkpoints need"
    if HAVE_APEX_OR_TE:
        return ""
    if hasattr(DistributedOptimizer, _MARK):
        return said
    state_dict = DistributedOptimizer.state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self, *args, **kwargs)

    @torch.no_grad()
    def with_step(self: Any, parameter: Any, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        group, place = self.model_param_group_index_map[parameter]
        step = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]["step"]
        return set_states(self, parameter, {**tensors, "step": step}, *args, **kwargs)

    def with_own_steps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_state_dict(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()
        return result

    DistributedOptimizer.state_dict = with_state
    DistributedOptimizer.load_state_dict = with_own_steps
    setattr(DistributedOptimizer, "_set_main_param_and_optimizer_states", with_step)  # noqa: B010  (another signature)
    setattr(DistributedOptimizer, _MARK, True)
    return said


def _repair_distributed_order() -> str:
    """Let the distributed optimizer find the states of parameters that stayed in fp32 among half-precision ones.

    It hands each group to the inner optimizer with the fp32 parameters first, but remembers their places as if the
    order had not changed, so that checkpoints would hold other parameters' states.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    said = "distributed optimizer: parameters kept in fp32 are saved and loaded with the others"
    build = DistributedOptimizer._build_optimizer_group_ranges
    if hasattr(build, _MARK):
        return said

    def in_the_order_used(param_groups: Any, gbuf_ranges: Any) -> Any:
        places, ranges = build(param_groups, gbuf_ranges)
        for group, group_range in enumerate(ranges):
            group_range["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            places.update({parameter: (group, place) for place, parameter in enumerate(group_range["params"])})
        return places, ranges

    setattr(in_the_order_used, _MARK, True)
    DistributedOptimizer._build_optimizer_group_ranges = staticmethod(in_the_order_used)
    return said


def _repair_half_precision_optimizer() -> str:
    """Let the half-precision optimizer save and load parameters that stayed in fp32.

    It numbers the parameters of a checkpoint as if all of them were half precision, so that with fp32 ones among them
    the states of different parameters are mixed up.  While it saves or loads, its list of half-precision parameters
    is made to hold every parameter in the optimizer's order.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params as Optimizer

    said = "half-precision optimizer: parameters kept in fp32 are saved and loaded with the others"
    if hasattr(Optimizer, _MARK):
        return said

    def with_every_parameter(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.is_stub_optimizer or not any(self.fp32_from_fp32_groups):
                return method(self, *args, **kwargs)
            half, main = self.float16_groups, self.fp32_from_float16_groups
            model_of = {
                id(m): p for mains, halves in zip(main, half, strict=True) for m, p in zip(mains, halves, strict=True)
            }
            self.fp32_from_float16_groups = [list(group["params"]) for group in self.optimizer.param_groups]
            self.float16_groups = [[model_of.get(id(p), p) for p in group] for group in self.fp32_from_float16_groups]
            try:
                return method(self, *args, **kwargs)
            finally:
                self.float16_groups, self.fp32_from_float16_groups = half, main

        return wrapped

    Optimizer.sharded_state_dict = with_every_parameter(Optimizer.sharded_state_dict)
    Optimizer.load_state_dict = with_every_parameter(Optimizer.load_state_dict)
    setattr(Optimizer, _MARK, True)
    return said


def _repair_reshardable_state() -> str:
    """Let the distributed optimizer save the right states with `--dist-ckpt-optim-fully-reshardable`.

    It packs the states of all gradient buckets without the padding at a bucket's end, but cuts the parameters out of
    them at places that count the padding, so that behind a padded bucket every parameter gets its neighbour's states.
    Pipelined models with tied embeddings have two buckets, and parameters of a few elements make padding likely.
    Releases after 0.19 check the sizes and are left alone.
    """
    from megatron.core import package_info
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    said = "distributed optimizer: fully reshardable checkpoints hold each parameter's own states"
    cut = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(cut, _MARK):
        return said
    if (package_info.MAJOR, package_info.MINOR) != (0, 19):
        return ""

    @functools.wraps(cut)
    def from_padded(self: Any, *args: Any, **kwargs: Any) -> Any:
        collect = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda *a, **k: _padded(self.buffers, collect(*a, **k))
        try:
            return cut(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    setattr(from_padded, _MARK, True)
    DistributedOptimizer.sharded_param_state_fully_reshardable = from_padded
    return said


def _padded(buffers: Any, packed: Any) -> Any:
    """Return packed optimizer states with the padding of each buffer's buckets put back; None stays None."""
    if packed is None:
        return None
    for index, buffer in enumerate(buffers):
        for states in packed[index].values():
            for name, state in states.items():
                if torch.is_tensor(state):
                    states[name] = whole = state.new_zeros(buffer.numel)
                    parts = state.split([bucket.numel_unpadded for bucket in buffer.buckets])
                    for bucket, part in zip(buffer.buckets, parts, strict=True):
                        whole[bucket.offset : bucket.offset + part.numel()] = part
    return packed
