"""The plugin's flags: one dataclass a group, whose fields are flags and whose docstrings are their help."""

# Annotations here are read at run time by Megatron's ArgumentGroupFactory, so they are not deferred to strings.
from dataclasses import dataclass, field
from typing import Literal

from megacontext_megatron.attention_config import GlobalBackend, WindowBackend
from megacontext_megatron.config import (
    EodPolicy,
    GistKind,
    GistPooling,
    Guards,
    LearnableSigma,
    Phase,
    Plan,
    Readout,
    SigmaRule,
    Teacher,
)


@dataclass
class PositionFlags:
    """Positions that belong to rows: --position-embedding-type also takes gaussian_rope."""

    mc_encoding: str | None = None
    """Set by --position-embedding-type when it names one of the plugin's encodings; not meant to be typed."""

    gaussian_rope_sigma: SigmaRule = "uniform"
    """Spread of a row that covers w tokens: uniform is sqrt((w^2 - 1) / 12), width w, half-width w / 2, none 0. A
    token has spread 0 under every rule."""

    gaussian_rope_learnable_sigma: LearnableSigma = "none"
    """Learn a factor on the spread in every layer: one per level, one for the layer, or one per query group and level
    (head)."""

    gaussian_rope_sides: Literal["qk", "k"] = "qk"
    """Damp queries and keys (the exact expectation), or keys alone."""

    gaussian_rope_renorm: Literal["none", "rms"] = "none"
    """Give damped queries and keys their norm back (rms), or not."""

    gaussian_rope_phase: Literal["exact", "megatron"] = "exact"
    """exact: integer phases, right for centres up to 2^51 tokens. megatron: Megatron's fp32 angle, bit-equal to its
    rope."""

    gaussian_rope_log_width_bias: bool = False
    """Let a row of w tokens count as w^beta tokens in the softmax; beta is learned in every layer from 0. Dense
    attention only."""


@dataclass
class ContextFlags:
    """Working contexts: --seq-length rows, each a token or a gist, over the newest --mc-source-length tokens."""

    megacontext: bool = False
    """Train on working contexts that mix tokens and gists. Needs --position-embedding-type gaussian_rope."""

    mc_source_length: int | None = None
    """C: tokens of history in a raw sample; a multiple of --mc-block-size, at least --seq-length."""

    mc_variants: int = 1
    """V: working contexts made of each raw sample; with 2 or more the first is the recency baseline. Micro-batch
    sizes must be multiples of V."""

    mc_block_size: int = 32
    """K: rows of one level that a gist of the next level stands for."""

    mc_max_level: Literal[1, 2] = 2
    """Highest level of detail: 1 for gists of K tokens, 2 for gists of K^2 as well."""

    mc_recent_tokens: int = 128
    """Newest tokens that never collapse, rounded up to a block edge."""

    mc_horizon: int = 64
    """H: the last rows, tokens in every variant, on which variants are compared."""

    mc_plan: Plan = "random"
    """Which blocks collapse: random ones, the oldest (heuristic), one or the other by context (mix), or none
    (recency: the newest --seq-length tokens)."""

    mc_level2_prob: float = 0.1
    """Probability that a random plan collapses an aligned run of K^2 tokens into one gist."""

    mc_eod_policy: EodPolicy = "ignore"
    """no-cross: never collapse a block with an end of document inside."""


@dataclass
class GistFlags:
    """What a gist is: the mean of its block, or GistNet, which learns 32 rows -> 1 and is shared by all levels."""

    mc_gist_kind: GistKind = "mean"
    """mean: the average of a block, at the size of its embeddings. gistnet: that plus what a small non-causal
    transformer over the block adds, from 0."""

    mc_gist_layers: int = 2
    """Transformer layers of GistNet."""

    mc_gist_hidden_size: int | None = None
    """Width of GistNet; the smaller of --hidden-size and 512 if not given."""

    mc_gist_pooling: GistPooling = "mean"
    """How GistNet makes one vector of a block: the mean of its rows, or attention of a learned query (slot)."""

    mc_gist_span_head: bool = False
    """Let GistNet move its gist's centre, by up to a quarter of the width, and scale its sigma, up to four times."""


@dataclass
class ObjectiveFlags:
    """What is trained beside the next-token loss of all rows; a weight of 0 leaves a term out."""

    mc_loss_gist_rows: float = 1.0
    """Weight of the next-token loss of gist rows; tokens have 1."""

    mc_loss_after_token: list[int] | None = field(default=None, metadata={"argparse_meta": {"nargs": "+", "type": int}})
    """Count only rows whose last covered token has one of these ids, for question-answer data."""

    mc_loss_advantage: float = 0.0
    """Weight of relu(loss of the last --mc-horizon rows minus that of the recency variant, which is held fixed)."""

    mc_loss_kl: float = 0.0
    """Weight of the KL divergence of the model from its teacher on the last --mc-horizon rows of mixed contexts; needs
    --mc-teacher."""

    mc_loss_contrast: float = 0.0
    """Weight of a hinge that keeps gists of different blocks from pointing the same way."""

    mc_loss_pooling: float = 0.0
    """Weight of the regression of level-1 gists against the pooled states of --mc-teacher cache."""

    mc_phase: Phase = "substitution"
    """pooling: GistNet learns from the pooling regression alone, the model from its rows, embeddings from both.
    substitution: all learn from every term. pooling-then-substitution: one after the other."""

    mc_pooling_samples: int = 0
    """Contexts after which --mc-phase pooling-then-substitution goes over."""

    mc_teacher: Teacher = "none"
    """What sees the full context: the model itself, by a second forward (one pipeline stage), or a cache of another's
    logits and states, made by python -m megacontext_megatron.teacher."""

    mc_teacher_path: str | None = None
    """Folder of --mc-teacher cache."""

    mc_curriculum: list[str] | None = field(default=None, metadata={"argparse_meta": {"nargs": "+", "type": str}})
    """Stages SAMPLES:TOKENS[:LEVEL2_PROB]: from so many consumed contexts on, training contexts cover the newest TOKENS
    tokens. Evaluation always covers all."""


@dataclass
class PredictionFlags:
    """MegaPrediction: rows at block edges predict the gist of what comes next from their final hidden state."""

    mc_predict_level1: float = 0.0
    """Weight of predicting the gist of the next --mc-block-size tokens."""

    mc_predict_level2: float = 0.0
    """Weight of predicting the gist of the next --mc-block-size squared tokens."""

    mc_predict_readout: Readout = "hidden"
    """hidden: the final hidden state is the prediction. soft-embed: the embedding expected under the row's next-token
    distribution. infonce: the hidden state must pick its gist out of all gists of the micro-batch."""


@dataclass
class WatchFlags:
    """Probes, which change an input and measure the loss, and guards, which stop a run that trains nothing."""

    mc_probe_interval: int = 0
    """Iterations between probes of the validation data; 0 for none."""

    mc_probe_samples: int = 8
    """Held-out raw samples that each probe reads."""

    mc_guards: Guards = "fatal"
    """What happens where a trainable part has no gradient, or one that is not finite, or all gists are the same."""

    mc_guard_after: int = 100
    """Iterations before guards judge."""


@dataclass
class RunningFlags:
    """How the plugin runs."""

    cpu: bool = False
    """Run without a GPU: gloo, Megatron's local layers, and the flags both need."""

    mc_backend: Literal["auto", "triton", "torch"] = "auto"
    """What rotates queries and keys by their spans: the fused kernels (triton), plain PyTorch (torch), or the kernels
    on a GPU where they cover the options (auto). What rotates also says what pools blocks for GistNet's slots."""

    mc_window_backend: WindowBackend = "auto"
    """What computes attention on layers with a sliding window: the plugin's kernel (triton), FlashAttention-4,
    FlexAttention, the layers' own (megatron: Transformer Engine, or dense), or the kernel where it can (auto)."""

    mc_global_backend: GlobalBackend = "auto"
    """The same on layers that see all rows, and PyTorch's cuDNN attention. auto: Transformer Engine's own, or cuDNN on
    local layers; the plugin's kernel for linear biases that are not folded; dense where none of these can."""

    mc_reach_skip: bool = False
    """On layers with linear biases on the plugin's kernel, do not read keys so far away that their weight cannot be
    seen in the model's dtype; needs --qk-layernorm with --normalization RMSNorm, which bounds scores."""


RUN_FLAGS = {
    PositionFlags: "gaussian rope",
    ContextFlags: "megacontext",
    GistFlags: "gists",
    ObjectiveFlags: "objective",
    PredictionFlags: "gist prediction",
    WatchFlags: "probes and guards",
    RunningFlags: "running",
}
"""The groups every command knows, and their titles in --help."""


EVALUATION_INPUTS = ("recency", "mixed", "full", "shuffled")


@dataclass
class EvaluationFlags:
    """What evaluate does with a checkpoint."""

    mc_eval_samples: int = 64
    """Held-out raw samples of --mc-source-length tokens to evaluate on."""

    mc_eval_bigram: bool = False
    """Also evaluate an add-one bigram model of the training data on the same targets (byte-sized vocabularies)."""

    mc_eval_inputs: list[str] = field(
        default_factory=lambda: list(EVALUATION_INPUTS),
        metadata={"argparse_meta": {"nargs": "+", "type": str, "choices": EVALUATION_INPUTS}},
    )
    """Inputs to evaluate: the newest rows as tokens, mixed contexts, all tokens as rows, or mixed contexts whose gists
    are exchanged. full takes a forward of --mc-source-length rows."""

    mc_eval_probes: bool = False
    """Also scale every sigma, and put the rows before the protected tail of mixed contexts into another order."""


@dataclass
class TeacherFlags:
    """What teacher writes."""

    mc_teacher_samples: int = 0
    """Raw training samples to cache, the first in the order of the run that will learn from them: its training contexts
    divided by --mc-variants."""
