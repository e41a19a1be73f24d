"""The flags of encodings: one dataclass a group, whose fields are flags and whose docstrings are their help."""

# Annotations here are read at run time by Megatron's ArgumentGroupFactory, so they are not deferred to strings.
import argparse
from dataclasses import dataclass, field
from typing import Literal

from megacontext_megatron.encoding_config import BIASES, BiasName, GrapeGate, LongRopeSet, RetrofitName

RotaryBase = Literal[
    "rope",
    "linear",
    "ntk",
    "dynamic_ntk",
    "yarn",
    "longrope",
    "llama3",
    "resonance",
    "resonance_yarn",
    "multiscale",
    "clex",
    "mrope",
    "axial",
    "grapem",
]

# Megatron names a switch that is on by its --no form alone.
_LEARNABLE = {
    "argparse_meta": {"action": argparse.BooleanOptionalAction, "arg_names": ["--grapem-learnable-freq"]},
}
_NUMBERS = {"argparse_meta": {"nargs": "+", "type": float}}
_PERIODS = (1e6, 1e7, 1e8, 1e9)


@dataclass
class RotaryFlags:
    """Rotary frequencies other than Megatron's, by the name given to --position-embedding-type."""

    gaussian_rope_base: RotaryBase = "rope"
    """Rotary encoding whose frequencies gaussian_rope turns and damps by."""

    rope_stretch: float | None = None
    """Factor of linear, ntk, dynamic_ntk, yarn and longrope: the longest history over that of the base."""

    rope_stretch_rule: Literal["linear", "ntk", "yarn"] | None = None
    """How rope and gaussian_rope stretch by --rope-stretch: linear, ntk or yarn."""

    rope_original_length: int | None = None
    """Tokens of history that the base was trained on, for dynamic_ntk, yarn, longrope, llama3 (8192 if not given) and
    clex."""

    rope_resonance: bool = False
    """Round every wavelength to whole tokens (Resonance), on top of any fixed rotary encoding."""

    yarn_mscale: float | None = None
    """YaRN: numerator of the factor on cos and sin; read only with --yarn-mscale-all-dim."""

    yarn_mscale_all_dim: float | None = None
    """YaRN: denominator of the factor on cos and sin, or, with --yarn-deepseek, what scales the softmax."""

    yarn_attention_factor: float | None = None
    """YaRN: the factor on cos and sin itself, instead of 0.1 ln(stretch) + 1."""

    yarn_deepseek: bool = False
    """YaRN as DeepSeek has it: no factor on cos and sin, and one on the softmax scale of whole heads."""

    longrope_short_factors: list[float] = field(default_factory=list, metadata=_NUMBERS)
    """LongRoPE: divisors of all rotary pairs for histories up to --rope-original-length."""

    longrope_long_factors: list[float] = field(default_factory=list, metadata=_NUMBERS)
    """LongRoPE: divisors of all rotary pairs for longer ones."""

    longrope_select: LongRopeSet = "by-length"
    """LongRoPE: the set to use, or by the length of the run's history."""

    longrope_start_tokens: int = 0
    """LongRoPE: rows before this token keep the plain frequencies (the n-hat of the paper)."""

    longrope_attention_factor: float | None = None
    """LongRoPE: the factor on cos and sin, instead of sqrt(1 + ln(stretch) / ln(original length))."""

    llama3_low_factor: float = 1.0
    """Llama 3: wavelengths above the original length over this are stretched by --rope-scaling-factor."""

    llama3_high_factor: float = 4.0
    """Llama 3: wavelengths below the original length over this are kept."""

    multiscale_low: float = 1e3
    """Multiscale: rotary base of the first query group."""

    multiscale_high: float = 1e5
    """Multiscale: rotary base of the last query group."""

    clex_hidden_factor: float = 1.0
    """CLEX: width of the network that moves log-frequencies, over the number of rotary pairs."""

    clex_activation: Literal["tanh", "silu"] = "tanh"
    """CLEX: its activation."""

    clex_max_t: int = 16
    """CLEX: the greatest stretch."""

    axial_axes: int = 2
    """Axial: axes among which rotary pairs are shared out. Rows of text lie at the same place on each."""

    mrope_interleaved_sections: bool = False
    """mRoPE: the axes take turns (Qwen3-VL) instead of one section each (Qwen2-VL); --mrope-section gives the sizes."""


@dataclass
class GrapeFlags:
    """GRAPE-M: --position-embedding-type grapem."""

    grapem_learnable_freq: bool = field(default=True, metadata=_LEARNABLE)
    """Learn the frequencies of every layer."""

    grapem_per_head: bool = False
    """One set of frequencies for each query group of a layer."""

    grapem_share_across_heads: bool = False
    """One set of frequencies for all heads of a layer; this is the default."""

    grapem_log_freq_scale: float = 16.0
    """Log-frequencies are stored times this, which divides their learning rate."""

    grapem_contextual: bool = False
    """Each token advances the phase by a learned step instead of by one."""


@dataclass
class BiasFlags:
    """Biases on attention scores, beside any --position-embedding-type."""

    position_bias: list[BiasName] = field(
        default_factory=list, metadata={"argparse_meta": {"nargs": "+", "type": str, "choices": BIASES}}
    )
    """Biases of all layers, added up."""

    grape_a: bool = False
    """The bias grape-a on layers without a sliding window."""

    grape_a_gate: GrapeGate = "none"
    """grape-a: multiply slopes by gates of queries, keys, or the sum of both."""

    grape_a_learnable: bool = False
    """grape-a: learn the slopes, from those of ALiBi."""

    bias_slope_scale: float = 1.0
    """Factor on the slopes of alibi, grape-a and grape-ap: gists at a distance of more than a few hundred tokens over
    it are not seen by the steepest heads."""

    bias_fold: bool = False
    """On layers without rotary, linear biases (alibi, grape-a) travel in the last 4 channels of queries and keys, which
    carry no content then, so that library backends have them at their full speed. The plugin's kernel, and dense
    attention in half precision, add them to scores all the same. Part of the model; heads need 16 channels or more."""

    t5_num_buckets: int = 32
    """t5: buckets of distances."""

    t5_max_distance: int = 128
    """t5: distance in tokens from which all share a bucket."""

    fire_hidden_size: int = 32
    """fire: width of its network."""

    fire_num_layers: Literal[1, 2] = 1
    """fire: hidden layers of its network."""

    fire_length: int = 512
    """fire: distance in tokens below which places are not normalised by the query's own, at the start."""

    fire_shared: bool = False
    """fire: one network for all layers."""

    cope_positions: int = 64
    """cope: greatest contextual position."""

    cope_count: Literal["entry", "width"] | None = None
    """cope: a gist counts as one entry or as its width. To be chosen where contexts collapse: papers have no gists."""

    slow_band_periods: list[float] = field(default_factory=lambda: list(_PERIODS), metadata=_NUMBERS)
    """slow-bands: periods in tokens."""


@dataclass
class AdditiveFlags:
    """Embeddings of places that are added to rows: --position-embedding-type sinusoidal or learned_absolute."""

    sinusoidal_scale: float = 1.0
    """Factor on the sinusoids."""

    learned_absolute_interpolate: bool = False
    """Read the table at the centre of a gist instead of averaging it over the gist's tokens."""


@dataclass
class RetrofitFlags:
    """Adapters on a frozen base, which --pretrained-checkpoint names; nothing else trains."""

    retrofit: list[RetrofitName] = field(
        default_factory=list,
        metadata={
            "argparse_meta": {
                "nargs": "+",
                "type": str,
                "choices": ("stretch", "damping", "alibi-lora", "slow-bands"),
            }
        },
    )
    """What is added: the stretch that --rope-stretch asks for, damping by level, query-conditioned slopes through a
    LoRA on the first block, ultra-slow bands."""

    retrofit_lora_rank: int = 8
    """Rank of alibi-lora."""

    retrofit_lora_length: int = 4096
    """Tokens in which alibi-lora counts distances."""

    retrofit_adapters: str | None = None
    """Start from adapters that python -m megacontext_megatron.adapters has exported."""


ENCODING_FLAGS = {
    RotaryFlags: "rotary frequencies",
    GrapeFlags: "grape-m",
    BiasFlags: "score biases",
    AdditiveFlags: "additive encodings",
    RetrofitFlags: "retrofit",
}
"""The groups of this file, and their titles in --help."""
