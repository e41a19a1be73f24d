"""`python -m megacontext_megatron.teacher --load CHECKPOINT`: caches what a full-context teacher says.

Runs a checkpoint on all C tokens of a run's first `--mc-teacher-samples` raw training samples as rows, and writes the
logits of the last H and the final hidden states averaged over each block of K (see data.teacher_cache).  Model,
tokenizer and data come from the checkpoint unless flags say otherwise; C, K, H, data, split and seed must be those of
the run that will learn.  Runs in one process, or data parallel under torchrun.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacontext_megatron.argv import value_of
from megacontext_megatron.config import ConfigError, Settings
from megacontext_megatron.evaluate import FIXED_FLAGS, launch_alone, restored_arguments
from megacontext_megatron.pretrain import exit_with, prepare

if TYPE_CHECKING:
    from megacontext_megatron.data.teacher_cache import CacheWriter, TeacherManifest

LAYOUTS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def main(argv: Sequence[str] | None = None) -> None:
    """Write a cache and print its size."""
    words = list(sys.argv[1:] if argv is None else argv)
    launch_alone()
    try:
        if value_of(words, "--load") is None and "--help" not in words and "-h" not in words:
            raise ConfigError("--load is needed: the folder of the teacher's checkpoint.")
        # The teacher may have been trained on other contexts than those it teaches.
        prepare([*words, *FIXED_FLAGS, "--finetune"])
        from megacontext_megatron.arguments import add_teacher_arguments
        from megacontext_megatron.run import parse

        args, settings = parse(add_teacher_arguments, restored_arguments(words))
        check(args, settings)
        manifest = teach(args, settings)
    except ConfigError as error:
        exit_with(error)
        return
    if args.rank == 0:
        sizes = manifest.sizes()
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        print(f"{manifest.samples} samples, {sum(sizes.values()):,} bytes ({listed})")
        print(f"written to {args.mc_teacher_path}")
    from torch.distributed import destroy_process_group

    destroy_process_group()


def check(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse what cannot be cached, before a model is built; raises ConfigError."""
    from megacontext_megatron.data.teacher_cache import CacheWriter

    if args.mc_teacher_path is None or args.mc_teacher_samples < 1:
        raise ConfigError("--mc-teacher-path and --mc-teacher-samples are needed: where to write, and how much.")
    if settings.gaussian is None or not settings.megacontext:
        raise ConfigError(
            "the teacher needs --position-embedding-type gaussian_rope, and --megacontext with the --mc-source-length, "
            "--mc-block-size and --mc-horizon of the run that will learn."
        )
    for name in LAYOUTS:
        if getattr(args, name) > 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is not supported here: leave it at 1.")
    CacheWriter.check(Path(args.mc_teacher_path))


def teach(args: argparse.Namespace, settings: Settings) -> TeacherManifest:
    """Load the checkpoint and write the cache; collective over all data-parallel ranks."""
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.training import get_model, initialize_megatron
    from torch.distributed import barrier

    from megacontext_megatron.data.teacher_cache import CacheWriter
    from megacontext_megatron.model.datasets import teacher_manifest
    from megacontext_megatron.run import Run

    initialize_megatron()
    run = Run(args, settings)
    [model] = get_model(run.model_provider, wrap_with_ddp=False)
    load_checkpoint([model], None, None)
    raw = run.datasets.training(args.mc_teacher_samples)
    if raw is None:
        raise ConfigError("there is no training data: give --train-data-path, or --data-path and --split.")
    manifest = teacher_manifest(args, settings, args.mc_teacher_samples, teacher=checkpoint(args))
    writer = CacheWriter(Path(args.mc_teacher_path), manifest)
    if args.rank == 0:
        writer.create()
    barrier()
    try:
        writer.join()
        write(args, settings, model, (raw, writer))
        writer.flush()
    except BaseException:
        if args.rank == 0:
            writer.discard()
        raise
    barrier()
    if args.rank == 0:
        writer.publish()
    return manifest


def checkpoint(args: argparse.Namespace) -> tuple[str, int]:
    """Return the path and the iteration of the teacher's checkpoint."""
    from megacontext_megatron.retrofit.checkpoint import checkpoint_path

    path = checkpoint_path(args.load, args.ckpt_step)
    assert path is not None
    return str(path.resolve()), int(path.name.partition("_")[2] or 0)


def write(args: argparse.Namespace, settings: Settings, model: Any, data: tuple[Any, CacheWriter]) -> None:
    """Write what the model says of this data-parallel rank's samples, a micro-batch at a time."""
    import torch
    from megatron.core import mpu

    from megacontext_megatron.model.teaching import taught

    (raw, writer), size, samples = data, args.micro_batch_size, args.mc_teacher_samples
    context, rank, ranks = settings.context, mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    device, mask = torch.device(torch.cuda.current_device()), None
    if args.transformer_impl == "local":
        shape = (context.source_length, context.source_length)
        mask = torch.ones(shape, dtype=torch.bool, device=device).triu(1)[None, None]
    vocabulary = writer.manifest.vocabulary
    for step in range(-(-samples // (size * ranks))):
        first = (step * ranks + rank) * size
        # All ranks take as many steps, because experts may lie on several; what is too much is not written.
        numbers = [min(sample, samples - 1) for sample in range(first, first + size)]
        texts = [torch.cat([item["tokens"], item["labels"][-1:]]) for item in (raw[sample] for sample in numbers)]
        lesson = taught(model, torch.stack(texts).to(device), settings, mask)
        assert lesson.logits is not None
        assert lesson.states is not None
        logits, states = lesson.logits[..., :vocabulary].transpose(0, 1).cpu(), lesson.states.cpu()
        for place, sample in enumerate(range(first, min(first + size, samples))):
            writer.write(sample, texts[place], logits[place], states[place])


if __name__ == "__main__":
    main()
