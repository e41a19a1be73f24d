"""Megatron's data sets, built at C tokens a sample and wrapped into working contexts."""

from __future__ import annotations

from collections.abc import Mapping
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
    )


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
        kind = MockGPTDataset if self._args.mock_data else GPTDataset
        config = dataset_config(self._args, context)
        raw = BlendedMegatronDatasetBuilder(
            kind,
            raw_sizes,  # pyright: ignore[reportArgumentType]
            lambda: first and reads,
            config,
        ).build()
        eod = cast(Any, config.tokenizer).eod if context.eod_policy == "no-cross" else None
        identities = [SampleIdentity(seed=self._settings.seed, split=s.value, eod=eod) for s in Split]
        return tuple(
            WorkingContextDataset(cast(RawDataset | None, data), context, identity, ContextPlanner(context))
            if first and (data is not None if reads else bool(size))
            else None
            for data, size, identity in zip(raw, raw_sizes, identities, strict=True)
        )
