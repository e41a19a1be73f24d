"""A training command made of Megatron's own parts alone: its data set, its batches, its GPTModel, its local layers.

It shares nothing with the plugin but what Megatron needs to start without a GPU.  One process.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megacontext_megatron.argv import CPU_FLAG

Losses = tuple[Tensor, Tensor, dict[str, Tensor]]


def main(argv: Sequence[str]) -> None:
    """Train as Megatron's `pretrain_gpt.py` does, with `argv` and without a GPU."""
    from megacontext_megatron.pretrain import prepare

    prepare(argv)
    sys.argv.remove(CPU_FLAG)
    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    args = parse_and_validate_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        container = pretrain_cfg_container_from_args(args, None)
    pretrain(
        cfg_container=container,
        train_valid_test_dataset_provider=datasets,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        model_provider=model_provider,
    )


def datasets(sizes: list[int]) -> Any:
    """Build Megatron's GPT data sets at `--seq-length` tokens."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.training import get_args, get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    args: Any = get_args()
    blend, per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=True,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def model_provider(
    pre_process: bool = True, post_process: bool = True, config: Any = None, **_: Any
) -> torch.nn.Module:
    """Build Megatron's GPTModel of its local layers."""
    from megatron.core import distributed
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args: Any = get_args()
    config = config or core_transformer_config_from_args(args)
    config.finalize_model_grads_func = distributed.finalize_model_grads
    layers: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    return GPTModel(
        config,
        layers,
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )


def forward_step(iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Run one micro-batch."""
    batch = next(iterator)
    mask = batch["loss_mask"]

    def loss(losses: Tensor) -> Losses:
        total, count = (losses.float().view(-1) * mask.view(-1)).sum(), mask.sum()
        return total, count.to(torch.int), {"lm loss": torch.stack([total.detach(), count])}

    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, loss
