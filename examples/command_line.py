"""Command lines of the examples: flags by name, and those of the models that all of them train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Value = str | int | float | bool | tuple[int, ...] | list[str]
Flags = dict[str, Value]


class Sizes(Protocol):
    """How large a model is, and its initial weights' standard deviation."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        ...

    @property
    def hidden(self) -> int:
        """Channels."""
        ...

    @property
    def heads(self) -> int:
        """Attention heads."""
        ...

    @property
    def init_std(self) -> float:
        """Standard deviation."""
        ...


def model_flags(sizes: Sizes) -> Flags:
    """Return what makes a small model of the kind that is trained today, by flag, without its encoding."""
    return {
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "attention_dropout": 0,
        "hidden_dropout": 0,
        "untie_embeddings_and_output_weights": True,
        "init_method_std": sizes.init_std,
    }


def token_flags(vocabulary: int, end_of_document: int) -> Flags:
    """Return what data of bare ids are, by flag."""
    return {
        "tokenizer_type": "NullTokenizer",
        "vocab_size": vocabulary,
        "null_tokenizer_eod_id": end_of_document,
        "make_vocab_size_divisible_by": 16,
    }


def words(flags: Mapping[str, Value]) -> list[str]:
    """Return flags as a command line: True is a switch, a tuple or list gives several values."""
    out: list[str] = []
    for name, value in flags.items():
        out.append("--" + name.replace("_", "-"))
        if value is not True:
            out.extend(map(str, value if isinstance(value, tuple | list) else (value,)))
    return out
