"""Which backend computes each layer's attention: the first that is able to, or the one asked for, or a refusal.

A backend is judged by what a layer needs of it, before anything is built; what was chosen is printed with the layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from megacontext_megatron.attention_config import MEGATRON, AttentionConfig
from megacontext_megatron.config import ConfigError
from megacontext_megatron.encoding_config import BiasConfig
from megacontext_megatron.layer_patterns import windowed_layers
from megacontext_megatron.position.linear_biases import alibi_slopes

Namespace = argparse.Namespace
_AMPERE = (8, 0)

_SHARED_MEMORY = 227 * 1024
"""Bytes a block can have on Hopper and datacentre Blackwell, which the largest tiles of the kernels fill."""

_MOST_HEADS = 128
"""Of a query group, that a tile of the window kernel holds."""

_FRAME_ROWS = 128
"""That the kernel counts distances of scores from one anchor for."""

_FRAME_NATS = 2.0**17
"""The most that a bias may amount to within a frame: fp32 scores are then off by less than 2^-7, as bf16 is."""

Bias = Literal["none", "folded", "linear", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one layer needs of its attention.

    `bias` is none, or folded into queries and keys, or linear in the centres of keys, or another; `learned` says
    whether slopes of a linear bias train or depend on queries, `frame` what a bias can amount to at the start between
    rows that the plugin's kernel counts from one anchor, in nats.
    """

    args: Namespace
    layer: int
    windowed: bool
    bias: Bias
    learned: bool
    frame: float

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.args.kv_channels or self.args.hidden_size // self.args.num_attention_heads

    @property
    def groups(self) -> int:
        """Query groups."""
        args = self.args
        return args.num_query_groups if args.group_query_attention else args.num_attention_heads

    @property
    def split(self) -> bool:
        """Whether rows are split over ranks."""
        return self.args.context_parallel_size > 1

    @property
    def on_te(self) -> bool:
        """Whether the layers are Transformer Engine's."""
        return self.args.transformer_impl == "transformer_engine"

    @property
    def exchange(self) -> str:
        """How Transformer Engine exchanges this layer's rows over context-parallel ranks."""
        types = self.args.cp_comm_type or ["p2p"]
        return types[0] if len(types) == 1 else types[self.layer - 1]

    @property
    def flag(self) -> str:
        """The flag that chooses among backends for this layer."""
        return "--mc-window-backend" if self.windowed else "--mc-global-backend"

    @property
    def asked(self) -> str:
        """What the flag says."""
        return self.args.mc_window_backend if self.windowed else self.args.mc_global_backend


def no_kernel(args: Namespace) -> str | None:
    """Return why no kernel of the plugin's or of a library can compute attention here, in half a sentence, or None."""
    if args.cpu:
        return "it runs on a GPU, and --cpu asks for none"
    if not (args.bf16 or args.fp16):
        return "it computes in half precision; add --bf16"
    if args.attention_dropout:
        return "it has no dropout; add --attention-dropout 0"
    if args.softmax_type != "vanilla":
        return f"it has no --softmax-type {args.softmax_type}"
    if args.gaussian_rope_log_width_bias:
        return "keys are wider than values with --gaussian-rope-log-width-bias"
    if args.qk_clip or args.log_max_attention_logit:
        return "it does not find the largest scores, which --qk-clip and --log-max-attention-logit read"
    return None


def _own(need: Need) -> Iterator[str]:
    if find_spec("triton") is None:
        yield "the package triton is not installed"
    heads = need.args.num_attention_heads // need.groups
    if need.windowed and need.bias == "none" and heads > _MOST_HEADS:
        yield f"in windows it serves up to {_MOST_HEADS} query heads of a group, not {heads}"
    if torch.cuda.is_available() and _shared_memory() < _SHARED_MEMORY:
        yield f"its tiles need {_SHARED_MEMORY // 1024} KiB of shared memory, as GPUs of the H100's kind have"
    if need.head_dim not in (64, 128):
        yield f"it serves heads of 64 or 128 channels, not of {need.head_dim}"
    if need.bias == "other":
        yield "of all biases it has those that are linear in the distance"
    if need.bias != "none" and need.args.mc_gist_span_head:
        yield "its centres are whole half tokens, and --mc-gist-span-head moves them"
    if need.frame > _FRAME_NATS:
        yield (
            f"gists of --mc-block-size {need.args.mc_block_size} and these slopes put {need.frame:.0f} nats within "
            f"{_FRAME_ROWS} rows, and beyond {_FRAME_NATS:.0f} its rounding shows; lower --bias-slope-scale"
        )
    chunk = need.args.seq_length // (2 * need.args.context_parallel_size)
    if need.windowed and need.split and need.args.window_size[0] > chunk:
        yield (
            f"a window of {need.args.window_size[0]} rows is longer than the {chunk} rows of a chunk of "
            "--context-parallel-size"
        )


def _shared_memory() -> int:
    return torch.cuda.get_device_properties().shared_memory_per_block_optin


def _library(need: Need) -> Iterator[str]:
    if need.split:
        yield "it sees one context-parallel rank's rows alone"
    if need.bias in ("linear", "other"):
        yield "it adds no bias to scores; --bias-fold carries linear ones in the heads of layers without rotary"


def _cudnn(need: Need) -> Iterator[str]:
    yield from _library(need)
    if torch.version.hip or (torch.cuda.is_available() and torch.cuda.get_device_capability() < _AMPERE):
        yield "it runs on NVIDIA GPUs of compute capability 8 and above"
    if need.windowed:
        yield "PyTorch's cuDNN attention has no windows"
    if need.head_dim % 8 or need.head_dim > 128:
        yield f"it serves heads of multiples of 8 up to 128 channels, not of {need.head_dim}"
    if need.args.deterministic_mode:
        yield "its backward is not deterministic"


def _flash4(need: Need) -> Iterator[str]:
    yield from _library(need)
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        yield "the package flash-attn-4 is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] not in (9, 10, 11):
        yield "it runs on GPUs of compute capability 9 to 11"
    if need.head_dim % 8 or need.head_dim > 128:
        yield f"it serves heads of multiples of 8 up to 128 channels, not of {need.head_dim}"
    if need.args.deterministic_mode:
        yield "its backward is not deterministic"


def _flex(need: Need) -> Iterator[str]:
    if need.split:
        yield "it sees one context-parallel rank's rows alone"
    if need.bias == "other":
        yield "of all biases it has those that are linear in the distance"
    if need.bias == "linear" and need.learned:
        yield "its backward is hundreds of times slower where slopes are learned or depend on queries"


def _megatron(need: Need) -> Iterator[str]:
    if need.on_te and need.bias in ("linear", "other"):
        yield (
            "Transformer Engine adds no bias of centres to scores; --transformer-impl local has dense attention for "
            "every bias, and --bias-fold carries linear ones in queries and keys"
        )
    if need.on_te and need.windowed and need.split and "p2p" in need.exchange:
        yield (
            f"Transformer Engine's ring, --cp-comm-type {need.exchange}, has no sliding windows; give a2a or "
            "all_gather, to all layers or to those with a window"
        )
    ranks = need.args.tensor_model_parallel_size * need.args.context_parallel_size
    if need.on_te and need.split and need.exchange == "a2a" and need.groups % ranks:
        yield (
            "--cp-comm-type a2a gives each rank whole query groups, so their number must be a multiple of "
            "--tensor-model-parallel-size times --context-parallel-size"
        )


_OBSTACLES: dict[str, Callable[[Need], Iterator[str]]] = {
    "triton": _own,
    "cudnn": _cudnn,
    "flash4": _flash4,
    "flex": _flex,
    MEGATRON: _megatron,
}


def why_not(backend: str, need: Need) -> str | None:
    """Return why a backend cannot compute a layer's attention, in half a sentence, or None where it can."""
    general = None if backend == MEGATRON else no_kernel(need.args)
    return general or next(_OBSTACLES[backend](need), None)


def preferences(need: Need) -> tuple[str, ...]:
    """Return the backends that are tried where none is asked for, the fastest first.

    FlexAttention and FlashAttention-4 are chosen only by name: one compiles while it runs, the other is a beta.
    """
    if need.windowed or need.bias == "linear":
        return "triton", MEGATRON
    if need.on_te:
        return (MEGATRON,)
    return "cudnn", "triton", MEGATRON


def backend_of(need: Need) -> str:
    """Return the backend of a layer; raises ConfigError naming the flag where none can be, or not the one asked for."""
    if need.asked != "auto":
        reason = why_not(need.asked, need)
        if reason is not None:
            raise ConfigError(f"{need.flag} {need.asked} does not serve layer {need.layer}: {reason}.")
        return need.asked
    reasons = {backend: why_not(backend, need) for backend in preferences(need)}
    chosen = next((backend for backend, reason in reasons.items() if reason is None), None)
    if chosen is None:
        told = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        raise ConfigError(f"{need.flag} auto finds no attention for layer {need.layer} ({told}).")
    return chosen


def _bias(args: Namespace, biases: tuple[BiasConfig, ...], layer: int) -> Bias:
    """Return the kind of the biases of a layer, counted from 1."""
    own = [bias for bias in biases if layer in bias.layers]
    by_query = layer == 1 and "alibi-lora" in args.retrofit
    if not all(bias.linear for bias in own):
        return "other"
    if own and args.bias_fold:
        return "folded"
    return "linear" if own or by_query else "none"


def _frame(args: Namespace, biases: tuple[BiasConfig, ...], layer: int) -> float:
    """Return what linear biases of a layer amount to between the rows of a frame of the widest gists, in nats."""
    scales = sum(bias.slope_scale for bias in biases if bias.linear and layer in bias.layers)
    widest = args.mc_block_size**args.mc_max_level if args.megacontext else 1
    return max(alibi_slopes(args.num_attention_heads)) * scales * _FRAME_ROWS * widest


def _needs(args: Namespace, biases: tuple[BiasConfig, ...]) -> list[Need]:
    """Return what every layer needs, in order."""
    windowed = set(windowed_layers(args))
    return [
        Need(
            args=args,
            layer=layer,
            windowed=layer in windowed,
            bias=_bias(args, biases, layer),
            frame=_frame(args, biases, layer),
            learned=args.grape_a_learnable or args.grape_a_gate != "none" or "alibi-lora" in args.retrofit,
        )
        for layer in range(1, args.num_layers + 1)
    ]


def attention_config(args: Namespace, biases: tuple[BiasConfig, ...]) -> AttentionConfig:
    """Return what computes every layer's attention.

    Raises ConfigError where a layer cannot have what was asked for, and where a flag has no effect.
    """
    if args.mc_encoding is None:
        for flag in ("mc_window_backend", "mc_global_backend", "mc_reach_skip"):
            if getattr(args, flag) not in ("auto", False):
                raise ConfigError(
                    f"--{flag.replace('_', '-')} has no effect without a --position-embedding-type of the plugin's or "
                    "--megacontext: stock encodings run Megatron's own layers."
                )
        return AttentionConfig()
    needs = _needs(args, biases)
    windowed = [need for need in needs if need.windowed]
    for flag, kind, there in (
        ("window", "a window", windowed),
        ("global", "every row", len(windowed) < args.num_layers),
    ):
        asked = getattr(args, f"mc_{flag}_backend")
        if asked != "auto" and not there:
            raise ConfigError(f"--mc-{flag}-backend {asked} has no effect: no layer attends to {kind}.")
    config = AttentionConfig(backends=tuple(map(backend_of, needs)), reach_skip=args.mc_reach_skip)
    if needs[0].split and args.cp_comm_type not in (None, ["p2p"]) and MEGATRON not in config.backends:
        raise ConfigError(
            f"--cp-comm-type {' '.join(args.cp_comm_type)} has no effect: all layers run in the plugin's kernel, which "
            "fetches rows by itself."
        )
    if config.reach_skip:
        _check_reach(args, needs, config)
    return config


def _check_reach(args: Namespace, needs: list[Need], config: AttentionConfig) -> None:
    if not args.qk_layernorm or args.normalization != "RMSNorm":
        raise ConfigError(
            "--mc-reach-skip needs --qk-layernorm with --normalization RMSNorm: nothing else bounds the scores that a "
            "bias must outweigh before keys can be left out."
        )
    biased = [need for need in needs if need.bias in ("linear", "folded")]
    if not biased:
        raise ConfigError(
            "--mc-reach-skip has no effect: no layer has linear biases alone (--grape-a, --position-bias alibi or "
            "grape-a, --retrofit alibi-lora)."
        )
    if not any(config.backend_of(need.layer) == "triton" for need in biased):
        reason = why_not("triton", biased[0]) or f"give {biased[0].flag} triton"
        raise ConfigError(
            f"--mc-reach-skip has no effect: layer {biased[0].layer}, which has a linear bias, does not run in the "
            f"plugin's kernel: {reason}."
        )


def attention_notices(args: Namespace, biases: tuple[BiasConfig, ...], config: AttentionConfig) -> list[str]:
    """Return what of the choice of backends a user would want to hear, a sentence for layers that share it."""
    if args.mc_encoding is None or args.cpu:
        return []
    said: dict[str, list[str]] = {}
    for need in _needs(args, biases):
        for sentence in _notices(need, config.backend_of(need.layer)):
            said.setdefault(sentence, []).append(str(need.layer))
    return [f"layer {', '.join(layers)}: {sentence}" for sentence, layers in said.items()]


def _notices(need: Need, chosen: str) -> Iterator[str]:
    dense = chosen == MEGATRON and not need.on_te
    name = "dense attention" if dense else "Transformer Engine" if chosen == MEGATRON else chosen
    if need.asked == "auto":
        for backend in preferences(need):
            if backend == chosen:
                break
            yield f"{name} instead of {backend}: {why_not(backend, need)}"
    if need.bias == "folded" and (chosen == "triton" or dense):
        yield f"{name} adds biases to scores, and --bias-fold takes channels from heads for nothing"
