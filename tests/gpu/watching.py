"""Recorders for runs on GPUs: ``before`` hooks that change nothing but what is asked of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from tests import mutations, recording

BACKENDS = {
    "use_flash_attention": "FlashAttention",
    "use_fused_attention": "cuDNN",
    "use_unfused_attention": "unfused",
}


LISTED = 1024
"""Values of a weight's gradient that are recorded, evenly spread over it."""


def watch(change: str | None = None, environment: Mapping[str, str] | None = None) -> Callable[[], dict[str, Any]]:
    """Record gradients of the plugin's parameters and the attention that Transformer Engine chose last.

    `change` names a function of tests.mutations to call first, `environment` holds variables to set.
    """
    os.environ.update(environment or {})
    if change is not None:
        getattr(mutations, change)()
    positional, gists = final_gradients()
    return lambda: {"gradients": positional, "gists": gists, "attention": chosen_attention()}


def final_gradients() -> tuple[list[dict[str, list[float]]], list[dict[str, list[float]]]]:
    """Record this rank's final gradients by name: of all positional parameters, and of GistNet in the first step.

    There is a dictionary for each step.
    """
    from megacontext_megatron.model.gpt import plugin_parameters

    positional: list[dict[str, list[float]]] = []
    gists: list[dict[str, list[float]]] = []

    def record(model: list[Any]) -> None:
        found = {
            f"{chunk}.{name}": cast(Any, parameter).main_grad.flatten()
            for chunk, part in enumerate(model)
            for name, parameter in plugin_parameters(part).items()
        }
        positional.append({name: gradient.tolist() for name, gradient in found.items() if "gist_net." not in name})
        if not gists:
            weights = {name: gradient for name, gradient in found.items() if "gist_net." in name}
            gists.append({name: each[:: -(-each.numel() // LISTED)].tolist() for name, each in weights.items()})

    recording.after_gradients(record)
    return positional, gists


def chosen_attention() -> str:
    """Return the name of the attention Transformer Engine's layers ran last, "" where none did."""
    module = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention")
    chosen = getattr(module, "_attention_backends", {})
    return next((name for key, name in BACKENDS.items() if chosen.get(key)), "")
