"""Megatron's data sets, built at C tokens a sample and wrapped into working contexts."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megacontext_megatron.config import ContextConfig, CurriculumStage, Settings
from megacontext_megatron.data.samples import RawDataset, SampleIdentity, WorkingContextDataset
from megacontext_megatron.data.teacher_cache import TeacherCache, TeacherManifest
from megacontext_megatron.model.step import pipeline_ends, reads_tokens
from megacontext_megatron.model.teaching import cached_shapes
from megacontext_megatron.spans.plan import plan_rows


class ContextPlanner:
    """plan_rows bound to a context and the stages of its curriculum; a class, so that loader workers can receive it."""

    def __init__(self, context: ContextConfig, stages: Sequence[CurriculumStage] = ()) -> None:
        self._variants = context.variants
        self._starts = [stage.samples for stage in stages]
        self._contexts = [stage.of(context) for stage in stages] or [context]

    def __call__(
        self, key: tuple[int, int, int, int], end_of_document: NDArray[np.int64] | None, /
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return the rows as data.samples.RowPlanner asks; the stage follows from the item's number alone."""
        consumed = key[2] * self._variants + key[3]
        context = self._contexts[max(0, bisect_right(self._starts, consumed) - 1)]
        plan = plan_rows(context, key, end_of_document)
        return {"start": plan.start, "level": plan.level, "shortened": np.array([plan.shortened])}


def dataset_config(args: Any, context: ContextConfig) -> GPTDatasetConfig:
    """Return the configuration of Megatron's GPT data set for raw samples of C tokens, from parsed arguments."""
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=context.source_length,
        blend=blend,
        blend_per_split=per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=_sequences_per_dataset(args),
    )


def teacher_manifest(args: Any, settings: Settings, samples: int, teacher: tuple[str, int]) -> TeacherManifest:
    """Return the manifest of a cache for the first `samples` raw training samples of a run of parsed arguments.

    `teacher` is the path and the iteration of its checkpoint.
    """
    from megatron.training import get_tokenizer

    context = settings.context
    data, split = _training_data(args)
    return TeacherManifest(
        source_length=context.source_length,
        block_size=context.block_size,
        horizon=context.horizon,
        vocabulary=int(cast(Any, get_tokenizer()).vocab_size),
        hidden_size=args.hidden_size,
        seed=args.seed,
        data=data,
        split=split,
        samples=samples,
        checkpoint=teacher[0],
        iteration=teacher[1],
    )


def _training_data(args: Any) -> tuple[tuple[str, ...], str]:
    """Return the data that training samples are of, as absolute prefixes behind their weights, and the split."""
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        return ("mock",), str(args.split)
    blend, per_split = get_blend_and_blend_per_split(args)
    prefixes, weights = cast(Any, blend if blend is not None else cast(Any, per_split)[0])
    words = [str(Path(prefix).resolve()) for prefix in prefixes]
    if weights is not None:
        words = [f"{weight} {word}" for weight, word in zip(weights, words, strict=True)]
    return tuple(words), str(args.split if blend is not None else None)


def raw_samples_needed(args: Any, settings: Settings) -> int:
    """Return how many raw samples the whole training run reads."""
    contexts = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    return -(-contexts // settings.context.variants)


def check_teacher(args: Any, settings: Settings) -> None:
    """Refuse a teacher cache that is damaged or was not made for this run; raises ConfigError naming flag and file."""
    objective = settings.objective
    if objective.teacher != "cache" or objective.teacher_path is None:
        return
    run = teacher_manifest(args, settings, raw_samples_needed(args, settings), teacher=("", 0))
    manifest = TeacherManifest.read(objective.teacher_path)
    manifest.check(run, objective.teacher_path, states=objective.pooling > 0)
    TeacherCache(objective.teacher_path, list(cached_shapes(settings, run.vocabulary, first=True, last=True)))


def _sequences_per_dataset(args: Any) -> dict[str, int] | None:
    path = args.per_dataset_sequences_path
    return None if path is None else json.loads(Path(path).read_text())


class DatasetProvider:
    """Megatron's `train_valid_test_dataset_provider`: every stage and virtual chunk gets identically ordered items.

    TP rank 0 of each stage iterates; stages that read no tokens get rows only, derived from the items' numbers.
    """

    is_distributed = True

    def __init__(self, args: Any, settings: Settings) -> None:
        self._args, self._settings = args, settings

    def __call__(
        self, sizes: list[int | None], vp_stage: int | None = None
    ) -> tuple[WorkingContextDataset | None, ...]:
        """Return the train, validation and test sets for requested numbers of contexts; None for empty splits."""
        context = self._settings.context
        raw_sizes = [None if n is None else -(-n // context.variants) for n in sizes]
        if self._settings.objective.teacher == "cache" and raw_sizes[0]:
            # The order of samples may depend on their number, so it must be the one that the teacher saw.
            raw_sizes[0] = TeacherManifest.read(cast(str, self._settings.objective.teacher_path)).samples
        reads = reads_tokens(self._settings, vp_stage)
        first = mpu.get_tensor_model_parallel_rank() == 0
        config = dataset_config(self._args, context)
        raw = self._build(config, raw_sizes, wanted=first and reads)
        # Every stage must find the same splits, or the loop would run a split that some stages cannot read.
        return tuple(
            self.contexts(data, context, split, self._teacher(split, vp_stage))
            if first and found and size != 0 and (data is not None or not reads)
            else None
            for data, size, found, split in zip(raw, raw_sizes, present_splits(config), Split, strict=True)
        )

    def _teacher(self, split: Split, vp_stage: int | None) -> TeacherCache | None:
        """Return the cache that a stage's training items are to carry something of."""
        if split is not Split.train:
            return None
        names = list(cached_shapes(self._settings, 0, **pipeline_ends(vp_stage)))
        return TeacherCache(cast(str, self._settings.objective.teacher_path), names) if names else None

    def contexts(
        self, raw: RawDataset | None, context: ContextConfig, split: Split, teacher: TeacherCache | None = None
    ) -> WorkingContextDataset:
        """Return the working contexts of a raw data set, or their rows alone where it is None."""
        eod = None
        if context.eod_policy == "no-cross":
            from megatron.training import get_tokenizer

            eod = cast(Any, get_tokenizer()).eod
        identity = SampleIdentity(seed=self._settings.seed, split=split.value, eod=eod)
        stages = self._settings.curriculum if split is Split.train else ()
        return WorkingContextDataset(raw, context, identity, ContextPlanner(context, stages), teacher=teacher)

    def held_out(self, samples: int) -> Any:
        """Return Megatron's validation set of at least `samples` raw samples, on every rank; None if there is none."""
        return self._build(dataset_config(self._args, self._settings.context), [1, samples, 1], wanted=True)[1]

    def training(self, samples: int) -> Any:
        """Return Megatron's training set of `samples` raw samples, on every rank; None if there is none."""
        return self._build(dataset_config(self._args, self._settings.context), [samples, 1, 1], wanted=True)[0]

    def _build(self, config: GPTDatasetConfig, sizes: list[int | None], *, wanted: bool) -> list[RawDataset | None]:
        kind = MockGPTDataset if self._args.mock_data else GPTDataset
        builder = BlendedMegatronDatasetBuilder(kind, cast(list[int], sizes), lambda: wanted, config)
        return cast(list[RawDataset | None], builder.build())


def present_splits(config: GPTDatasetConfig) -> list[bool]:
    """Return whether there is training, validation and test data, from the flags alone."""
    if config.blend_per_split is not None and any(config.blend_per_split):
        return [blend is not None for blend in config.blend_per_split]
    return [bounds is not None for bounds in config.split_matrix or ()]
