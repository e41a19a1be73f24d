"""What the published megatron-core wheel needs on any machine before its training loop can start.

Idempotent, and reported by the doctor.
"""

from __future__ import annotations

from typing import Any

import torch

_MARK = "_megacontext_adapted"


def install() -> list[str]:
    """Adapt the wheel where it needs it; returns one sentence for each adaptation that is in place."""
    return [said for said in (_skip_helper_build(), _repair_distributed_optimizer()) if said]


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
    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    setattr(DistributedOptimizer, _MARK, True)
    return said
