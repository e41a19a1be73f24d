"""Recorders for runs on GPUs: ``before`` hooks that change nothing but what is asked of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from tests import mutations

BACKENDS = {
    "use_flash_attention": "FlashAttention",
    "use_fused_attention": "cuDNN",
    "use_unfused_attention": "unfused",
}


def watch(change: str | None = None, environment: Mapping[str, str] | None = None) -> Callable[[], dict[str, Any]]:
    """Record the gradients of positional parameters and the attention that Transformer Engine chose last.

    `change` names a function of tests.mutations to call first, `environment` holds variables to set.
    """
    os.environ.update(environment or {})
    if change is not None:
        getattr(mutations, change)()
    gradients = positional_gradients()
    return lambda: {"gradients": gradients, "attention": chosen_attention()}


def positional_gradients() -> list[dict[str, list[float]]]:
    """Record the final gradients of all positional parameters of this rank by name, a dictionary a step."""
    import megatron.core.distributed as distributed

    from megacontext_megatron.model.gpt import plugin_parameters

    seen: list[dict[str, list[float]]] = []
    real = distributed.finalize_model_grads

    def record(model: list[Any], *args: Any, **kwargs: Any) -> None:
        real(model, *args, **kwargs)
        found = {
            f"{chunk}.{name}": p for chunk, part in enumerate(model) for name, p in plugin_parameters(part).items()
        }
        seen.append({name: cast(Any, parameter).main_grad.tolist() for name, parameter in found.items()})

    distributed.finalize_model_grads = record
    return seen


def chosen_attention() -> str:
    """Return the name of the attention Transformer Engine's layers ran last, "" where none did."""
    module = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention")
    chosen = getattr(module, "_attention_backends", {})
    return next((name for key, name in BACKENDS.items() if chosen.get(key)), "")
