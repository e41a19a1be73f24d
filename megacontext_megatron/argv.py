"""The command line before any parser sees it: Megatron parses it twice, once without the plugin's flags."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

from megacontext_megatron.config import ENCODINGS, STOCK_ENCODINGS, ConfigError

ENCODING_FLAG = "--position-embedding-type"
REAL_ENCODING_FLAG = "--mc-encoding"
"""Where the name given to `--position-embedding-type` is kept; Megatron itself is told `rope`."""

INSTEAD_OF_STOCK = {"relative": "none with --position-bias t5"}
"""Megatron's own encodings that have another name here."""

SPAN_FLAGS = (
    *("--megacontext", "--position-bias", "--grape-a", "--retrofit"),
    *("--rope-stretch", "--rope-stretch-rule", "--rope-resonance"),
)
"""Flags under which the plugin's code runs Megatron's own encodings, over rows with spans."""

CPU_FLAG = "--cpu"
YAML_FLAG = "--yaml-cfg"

LOCAL_FLAGS = (
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
)
"""What `--transformer-impl local` gets: fusions that need Transformer Engine or Apex are off."""

APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"
APEX_FLAGS = ("--no-gradient-accumulation-fusion",)
"""What Megatron's output layer needs where that extension of NVIDIA Apex is not installed; it holds for all layers."""

CPU_FLAGS = (
    *("--distributed-backend", "gloo"),
    *("--transformer-impl", "local"),
    *("--attention-backend", "unfused"),
    *("--num-workers", "0"),
    "--use-cpu-initialization",
    "--no-bias-dropout-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--disable-jit-fuser",
)
"""What Megatron needs to run without a GPU, in addition to LOCAL_FLAGS."""

CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""Environment of a run without a GPU, where the user set nothing else; must be set before torch is imported."""

_OWN_PREFIXES = ("--mc-", "--gaussian-rope-", *SPAN_FLAGS)


def values_of(argv: Sequence[str], flag: str) -> list[str]:
    """Return every value a flag is given on a command line, in order."""
    found = []
    for place, word in enumerate(argv):
        if word == flag and place + 1 < len(argv):
            found.append(argv[place + 1])
        elif word.startswith(flag + "="):
            found.append(word.removeprefix(flag + "="))
    return found


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """Return the value a flag has on a command line, None if absent; the last one wins, as in argparse."""
    found = values_of(argv, flag)
    return found[-1] if found else None


def wants_plugin(argv: Sequence[str]) -> bool:
    """Return whether a command line asks for anything that stock Megatron does not know."""
    own_flag = any(word.split("=")[0].startswith(_OWN_PREFIXES) or word == CPU_FLAG for word in argv)
    return own_flag or value_of(argv, ENCODING_FLAG) in ENCODINGS


def normalised(argv: Sequence[str]) -> list[str]:
    """Return a command line that every one of Megatron's parsers accepts; the same for a line already normalised.

    Our encodings become `rope` with the real name kept in `--mc-encoding`; `--cpu`, `--transformer-impl local` and the
    absence of NVIDIA Apex bring the flags they need.  Raises ConfigError for an unknown encoding, and for
    `--yaml-cfg`, which Megatron reads while it parses.
    """
    words = list(argv)
    if value_of(words, YAML_FLAG) is not None:
        raise ConfigError(f"{YAML_FLAG} is not supported: it bypasses the flags that the plugin checks; give flags.")
    for encoding in values_of(words, ENCODING_FLAG):
        _check_encoding(encoding)
    encoding = value_of(words, ENCODING_FLAG)
    ours = encoding in ENCODINGS or (encoding in STOCK_ENCODINGS and _wants_spans(words))
    hidden = (*ENCODINGS, *STOCK_ENCODINGS) if ours else ENCODINGS
    words = [_renamed(word, words[place - 1] if place else "", hidden) for place, word in enumerate(words)]
    if ours and encoding is not None:
        words += [REAL_ENCODING_FLAG, encoding]
    return words + _needed(words)


def _wants_spans(words: Sequence[str]) -> bool:
    """Return whether a stock encoding is to run over rows with spans, unless the line says so already."""
    given = {word.split("=")[0] for word in words}
    return REAL_ENCODING_FLAG not in given and not given.isdisjoint(SPAN_FLAGS)


def _needed(words: Sequence[str]) -> list[str]:
    """Return the flags that a command line's machine and layers need and that it does not hold."""
    added: list[str] = []
    if CPU_FLAG in words:
        added += _missing(words, CPU_FLAGS)
    if value_of([*words, *added], "--transformer-impl") == "local":
        added += _missing([*words, *added], LOCAL_FLAGS)
    elif find_spec(APEX_EXTENSION) is None:
        added += _missing(words, APEX_FLAGS)
    return added


def prepare_environment(argv: Sequence[str]) -> None:
    """Set what a run without a GPU needs in its environment before torch is imported."""
    if CPU_FLAG in argv:
        if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


def _check_encoding(encoding: str) -> None:
    known = ", ".join((*STOCK_ENCODINGS, *ENCODINGS))
    if encoding in INSTEAD_OF_STOCK:
        raise ConfigError(
            f"{ENCODING_FLAG} {encoding} is {INSTEAD_OF_STOCK[encoding]} here; the encodings are {known}."
        )
    if encoding not in (*STOCK_ENCODINGS, *ENCODINGS):
        raise ConfigError(f"{ENCODING_FLAG} {encoding} is unknown: choose one of {known}.")


def _renamed(word: str, before: str, hidden: Sequence[str]) -> str:
    """Return `rope` for the value of the encoding flag if it is one of `hidden`, else the word itself."""
    flag, separator, value = word.partition("=")
    if flag == ENCODING_FLAG and value in hidden:
        return flag + separator + "rope"
    return "rope" if before == ENCODING_FLAG and word in hidden else word


def _missing(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return those of `flags`, with their values, that the command line does not hold already."""
    out: list[str] = []
    given = {word.split("=")[0] for word in words}
    skip_value = False
    for flag in flags:
        if flag.startswith("--"):
            skip_value = flag in given
        if not skip_value:
            out.append(flag)
    return out
