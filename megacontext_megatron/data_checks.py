"""What a run refuses of the data that its flags name, before any model is built."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, cast

from megacontext_megatron.config import ConfigError
from megacontext_megatron.data.indexed import check_indexed_dataset
from megacontext_megatron.data.manifest import TrainingTokenizer, check_tokenizer

Namespace = argparse.Namespace


def check_data(args: Namespace) -> None:
    """Refuse missing, damaged or foreign data sets, and a tokenizer other than the one they were made with."""
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [b for b in (blend, *(per_split or ())) if b is not None]
    if not blends:
        raise ConfigError("no data: give --data-path (or --train-data-path and its kin), or --mock-data to try flags.")
    if not args.skip_train and args.eval_iters and not _has_validation_data(args, per_split):
        raise ConfigError(
            f"--eval-iters {args.eval_iters} has nothing to evaluate on: give --valid-data-path, a --split with a "
            "second part, or --eval-iters 0."
        )
    for prefix in _local_prefixes(blends):
        check_indexed_dataset(prefix)


def holds_out(args: Namespace) -> bool:
    """Return whether the flags name validation data."""
    from megatron.training.utils import get_blend_and_blend_per_split

    return _has_validation_data(args, get_blend_and_blend_per_split(args)[1])


def check_tokenizers(args: Namespace) -> None:
    """Refuse a tokenizer other than the one the data sets were made with."""
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        return
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [b for b in (blend, *(per_split or ())) if b is not None]
    null = args.tokenizer_type == "NullTokenizer"
    tokenizer = TrainingTokenizer(
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        eod_id=args.null_tokenizer_eod_id if null else getattr(get_tokenizer(), "eod", None),
    )
    check_tokenizer(_local_prefixes(blends), tokenizer)


def _local_prefixes(blends: Sequence[Any]) -> list[str]:
    return sorted({prefix for names, _ in blends for prefix in names if "://" not in prefix})


def _has_validation_data(args: Namespace, per_split: Sequence[Any] | None) -> bool:
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    if per_split:
        return per_split[1] is not None
    return args.split is None or parse_and_normalize_split(args.split)[1] > 0


def check_answer_tokens(args: Namespace) -> None:
    """Refuse ids of `--mc-loss-after-token` that the tokenizer does not have, behind which no row would ever count."""
    from megatron.training import get_tokenizer

    size = int(cast(Any, get_tokenizer()).vocab_size)
    for token in args.mc_loss_after_token or ():
        if token >= size:
            raise ConfigError(f"--mc-loss-after-token {token} is no id of the tokenizer, which has {size}.")


def check_end_of_document(args: Namespace) -> None:
    """Refuse requests that need an end-of-document token from a tokenizer that has none."""
    from megatron.training import get_tokenizer

    needs = {"--mc-eod-policy no-cross": args.mc_eod_policy == "no-cross", "--eod-mask-loss": args.eod_mask_loss}
    for flag, asked in needs.items():
        if asked and getattr(get_tokenizer(), "eod", None) is None:
            raise ConfigError(
                f"{flag} needs an end-of-document token, and the tokenizer of --tokenizer-model "
                f"{args.tokenizer_model} has none: give a folder whose tokenizer_config.json sets eos_token."
            )
