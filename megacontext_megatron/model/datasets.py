"""Megatron's data sets, built at C tokens a sample and wrapped into working contexts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megacontext_megatron.config import ContextConfig, Settings
from megacontext_megatron.data.samples import RawDataset, SampleIdentity, WorkingContextDataset
from megacontext_megatron.model.step import reads_tokens
from megacontext_megatron.spans.plan import plan_rows


class ContextPlanner:
    """plan_rows bound to a context; a class, so that data loader workers can receive it."""

    def __init__(self, context: ContextConfig) -> None:
        self._context = context

    def __call__(
        self, key: tuple[int, int, int, int], end_of_document: NDArray[np.int64] | None, /
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return the rows as data.samples.RowPlanner asks."""
        plan = plan_rows(self._context, key, end_of_document)
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
        reads = reads_tokens(self._settings, vp_stage)
        first = mpu.get_tensor_model_parallel_rank() == 0
        config = dataset_config(self._args, context)
        raw = self._build(config, raw_sizes, wanted=first and reads)
        # Every stage must find the same splits, or the loop would run a split that some stages cannot read.
        return tuple(
            self.contexts(data, context, split)
            if first and found and size != 0 and (data is not None or not reads)
            else None
            for data, size, found, split in zip(raw, raw_sizes, present_splits(config), Split, strict=True)
        )

    def contexts(self, raw: RawDataset | None, context: ContextConfig, split: Split) -> WorkingContextDataset:
        """Return the working contexts of a raw data set, or their rows alone where it is None."""
        eod = None
        if context.eod_policy == "no-cross":
            from megatron.training import get_tokenizer

            eod = cast(Any, get_tokenizer()).eod
        identity = SampleIdentity(seed=self._settings.seed, split=split.value, eod=eod)
        return WorkingContextDataset(raw, context, identity, ContextPlanner(context))

    def held_out(self, samples: int) -> Any:
        """Return Megatron's validation set of at least `samples` raw samples, on every rank; None if there is none."""
        return self._build(dataset_config(self._args, self._settings.context), [1, samples, 1], wanted=True)[1]

    def _build(self, config: GPTDatasetConfig, sizes: list[int | None], *, wanted: bool) -> list[RawDataset | None]:
        kind = MockGPTDataset if self._args.mock_data else GPTDataset
        builder = BlendedMegatronDatasetBuilder(kind, cast(list[int], sizes), lambda: wanted, config)
        return cast(list[RawDataset | None], builder.build())


def present_splits(config: GPTDatasetConfig) -> list[bool]:
    """Return whether there is training, validation and test data, from the flags alone."""
    if config.blend_per_split is not None and any(config.blend_per_split):
        return [blend is not None for blend in config.blend_per_split]
    return [bounds is not None for bounds in config.split_matrix or ()]
