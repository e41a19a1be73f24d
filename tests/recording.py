"""Recorders: ``before`` hooks of ``tests.launch.train`` that change nothing and return what they saw."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def digest(*tensors: Tensor) -> str:
    """Return a hash of the bits of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def plans() -> Callable[[], list[str]]:
    """Record a hash of the rows' places for every micro-batch this rank runs."""
    from megacontext_megatron.model.step import ForwardStep

    seen: list[str] = []
    real = ForwardStep._local_spans

    def record(self: ForwardStep, batch: Any) -> Any:
        spans = real(self, batch)
        seen.append(digest(spans.start, spans.level))
        return spans

    ForwardStep._local_spans = record
    return lambda: seen


POSITIONAL = re.compile(r"self_attention\.(rotary|log_width_bias|score_biases)\.")


def gradients() -> Callable[[], list[dict[str, str]]]:
    """Record a hash of every parameter's final gradient, by name, for every step."""
    return _final_gradients(lambda parameters: {name: digest(p.main_grad) for name, p in parameters.items()})


def logits() -> Callable[[], list[str]]:
    """Record a hash of the logits of every micro-batch that this rank runs through the last stage."""
    from megatron.core.models.common.language_module.language_module import LanguageModule

    seen: list[str] = []
    real = LanguageModule.compute_language_model_loss

    def record(self: LanguageModule, labels: Tensor, logits: Tensor) -> Tensor:
        seen.append(digest(logits))
        return real(self, labels, logits)

    LanguageModule.compute_language_model_loss = record
    return lambda: seen


def frozen() -> Callable[[], list[dict[str, str]]]:
    """Record the fingerprint of what is frozen after the first and after the last step."""
    from megacontext_megatron.retrofit.freezing import frozen_fingerprint

    seen: list[dict[str, str]] = []

    def keep(model: list[torch.nn.Module]) -> None:
        seen.append({name: value for chunk in model for name, value in frozen_fingerprint(chunk).items()})

    after_gradients(keep)
    return lambda: [seen[0], seen[-1]]


def positional_gradients() -> Callable[[], list[dict[str, list[float]]]]:
    """Record the final gradients of all positional parameters, by name, for every step."""
    return _final_gradients(
        lambda parameters: {name: p.main_grad.tolist() for name, p in parameters.items() if POSITIONAL.search(name)}
    )


def gist_gradients() -> Callable[[], list[dict[str, list[float]]]]:
    """Record the final gradients of all weights of GistNet, by name, for every step; none where a stage has none."""
    return _final_gradients(
        lambda parameters: {
            name: p.main_grad.flatten().tolist() for name, p in parameters.items() if "gist_net." in name
        }
    )


def replicas() -> Callable[[], dict[str, str]]:
    """Record a hash of every parameter that tensor-parallel ranks hold alike, by name, after the last step."""
    stages: list[torch.nn.Module] = []

    def keep(model: list[torch.nn.Module]) -> None:
        stages[:] = model

    after_gradients(keep)
    return lambda: {
        f"{chunk}.{name}": digest(parameter)
        for chunk, stage in enumerate(stages)
        for name, parameter in stage.named_parameters()
        if not getattr(parameter, "tensor_model_parallel", False)
    }


def _final_gradients(read: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[], list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    def record(model: list[torch.nn.Module]) -> None:
        [stage] = model
        seen.append(read(dict(stage.named_parameters())))

    after_gradients(record)
    return lambda: seen


def after_gradients(see: Callable[[list[torch.nn.Module]], None]) -> None:
    """Show this rank's model whenever its gradients are what the optimizer reads, in Megatron's own command too."""
    import megatron.core.distributed as distributed

    from megacontext_megatron.telemetry.observer import TrainingObserver

    real, real_finalizing = distributed.finalize_model_grads, TrainingObserver.finalizing
    observed: list[TrainingObserver] = []

    def finalize_model_grads(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        real(model, *args, **kwargs)
        if not observed:
            see(model)

    def finalizing(self: TrainingObserver, finalize: Callable[..., None]) -> Callable[..., None]:
        observed.append(self)

        def finalize_and_show(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
            finalize(model, *args, **kwargs)
            see(model)

        return real_finalizing(self, finalize_and_show)

    distributed.finalize_model_grads = finalize_model_grads
    TrainingObserver.finalizing = finalizing


def routing() -> Callable[[], dict[str, Any]]:
    """Record which experts every layer chose for every row, in the order of its calls.

    The value holds, by layer number, one string a micro-batch: a hexadecimal digit a row, whose bits are the experts.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    seen: dict[str, list[str]] = {}
    real = TopKRouter.routing

    def record(self: TopKRouter, *args: Any, **kwargs: Any) -> Any:
        probabilities, chosen = real(self, *args, **kwargs)
        bits = (chosen.long() << torch.arange(chosen.shape[1])).sum(dim=1)
        seen.setdefault(str(self.layer_number), []).append("".join(f"{row:x}" for row in bits.tolist()))
        return probabilities, chosen

    TopKRouter.routing = record
    return lambda: seen


def sigma_scales() -> Callable[[], list[list[list[float]]]]:
    """Record the learned factors on sigma that every forward pass of this rank used, in the order of its calls."""
    from megacontext_megatron.position.gaussian import LearnableSigma

    seen: list[list[list[float]]] = []
    real = LearnableSigma.forward

    def record(self: LearnableSigma) -> Tensor:
        scales = real(self)
        seen.append(scales.tolist())
        return scales

    LearnableSigma.forward = record
    return lambda: seen
