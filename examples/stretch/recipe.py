"""What is trained and measured: the sizes of a tier, the cells of the table, and the flags of every command."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.command_line import Flags, model_flags, token_flags
from examples.real_text.recipe import END_OF_DOCUMENT, VOCABULARY
from examples.stretch.sequences import SYMBOLS
from megacontext_megatron.config import ConfigError

NONE = "none"
RULES = ("linear", "ntk", "yarn")
METHODS = (NONE, *RULES)

ZERO_SHOT = "zero-shot"
LORA, SLOW = "alibi-lora", "slow-bands"

HELD_OUT, LONG_COPY, ORDERING = "held-out", "long-copy", "ordering"
TASKS = (LONG_COPY, ORDERING)

LAST_TOKENS = 256
SLOW_PERIODS = (10 / 3, 100 / 3, 1000 / 3, 10000 / 3)
"""Periods of slow bands over the length of the contexts: 1e6 to 1e9 tokens over 300,000."""

_NEVER = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A base, its training at `length` tokens, and that of the adapters at `adapted` times that; steps of equal tokens.

    `factors` are the contexts to measure, over `length`; `evaluated` samples are of the longest.  `micro_tokens` bounds
    a micro-batch.  `text` says that the data are bytes of files instead of generated sequences.  `task_methods` are the
    methods measured on tasks.  Raises ConfigError for sizes that do not fit.
    """

    length: int = 64
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    init_std: float = 0.1
    learning_rate: float = 3e-3
    steps: int = 300
    warmup: int = 50
    batch: int = 32
    factors: tuple[int, ...] = (2, 4, 8)
    evaluated: int = 256
    micro_tokens: int = 2048
    adapted: int = 4
    adapter_steps: int = 50
    adapter_rate: float = 1e-2
    lora_rank: int = 8
    task_methods: tuple[str, ...] = (NONE, "yarn")
    text: bool = False
    cpu: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be trained or measured."""
        if self.warmup >= self.steps:
            raise ConfigError(f"warmup={self.warmup} must be less than steps={self.steps}.")
        if self.adapted not in self.factors:
            raise ConfigError(f"adapted={self.adapted} must be one of factors={self.factors}.")
        if self.batch % self.adapted:
            raise ConfigError(
                f"batch={self.batch} must be a multiple of adapted={self.adapted}: steps are of equal tokens."
            )
        if self.length % SYMBOLS or self.micro_tokens % self.longest:
            raise ConfigError(
                f"length={self.length} must be a multiple of {SYMBOLS}, and micro_tokens={self.micro_tokens} one of "
                f"the longest context, {self.longest}."
            )
        if any(self.evaluated % self.micro(factor) for factor in (1, *self.factors)):
            raise ConfigError(f"evaluated={self.evaluated} must be a multiple of all micro-batches.")

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return self.length * max(self.factors)

    @property
    def vocabulary(self) -> int:
        """Number of ids: bytes and Megatron's end of document as examples.real_text has them, or symbols and an end."""
        return VOCABULARY if self.text else SYMBOLS + 1

    @property
    def end_of_document(self) -> int:
        """Id of the end of a document; no generated sequence holds it."""
        return END_OF_DOCUMENT if self.text else SYMBOLS

    def last(self, data: str) -> int:
        """Return how many last tokens are compared: 256, a quarter of short bases' contexts, or one turn of a task."""
        if data != HELD_OUT:
            return SYMBOLS
        return LAST_TOKENS if self.length >= LAST_TOKENS else self.length // 4

    def source(self, data: str) -> int:
        """Return the tokens of a sample: the newest of them are the context, so all contexts have the same labels."""
        return self.longest if data == HELD_OUT else self.length * self.adapted

    def micro(self, factor: int) -> int:
        """Return the samples of a micro-batch of contexts of `factor` times the base's length."""
        return min(self.micro_tokens // (self.length * factor), self.batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One measurement of a base: `method` stretches it by `factor`, and contexts are as many times its length.

    `adapters` trained before, or ZERO_SHOT.
    """

    method: str
    factor: int
    adapters: str = ZERO_SHOT
    data: str = HELD_OUT

    @property
    def model(self) -> str:
        """Name of what is trained: the base, or its adapters."""
        return "base" if self.adapters == ZERO_SHOT else f"{self.adapters}-{self.method}"

    @property
    def name(self) -> str:
        """Name of the folder of its result."""
        return f"{self.adapters}-{self.method}-{self.factor}x-{self.data}"


def cells(recipe: Recipe) -> list[Cell]:
    """Return everything that is measured of one base; its adapters once each, in the order in which they are needed."""
    at = recipe.adapted
    adapted = [Cell(method=method, factor=at, adapters=LORA) for method in METHODS]
    adapted += [Cell(method="yarn", factor=at, adapters=SLOW)]
    tasks = [
        Cell(method=method, factor=at, adapters=adapters, data=data)
        for method in recipe.task_methods
        for adapters in (ZERO_SHOT, LORA)
        for data in TASKS
    ]
    zero_shot = [Cell(method=NONE, factor=1)]
    zero_shot += [Cell(method=method, factor=factor) for factor in recipe.factors for method in METHODS]
    return [*zero_shot, *adapted, *tasks]


def base_flags(recipe: Recipe) -> Flags:
    """Return what a base is, by flag: Megatron's own rope, nothing of the plugin."""
    device: Flags = {"cpu": True} if recipe.cpu else {"bf16": True}
    return {
        **device,
        # Biases on scores need it, and a checkpoint of the base must fit.
        "transformer_impl": "local",
        **model_flags(recipe),
        "position_embedding_type": "rope",
        **token_flags(recipe.vocabulary, recipe.end_of_document),
    }


def training_flags(recipe: Recipe, seed: int, factor: int = 1) -> Flags:
    """Return how a base is trained, or, at a `factor` of its length, its adapters: without data and places of files."""
    based = factor == 1
    steps = recipe.steps if based else recipe.adapter_steps
    rate = recipe.learning_rate if based else recipe.adapter_rate
    warmup = recipe.warmup if based else min(5, steps - 1)
    return {
        **_lengths(recipe.length * factor),
        "micro_batch_size": min(recipe.micro(factor), recipe.batch // factor),
        "global_batch_size": recipe.batch // factor,
        "train_iters": steps,
        "lr": rate,
        "min_lr": rate / 10,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": warmup,
        "weight_decay": 0.1 if based else 0.0,
        "adam_beta2": 0.98,
        "clip_grad": 1.0,
        "seed": seed,
        "eval_iters": 0,
        "eval_interval": _NEVER,
        "save_interval": steps,
        "no_save_optim": True,
        "log_interval": max(1, steps // 30),
        "num_workers": 0 if recipe.cpu else 1,
    }


def stretch_flags(recipe: Recipe, method: str, factor: int) -> Flags:
    """Return how a method stretches the base's rope by `factor`, by flag; nothing for none."""
    if method == NONE:
        return {}
    flags: Flags = {"rope_stretch": factor, "rope_stretch_rule": method}
    # The other rules do not ask for what a frequency did in training.
    return {**flags, "rope_original_length": recipe.length} if method == "yarn" else flags


def adapter_flags(recipe: Recipe, method: str, adapters: str, base: Path) -> Flags:
    """Return what makes a training one of adapters on the frozen base in the folder `base`, by flag."""
    length = recipe.length * recipe.adapted
    own: Flags = {"retrofit_lora_rank": recipe.lora_rank, "retrofit_lora_length": recipe.length}
    if adapters == SLOW:
        # As far beyond these contexts as periods of 1e6 to 1e9 tokens are beyond 300,000.
        own = {"slow_band_periods": [str(round(length * period)) for period in SLOW_PERIODS]}
    parts = [adapters] if method == NONE else ["stretch", adapters]
    return {
        **stretch_flags(recipe, method, recipe.adapted),
        "retrofit": parts,
        **own,
        "pretrained_checkpoint": str(base),
        "use_checkpoint_args": True,
    }


def evaluation_flags(recipe: Recipe, cell: Cell) -> Flags:
    """Return the command line of a measurement, by flag, without data and the checkpoint.

    Contexts are the newest tokens of samples, so that all lengths are compared on the same labels.
    """
    last = recipe.last(cell.data)
    return {
        **({"cpu": True} if recipe.cpu else {}),
        **_lengths(recipe.length * cell.factor),
        # Not the checkpoint's run, whose length is another.
        "finetune": True,
        "position_embedding_type": "rope",
        "megacontext": True,
        "mc_plan": "recency",
        "mc_source_length": recipe.source(cell.data),
        "mc_block_size": last,
        "mc_recent_tokens": last,
        "mc_horizon": last,
        **stretch_flags(recipe, cell.method, cell.factor),
        "micro_batch_size": recipe.micro(cell.factor),
        "mc_eval_inputs": "recency",
        "mc_eval_samples": recipe.evaluated,
    }


def _lengths(rows: int) -> Flags:
    return {"seq_length": rows, "max_position_embeddings": rows}


TEXT = Recipe(
    length=512,
    layers=6,
    hidden=512,
    heads=8,
    init_std=0.04,
    learning_rate=1e-3,
    steps=600,
    warmup=30,
    batch=64,
    evaluated=128,
    micro_tokens=8192,
    text=True,
    cpu=False,
)

TIERS: Mapping[str, Recipe] = {"cpu": Recipe(), "gpu": TEXT}
"""Recipes by tier."""

FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))
