"""The flags of the smallest model that every layout can split."""

from collections.abc import Mapping
from typing import Any

TINY: Mapping[str, Any] = {
    "cpu": True,
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "seq_length": 128,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "position_embedding_type": "gaussian_rope",
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 0,
    "train_iters": 10,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "eval_interval": 1000,
    "eval_iters": 0,
    "seed": 1234,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 320,
    "null_tokenizer_eod_id": 256,
    "make_vocab_size_divisible_by": 16,
    "split": "90,5,5",
    "num_workers": 0,
    "ckpt_format": "torch_dist",
}
# With the default weights the loss hardly depends on positions; with these it does.
STRONG: Mapping[str, Any] = {"init_method_std": 0.15}


def tiny_flags(*, strong: bool = False, **overrides: Any) -> list[str]:
    """Return the tiny model's command line.

    An override is named like its flag, with underscores: True is the bare flag, False or None
    removes it, a list gives several values. ``strong`` makes the loss depend on positions.
    """
    values = {**TINY, **(STRONG if strong else {}), **overrides}
    values.setdefault("max_position_embeddings", values["seq_length"])
    flags: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags.extend(map(str, value if isinstance(value, list | tuple) else [value]))
    return flags
