"""Freezes the base of a retrofit, so that nothing but what the plugin adds trains."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
from torch import Tensor

from megacontext_megatron.config import ConfigError, Settings
from megacontext_megatron.model.gpt import plugin_parameters

FIXED_BIASES = ("alibi",)
"""Score biases without parameters; grape-a has some where it is gated or its slopes are learnable."""


def freeze_base(model: torch.nn.Module, settings: Settings) -> list[str]:
    """Turn off gradients of everything but the plugin's parameters, and return the names of those.

    `model` is one pipeline stage (or virtual chunk) before Megatron wraps it.  A stage may have nothing to train, which
    Megatron's optimizer and data parallelism bear.  What Megatron updates without gradients, the experts' biases of its
    routers, stands still too.  Raises ConfigError where no stage would train anything, or where the base would move.
    """
    check_trains(settings)
    trained = plugin_parameters(model)
    if not trained and getattr(model, "pre_process", True) and getattr(model, "post_process", True):
        raise ConfigError("--retrofit: the model has nothing beside its frozen base that could train.")
    kept = {id(parameter) for parameter in trained.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    _hold_routers(model)
    _start_gradients(model)
    return sorted(trained)


def check_trains(settings: Settings) -> None:
    """Refuse a retrofit that has no parameters; raises ConfigError naming flags that add some."""
    gaussian, retrofit = settings.gaussian, settings.retrofit
    learned = [
        retrofit is not None and bool({"alibi-lora", "slow-bands"} & set(retrofit.parts)),
        gaussian is not None and (gaussian.learnable_sigma != "none" or gaussian.log_width_bias),
        settings.gist.learned,
        any(_learns(bias.name, bias.learnable_slopes or bias.gate != "none") for bias in settings.biases),
    ]
    if not any(learned):
        parts = " ".join(retrofit.parts) if retrofit is not None else ""
        raise ConfigError(
            f"--retrofit {parts} leaves nothing to train on a frozen base: add alibi-lora or slow-bands, "
            "--gaussian-rope-learnable-sigma or --mc-gist-kind gistnet, or use megacontext_megatron.evaluate."
        )


def _learns(name: str, slopes: bool) -> bool:
    return slopes if name == "grape-a" else name not in FIXED_BIASES


def _hold_routers(model: torch.nn.Module) -> None:
    """Keep what routers balance experts by; it is moved behind every step, whatever has a gradient."""
    for module in model.modules():
        if getattr(module, "qb_beta_accum", None) is not None:
            raise ConfigError(
                "--moe-router-load-balancing-type quantile_balancing moves routers of a base that --retrofit freezes: "
                "choose none."
            )
        if getattr(module, "expert_bias", None) is not None:
            cast(Any, module).frozen_expert_bias = True


def _start_gradients(model: torch.nn.Module) -> None:
    """Let embeddings of tokens ask for a gradient where layers are recomputed.

    A recomputed layer has no gradient at all, not even for its own parameters, unless one of its inputs asks for one.
    """
    recomputes = getattr(getattr(model, "config", None), "recompute_granularity", None) is not None
    if recomputes and getattr(model, "pre_process", False):
        cast(Any, model).embedding.word_embeddings.register_forward_hook(_asking)


def _asking(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    del module, inputs
    return output.requires_grad_() if torch.is_grad_enabled() else output


def frozen_fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Return the SHA-256 of every frozen parameter and every persistent buffer of a model, by name."""
    # By identity: a wrapped model's state and its parameters have other names.
    trained = {id(value) for value in model.parameters() if value.requires_grad}
    return {
        name: hashlib.sha256(_bytes(value.detach())).hexdigest()
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and id(value) not in trained
    }


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
