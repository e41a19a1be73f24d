"""`python -m megacontext_megatron.doctor [FLAGS]`: what is installed, what is adapted, and what a run would really do.

With a run's flags (and under torchrun for its layout) it builds the model and checks layer by layer that what was
asked for is active.  Exits with 0 if so, 1 if something requested is not active, 2 if the request is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

from megacontext_megatron.argv import CPU_FLAG
from megacontext_megatron.config import ConfigError, Settings
from megacontext_megatron.evaluate import launch_alone
from megacontext_megatron.pretrain import exit_with, prepare

PACKAGES = (
    "megacontext-megatron",
    "megatron-core",
    "torch",
    "triton",
    "transformer-engine",
    "transformer-engine-torch",
    "flash-attn-4",
    "numpy",
    "transformers",
    "tokenizers",
    "wandb",
    "tensorboard",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One check: what was looked at, what was found, and whether that is what was asked for."""

    subject: str
    found: str
    active: bool = True


def versions() -> Iterator[Finding]:
    """Return the versions of what the plugin runs on."""
    yield Finding(subject="python", found=sys.version.split()[0])
    for name in PACKAGES:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        yield Finding(subject=name, found=found)


def devices() -> Iterator[Finding]:
    """Return the GPUs torch sees."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(subject="GPUs", found=", ".join(names) or "none: add --cpu to run without one")


def adaptations(argv: Sequence[str]) -> Iterator[Finding]:
    """Return what was adapted in Megatron for this machine."""
    from megacontext_megatron import cpu, startup

    for said in startup.install():
        yield Finding(subject="start-up", found=said)
    if CPU_FLAG in argv:
        for said in cpu.install():
            yield Finding(subject=CPU_FLAG, found=said)


def refusals() -> Iterator[Finding]:
    """Return what is not supported, and why."""
    from megacontext_megatron.refusals import REFUSALS, SPAN_REFUSALS

    for refusal in (*REFUSALS, *SPAN_REFUSALS):
        yield Finding(subject=refusal.flag, found=f"not supported: {refusal.why}")


def examine_layers(model: Sequence[Any], settings: Settings) -> Iterator[Finding]:
    """Check every attention layer of built model chunks against the settings."""
    from megatron.core.transformer.attention import SelfAttention

    from megacontext_megatron.attention.layer_spec import resolved_layers
    from megacontext_megatron.attention.transformer_config import MegaContextTransformerConfig

    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, SelfAttention):
                resolved = resolved_layers(cast(MegaContextTransformerConfig, module.config))[module.layer_number - 1]
                core = type(module.core_attention).__name__
                rotary = f"rotary {resolved.rotary}"
                found = f"{type(module).__name__}, {resolved.encoding}, {rotary}, core {core} ({resolved.backend})"
                missing = ", ".join(_missing(module, settings))
                yield Finding(
                    subject=f"layer {module.layer_number}",
                    found=found + (f"; NOT ACTIVE: {missing}" if missing else ""),
                    active=not missing,
                )


def _missing(attention: Any, settings: Settings) -> Iterator[str]:
    """Return what a layer should do and does not."""
    from megacontext_megatron.attention.self_attention import SpanSelfAttention

    gaussian = settings.gaussian
    if gaussian is None:
        return
    if not isinstance(attention, SpanSelfAttention):
        yield f"{settings.encoding} (the layer is {type(attention).__name__})"
        return
    rotates = attention.layer_number not in settings.no_rope_layers
    if rotates and not turns(attention):
        yield f"rotation by {settings.encoding}"
    by_layer = settings.rotary.by_layer is not None
    if rotates and by_layer != (type(attention.rotary).__name__ == "TableRotary"):
        yield f"frequencies of {settings.encoding}"
    fused = type(attention.rotary).__name__ == "FusedGaussianRotary"
    if rotates and not by_layer and fused != (settings.backend == "triton"):
        yield f"rotary by {settings.backend}"
    learned = getattr(attention.rotary, "sigma_scale", None)
    if rotates and gaussian.learnable_sigma != "none" and learned is None:
        yield "--gaussian-rope-learnable-sigma"
    if gaussian.log_width_bias and attention.log_width_bias is None:
        yield "--gaussian-rope-log-width-bias"
    wanted = [str(bias.name) for bias in settings.biases_of(attention.layer_number)]
    wanted += ["alibi-lora"] if settings.slopes_by_query(attention.layer_number) else []
    yield from (f"--position-bias {name}" for name in wanted if name not in _carried(attention))


def _carried(attention: Any) -> Any:
    """Return the biases that reach the scores of a layer, by name."""
    from megacontext_megatron.attention.biased_attention import BiasedAttention
    from megacontext_megatron.attention.kernel_attention import KernelAttention

    core = attention.core_attention
    if isinstance(core, BiasedAttention):
        return core._biases
    return attention._biases if attention._fold is not None or isinstance(core, KernelAttention) else {}


def turns(attention: Any) -> bool:
    """Return whether a layer's rotary changes a key by its row's place, and damps a gist where sigma is not 0."""
    import torch

    from megacontext_megatron.spans.metadata import SpanMetadata

    if attention.rotary is None:
        return False
    settings = attention.config.settings
    device = torch.device(torch.cuda.current_device())
    start = torch.tensor([[0], [5 * settings.context.block_size]], device=device)
    level = torch.tensor([[0], [settings.context.max_level]], device=device)
    spans = SpanMetadata.of_nodes(start, level, settings.context.block_size)
    groups, width = attention.num_query_groups_per_partition, settings.rotary.head_dim
    key = torch.ones(2, 1, groups, width, device=device)
    # what contextual frequencies read beside places
    hidden = torch.ones(2, 1, attention.config.hidden_size, device=device)
    contextual = getattr(attention.rotary, "steps", None) is not None
    with torch.no_grad():
        _, finished = attention.rotary(key, key, spans, *([hidden] if contextual else []))
    place_read = not torch.equal(finished[0], finished[1])
    damped = bool(finished[1].double().norm() < finished[0].double().norm() * (1 - 1e-5))
    expected = settings.gaussian.sigma != "none" and settings.gaussian.renorm == "none"
    return place_read and damped == expected


def examine_run(argv: Sequence[str]) -> Iterator[Finding]:
    """Build the model that flags ask for and check it; raises ConfigError for a refused request."""
    from megatron.core import parallel_state
    from megatron.training.training import get_model, initialize_megatron

    from megacontext_megatron.model.carrier import SpanCarrier
    from megacontext_megatron.run import Run, parse

    with quiet():
        args, settings = parse()
        initialize_megatron()
        model = get_model(Run(args, settings).model_provider, wrap_with_ddp=False)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    yield Finding(subject="encoding", found=settings.encoding)
    yield Finding(subject="context", found=_context_line(settings))
    yield Finding(subject=f"pipeline stage {stage}", found=f"{len(model)} model chunk(s)")
    if settings.gaussian is not None:
        carried = all(any(isinstance(m, SpanCarrier) for m in chunk.modules()) for chunk in model)
        yield Finding(subject="carrier", found="span metadata" if carried else "NOT ACTIVE", active=carried)
        fused = args.apply_rope_fusion
        yield Finding(subject="apply_rope_fusion", found=str(fused), active=not fused)
    yield from examine_layers(model, settings)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what Megatron prints while it starts; shown after all if it fails."""
    said = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(said):
            yield
    except ConfigError:
        raise
    except BaseException:
        print(said.getvalue()[-2000:])
        raise
    finally:
        logging.disable(logging.NOTSET)


def _context_line(settings: Settings) -> str:
    context = settings.context
    if not settings.megacontext:
        return f"{context.window} rows, all tokens"
    return (
        f"{context.window} rows over {context.source_length} tokens, K = {context.block_size}, levels 0 to "
        f"{context.max_level}, {context.variants} variant(s), plan {context.plan}"
    )


def tables() -> dict[str, str]:
    """Return the README's generated tables, Markdown, by the name of their marker."""
    from megacontext_megatron.arguments import flag_table
    from megacontext_megatron.position.registry import support_table
    from megacontext_megatron.telemetry.names import metric_table

    return {"flags": flag_table(), "support": support_table(), "metrics": metric_table()}


def show(title: str, findings: Iterator[Finding]) -> bool:
    """Print findings under a title as they come; returns whether all are active."""
    print(f"\n{title}")
    good = True
    for finding in findings:
        print(f"  {finding.subject:32s} {finding.found}", flush=True)
        good &= finding.active
    return good


def main(argv: Sequence[str] | None = None) -> None:
    """Examine the installation, and with flags the run they ask for."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python -m megacontext_megatron.doctor [--tables] [FLAGS of megacontext_megatron.pretrain]",
        allow_abbrev=False,
    )
    parser.add_argument("--tables", action="store_true", help="print the README's generated tables and exit")
    own, flags = parser.parse_known_args(words)
    if own.tables:
        print("\n\n".join(tables().values()))
        return
    launch_alone()
    try:
        prepare(flags)
        first = os.environ["RANK"] == "0"
        if first:
            show("versions", versions())
            show("devices", devices())
            show("adapted", adaptations(flags))
            show("not supported", refusals())
        asked = [flag for flag in flags if flag != CPU_FLAG]
        if asked and not show(f"this run, rank {os.environ['RANK']}", examine_run(flags)):
            print("error: something requested is not active; see NOT ACTIVE above", file=sys.stderr)
            raise SystemExit(1)
    except ConfigError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
