"""Settings of a run as frozen dataclasses; every cross-field rule that needs no Megatron lives here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from megacontext_megatron.attention_config import AttentionConfig
from megacontext_megatron.encoding_config import (
    ADDITIVE_ENCODINGS,
    ROTARY_ENCODINGS,
    AdditiveConfig,
    BiasConfig,
    FrequencyRule,
    LayerFrequencies,
    RetrofitConfig,
)

STOCK_ENCODINGS = ("learned_absolute", "rope", "none")
"""Names of `--position-embedding-type` that run Megatron's own code, unless rows carry spans or scores a bias."""

ENCODINGS = (
    "gaussian_rope",
    "grapem",
    *(name for name in (*ROTARY_ENCODINGS, *ADDITIVE_ENCODINGS) if name not in STOCK_ENCODINGS),
)
"""Names that `--position-embedding-type` takes in addition to Megatron's own."""

NLL_LAST = "mc/nll_last/{H}/{variant}"
"""Name of the loss of the last H rows of a variant, in validation and in telemetry."""

SigmaRule = Literal["uniform", "width", "half-width", "none"]
LearnableSigma = Literal["none", "level", "layer", "head"]
Plan = Literal["recency", "random", "heuristic", "mix"]
EodPolicy = Literal["ignore", "no-cross"]
RotaryBackend = Literal["triton", "torch"]
GistKind = Literal["mean", "gistnet"]
GistPooling = Literal["mean", "slot"]
Phase = Literal["substitution", "pooling", "pooling-then-substitution"]
Teacher = Literal["none", "forward", "cache"]
Readout = Literal["hidden", "soft-embed", "infonce"]
Guards = Literal["fatal", "warn", "off"]

SIGMA_RULES: tuple[SigmaRule, ...] = ("uniform", "width", "half-width", "none")
PLANS: tuple[Plan, ...] = ("recency", "random", "heuristic", "mix")


class ConfigError(ValueError):
    """A request that cannot be honoured; the message names the flag or file and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryConfig:
    """The rotary frequencies a run asks for, in Megatron's terms.

    `head_dim` is `--kv-channels`; the rotated part is `head_dim * percent` channels.  `interpolation` is
    `--rotary-seq-len-interpolation-factor`; `llama3_factor` is `--rope-scaling-factor` where `--use-rope-scaling`
    is given.  `rule` is another frequency rule, `resonance` rounds its wavelengths to whole tokens, `by_layer` is what
    layers find themselves.  `length` is the number of tokens that the run's history holds, which some rules depend on.
    """

    head_dim: int
    base: int = 10000
    percent: float = 1.0
    interleaved: bool = False
    interpolation: int | None = None
    llama3_factor: float | None = None
    rule: FrequencyRule | None = None
    resonance: bool = False
    by_layer: LayerFrequencies | None = None
    length: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianRopeConfig:
    """How a row's span becomes rotation and damping (one field per `--gaussian-rope-*` flag)."""

    sigma: SigmaRule = "uniform"
    learnable_sigma: LearnableSigma = "none"
    sides: Literal["qk", "k"] = "qk"
    renorm: Literal["none", "rms"] = "none"
    phase: Literal["exact", "megatron"] = "exact"
    log_width_bias: bool = False

    @property
    def fusable(self) -> bool:
        """Whether the fused kernel computes it."""
        return self.phase == "exact" and self.renorm == "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextConfig:
    """The shape of a working context: `window` rows over the newest `source_length` tokens.

    Lengths are in tokens, except `window`, which counts rows.  Raises ConfigError, naming the flags, when no plan
    can give exactly `window` rows.
    """

    window: int
    source_length: int
    variants: int = 1
    block_size: int = 32
    max_level: int = 2
    recent_tokens: int = 128
    horizon: int = 64
    plan: Plan = "random"
    level2_prob: float = 0.1
    eod_policy: EodPolicy = "ignore"
    history: int | None = None
    """Newest tokens that contexts cover, where a stage of a curriculum shortens the source; None for all of it."""

    def __post_init__(self) -> None:
        """Refuse shapes that no plan can satisfy."""
        self._check_lengths()
        self._check_plan()
        self._check_reachable()

    @classmethod
    def tokens_only(cls, window: int) -> ContextConfig:
        """Return the context of a run without `--megacontext`: every row is a token, the window one block."""
        last = min(64, window)
        return cls(
            window=window,
            source_length=window,
            block_size=window,
            max_level=1,
            recent_tokens=last,
            horizon=last,
            plan="recency",
        )

    def _check_lengths(self) -> None:
        k, c, w = self.block_size, self.source_length, self.window
        if k < 2:
            raise ConfigError(f"--mc-block-size {k} must be at least 2.")
        if c % k:
            raise ConfigError(
                f"--mc-source-length {c} must be a multiple of --mc-block-size {k}; the nearest are "
                f"{c // k * k} and {(c // k + 1) * k}."
            )
        if c < w:
            raise ConfigError(
                f"--mc-source-length {c} is shorter than --seq-length {w}: raise --mc-source-length, which counts "
                "the tokens that the window of rows stands for."
            )
        if not 1 <= self.horizon <= self.recent_tokens:
            raise ConfigError(
                f"--mc-horizon {self.horizon} must be between 1 and --mc-recent-tokens {self.recent_tokens}: the "
                "last rows are compared between variants and must be tokens in all of them."
            )
        if self.protected_tokens > min(w, c):
            raise ConfigError(
                f"--mc-recent-tokens {self.recent_tokens} (rounded up to {self.protected_tokens}) does not fit in "
                f"--seq-length {w} rows: lower --mc-recent-tokens or raise --seq-length."
            )

    def _check_plan(self) -> None:
        if self.variants < 1:
            raise ConfigError(f"--mc-variants {self.variants} must be at least 1.")
        if not 0.0 <= self.level2_prob <= 1.0:
            raise ConfigError(f"--mc-level2-prob {self.level2_prob} must lie between 0 and 1.")
        if self.max_level not in (1, 2):
            raise ConfigError(f"--mc-max-level {self.max_level} must be 1 or 2.")
        if self.variants > 2 and self.plan == "heuristic":
            raise ConfigError(
                f"--mc-plan heuristic with --mc-variants {self.variants} would make all variants but the first the "
                "same: use --mc-variants 2, or --mc-plan mix or random."
            )
        if self.variants > 1 and self.plan == "recency":
            raise ConfigError(
                f"--mc-plan recency with --mc-variants {self.variants} would make every variant the same: variant 0 "
                "is the recency baseline already; use --mc-variants 1 or another --mc-plan."
            )

    def _check_reachable(self) -> None:
        if self.plan == "recency":
            return
        c, w, k = self.source_length, self.window, self.block_size
        if self.merges == 0:
            raise ConfigError(
                f"--mc-source-length {c} with --seq-length {w} leaves nothing to collapse: raise --mc-source-length "
                f"by at least {k - 1} tokens, or ask for --mc-plan recency."
            )
        blocks, supers = self.eligible()
        if blocks == 0:
            raise ConfigError(
                f"--mc-recent-tokens {self.recent_tokens} protects every block of --mc-source-length {c}, so nothing "
                "may collapse: lower --mc-recent-tokens or raise --mc-source-length."
            )
        low, high = self.superblock_bounds(self.merges, blocks, supers)
        if low > high:
            fewest = self.fewest_rows()
            raise ConfigError(
                f"--seq-length {w} rows cannot hold --mc-source-length {c} tokens with --mc-recent-tokens "
                f"{self.recent_tokens} and --mc-max-level {self.max_level}: the fewest rows reachable are about "
                f"{fewest}; raise --seq-length, lower --mc-source-length or --mc-recent-tokens, or allow a higher "
                "--mc-max-level."
            )

    @property
    def protected_tokens(self) -> int:
        """Newest tokens that never collapse: `recent_tokens` rounded up to a block edge."""
        return math.ceil(self.recent_tokens / self.block_size) * self.block_size

    @property
    def dropped_tokens(self) -> int:
        """Oldest tokens left out: older than `history`, and so that whole blocks can reach exactly `window` rows."""
        history = self.source_length if self.history is None else self.history
        return self.source_length - history + (history - self.window) % (self.block_size - 1)

    @property
    def merges(self) -> int:
        """Rows to save, counted in level-1 collapses (each saves `block_size - 1` rows)."""
        return (self.source_length - self.dropped_tokens - self.window) // (self.block_size - 1)

    def nodes(self, level: int) -> slice:
        """Return which nodes of a level from 1 on may stand in a row, counted from the oldest of the source."""
        width = self.block_size**level
        first = -(-self.dropped_tokens // width)
        return slice(first, max(first, (self.source_length - self.protected_tokens) // width))

    def eligible(self) -> tuple[int, int]:
        """Return how many blocks and how many level-2 blocks may collapse when documents are ignored."""
        blocks, supers = (self.nodes(level).stop - self.nodes(level).start for level in (1, 2))
        return blocks, supers if self.max_level >= 2 else 0

    def superblock_bounds(self, merges: int, blocks: int, supers: int) -> tuple[int, int]:
        """Return the fewest and the most level-2 collapses that reach `merges`; infeasible if the first is larger.

        A level-2 collapse saves as many rows as `block_size + 1` level-1 collapses and uses up `block_size` blocks.
        """
        return max(0, merges - blocks), min(supers, merges // (self.block_size + 1))

    def fewest_rows(self) -> int:
        """Return the number of rows left when everything that may collapse has collapsed."""
        blocks, supers = self.eligible()
        k = self.block_size
        saved = (k * k - 1) * supers + (k - 1) * (blocks - k * supers)
        return self.source_length - self.dropped_tokens - saved


@dataclass(frozen=True, kw_only=True, slots=True)
class GistConfig:
    """What makes gists: the mean of a block, or GistNet (one field per `--mc-gist-*` flag).

    `hidden_size` is GistNet's own width, `hidden` that of the model.  Raises ConfigError for a width that the heads
    cannot share out.
    """

    hidden: int
    kind: GistKind = "mean"
    layers: int = 2
    hidden_size: int = 512
    pooling: GistPooling = "mean"
    span_head: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        if self.kind == "gistnet" and self.layers < 1:
            raise ConfigError(f"--mc-gist-layers {self.layers} must be at least 1.")
        if self.kind == "gistnet" and (self.hidden_size < 1 or self.hidden_size % self.heads):
            raise ConfigError(
                f"--mc-gist-hidden-size {self.hidden_size} must be a multiple of {self.heads}, its number of heads."
            )

    @property
    def heads(self) -> int:
        """Attention heads: of 64 channels, and at least 4."""
        return max(4, self.hidden_size // 64)

    @property
    def learned(self) -> bool:
        """Whether gists have parameters."""
        return self.kind == "gistnet"


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is trained beside the next-token loss (`--mc-loss-*`, `--mc-phase`, `--mc-teacher`).

    Where `after_token` names ids, only rows whose last covered token is one of them count.  Phases are counted in
    contexts (`pooling_samples`).
    """

    advantage: float = 0.0
    kl: float = 0.0
    contrast: float = 0.0
    pooling: float = 0.0
    gist_rows: float = 1.0
    after_token: tuple[int, ...] = ()
    phase: Phase = "substitution"
    pooling_samples: int = 0
    teacher: Teacher = "none"
    teacher_path: str | None = None

    def pools_only(self, consumed_samples: int) -> bool:
        """Return whether gists learn from the pooling regression alone once so many contexts have been consumed."""
        if self.phase == "pooling-then-substitution":
            return consumed_samples < self.pooling_samples
        return self.phase == "pooling"


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionConfig:
    """Prediction of coming gists (`--mc-predict-*`): weights of the next level-1 and level-2 gist, and the readout."""

    level1: float = 0.0
    level2: float = 0.0
    readout: Readout = "hidden"

    @property
    def weights(self) -> tuple[float, float]:
        """The weights of level 1 and 2."""
        return self.level1, self.level2

    @property
    def active(self) -> bool:
        """Whether anything is predicted."""
        return any(self.weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """What is watched while training: probes every so many iterations (0: never), and guards."""

    probe_interval: int = 0
    probe_samples: int = 8
    guards: Guards = "fatal"
    guard_after: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumStage:
    """From `samples` consumed contexts on, contexts cover the newest `history` tokens, level 2 at `level2_prob`."""

    samples: int
    history: int
    level2_prob: float

    def of(self, context: ContextConfig) -> ContextConfig:
        """Return the context of this stage; raises ConfigError where no plan can satisfy it."""
        return replace(context, history=self.history, level2_prob=self.level2_prob)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything the plugin decides for a run.

    `encoding` is the name given to `--position-embedding-type`; `gaussian` is None where a stock encoding runs
    Megatron's own code.
    """

    encoding: str
    rotary: RotaryConfig
    context: ContextConfig
    gaussian: GaussianRopeConfig | None = None
    biases: tuple[BiasConfig, ...] = ()
    additive: AdditiveConfig | None = None
    retrofit: RetrofitConfig | None = None
    gist: GistConfig = field(default_factory=lambda: GistConfig(hidden=1))
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    curriculum: tuple[CurriculumStage, ...] = ()
    """Stages in order of their samples; before the first, and without any, contexts cover the whole source."""

    megacontext: bool = False
    seed: int = 1234
    backend: RotaryBackend = "torch"
    """What rotates queries and keys by their spans: the fused kernel or plain PyTorch."""

    no_rope_layers: tuple[int, ...] = field(default=())
    """Layer numbers, counted from 1, on which rotary is off."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    bias_fold: bool = False
    """Whether linear biases travel in the last channels of queries and keys, which carry no content then."""

    def biases_of(self, layer: int) -> tuple[BiasConfig, ...]:
        """Return the score biases of a layer, counted from 1."""
        return tuple(bias for bias in self.biases if layer in bias.layers)

    def folded(self, layer: int) -> bool:
        """Return whether the last channels of a layer's queries and keys, counted from 1, are spare for its biases."""
        return self.bias_fold and any(bias.linear for bias in self.biases_of(layer))

    def slopes_by_query(self, layer: int) -> bool:
        """Return whether a layer, counted from 1, carries the slopes that a retrofit draws from queries."""
        return layer == 1 and self.retrofit is not None and "alibi-lora" in self.retrofit.parts

    def biased(self, layer: int) -> bool:
        """Return whether scores of a layer, counted from 1, have a bias."""
        return bool(self.biases_of(layer)) or self.slopes_by_query(layer)
