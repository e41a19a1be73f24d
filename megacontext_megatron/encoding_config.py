"""Settings of encodings as frozen dataclasses: frequency rules, GRAPE-M, biases, additive embeddings, adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

BiasName = Literal["alibi", "t5", "fire", "cope", "grape-a", "grape-ap", "fox", "slow-bands"]
GrapeGate = Literal["none", "q", "k", "qk"]
LongRopeSet = Literal["by-length", "long", "short"]
AdditiveName = Literal["sinusoidal", "learned_absolute"]
RetrofitName = Literal["stretch", "damping", "alibi-lora", "slow-bands"]

LINEAR_BIASES: frozenset[BiasName] = frozenset({"alibi", "grape-a"})
"""Biases that can be linear in the distance; grape-a is, unless keys gate it."""

SPARE_CHANNELS = 4
"""Last channels of each head's queries and keys that carry no content where a layer's linear biases are folded."""

BIASES: tuple[BiasName, ...] = ("alibi", "t5", "fire", "cope", "grape-a", "grape-ap", "fox", "slow-bands")
ROTARY_ENCODINGS = (
    *("rope", "linear", "ntk", "dynamic_ntk", "yarn", "longrope", "llama3", "resonance", "resonance_yarn"),
    *("multiscale", "clex", "mrope", "axial"),
)
"""Names of `--position-embedding-type` that rotate by the centre of a row, undamped."""

ADDITIVE_ENCODINGS: tuple[AdditiveName, ...] = ("sinusoidal", "learned_absolute")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRule:
    """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, 2306.15595, section 2.3)."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NtkRule:
    """NTK-aware scaling: the base times factor^(d / (d - 2)); by length where `original_length` is given."""

    factor: float
    original_length: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnRule:
    """YaRN (Peng et al. 2023, 2309.00071): a ramp over rotary pairs, and a factor on the logits.

    The factor on cos and sin is `attention_factor`, or that of `mscale` over that of `mscale_all_dim` where both are
    given and not 0, or 0.1 ln factor + 1.  Under `deepseek` cos and sin have none and the softmax scale of the whole
    head takes (0.1 mscale_all_dim ln factor + 1)^2, without an mscale_all_dim 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    deepseek: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRopeRule:
    """LongRoPE (Ding et al. 2024, 2402.13753, equation 3): a divisor for each rotary pair, from one of two sets.

    Rows whose centre lies before `start_tokens` keep the plain frequencies.  `factor` is max over original length.
    """

    factor: float
    original_length: int
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    select: LongRopeSet = "by-length"
    start_tokens: int = 0
    attention_factor: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rule:
    """The scaling of Llama 3.1: long wavelengths divided by `factor`, short ones kept, a blend between."""

    factor: float
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SectionRule:
    """Rotary pairs shared out over `axes`, by `sections` (mRoPE) or, without them, with frequencies that restart."""

    axes: int
    sections: tuple[int, ...] = ()
    interleaved_sections: bool = False


FrequencyRule = LinearRule | NtkRule | YarnRule | LongRopeRule | Llama3Rule | SectionRule


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiscaleConfig:
    """A base for each query group, log-spaced from `low` to `high`; one group has their geometric mean."""

    low: float = 1e3
    high: float = 1e5


@dataclass(frozen=True, kw_only=True, slots=True)
class ClexConfig:
    """CLEX (Chen et al. 2023, 2310.16450): log-frequencies moved by a learned ODE from 1 to t = ceil(length / L).

    `step` is that of the Runge-Kutta method; log-frequencies of the authors' 0.01 differ from those of 0.1 by 1e-8.
    """

    original_length: int
    hidden_factor: float = 1.0
    activation: Literal["tanh", "silu"] = "tanh"
    max_t: int = 16
    step: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class GrapeMConfig:
    """GRAPE-M (2512.07805, sections 2 and 3): frequencies of a layer as parameters `log_freq` / `log_freq_scale`.

    Shared by the query groups or one set for each; fixed where not `learnable`.  `contextual`: each token advances the
    phase by a learned step instead of by one.
    """

    learnable: bool = True
    per_head: bool = False
    log_freq_scale: float = 16.0
    contextual: bool = False


LayerFrequencies = MultiscaleConfig | ClexConfig | GrapeMConfig
"""Frequencies that a layer finds itself: by query group, learned, or both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasConfig:
    """A score bias and the layers, counted from 1, that have it; the fields of other biases are not read.

    `learnable_slopes` and `gate` are of grape-a, `slope_scale` multiplies the slopes of alibi, grape-a and grape-ap.
    `fire_shared` gives all layers of a pipeline stage one FIRE.  `periods` (tokens) are those of slow-bands.
    """

    name: BiasName
    layers: tuple[int, ...]
    learnable_slopes: bool = False
    gate: GrapeGate = "none"
    slope_scale: float = 1.0
    t5_buckets: int = 32
    t5_max_distance: int = 128
    fire_hidden: int = 32
    fire_layers: int = 1
    fire_length: int = 512
    fire_shared: bool = False
    cope_positions: int = 64
    cope_count: Literal["entry", "width"] = "entry"
    periods: tuple[float, ...] = (1e6, 1e7, 1e8, 1e9)

    @property
    def linear(self) -> bool:
        """Whether it is -m (mu_q - mu_k) with an m that does not depend on the key."""
        return self.name in LINEAR_BIASES and (self.name != "grape-a" or self.gate in ("none", "q"))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdditiveConfig:
    """An embedding of places that is added to the rows: sinusoidal, or a learned table of `length` tokens.

    `scale` multiplies sinusoids; `interpolate` reads a learned table at the centre of a span instead of averaging it.
    """

    name: AdditiveName
    length: int
    scale: float = 1.0
    interpolate: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrofitConfig:
    """What is added to a frozen base (`--retrofit`): nothing but adapters, slopes, bands and sigma's scales trains.

    `lora_rank` is that of the first block's query-conditioned slopes, whose distances are counted in `lora_length`.
    """

    parts: tuple[RetrofitName, ...] = field(default=())
    lora_rank: int = 8
    lora_length: int = 4096
