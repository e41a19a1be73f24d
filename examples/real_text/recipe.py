"""How the arms are trained and evaluated: what they share, and the flags in which they differ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from examples.command_line import Flags, model_flags, token_flags
from examples.real_text.documents import Corpus
from megacontext_megatron.config import ConfigError, ContextConfig

MEAN, GISTNET, FULL = "mean", "gistnet", "full"
ARMS = (FULL, GISTNET, MEAN)
"""Trainings: mean gists and GistNet on a recency and a mixed context of each raw sample, and all C tokens as rows.

The longest comes first, so that no run is left alone at the end.
"""

NEWEST = "newest"
"""The loss of a model trained on all rows where it sees the newest `rows` alone, in results."""

VARIANTS = 2
CACHE = "cache"
"""The folder of Megatron's indices in the folder of a run."""

VOCABULARY, END_OF_DOCUMENT = 320, 256
"""Bytes and Megatron's end of document, padded."""

_NEVER = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A byte-level model, its contexts and its training, equal in all arms.

    `batch_tokens` are the raw tokens of a step; `evaluated` is the most held-out samples an input is evaluated on.
    Contexts collapse by `training_plan` in training and by `plan` when they are evaluated.
    Raises ConfigError for sizes that do not fit.
    """

    source_length: int = 4096
    rows: int = 1024
    block_size: int = 32
    recent_tokens: int = 128
    horizon: int = 64
    plan: str = "heuristic"
    training_plan: str = "heuristic"
    layers: int = 8
    hidden: int = 512
    heads: int = 8
    steps: int = 1200
    batch_tokens: int = 32768
    learning_rate: float = 1e-3
    init_std: float = 0.04
    evaluated: int = 1024
    cpu: bool = False
    transformer_impl: str = "transformer_engine"
    more: tuple[str, ...] = ()
    """Flags of the training command that are added to those of every arm, and win over them."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.batch_tokens % self.source_length:
            raise ConfigError(
                f"--batch-tokens {self.batch_tokens} must be a multiple of --source-length {self.source_length}."
            )
        _ = self.context

    @property
    def context(self) -> ContextConfig:
        """The contexts of the arms with gists; raises ConfigError where no plan can satisfy it."""
        return ContextConfig(
            window=self.rows,
            source_length=self.source_length,
            variants=VARIANTS,
            block_size=self.block_size,
            recent_tokens=self.recent_tokens,
            horizon=self.horizon,
            plan=self.plan,  # type: ignore[arg-type]  (the command line has checked it)
        )

    @property
    def samples(self) -> int:
        """Raw samples in a step."""
        return self.batch_tokens // self.source_length

    @property
    def raw_tokens(self) -> int:
        """Raw tokens that a training reads."""
        return self.batch_tokens * self.steps

    def trained_rows(self, arm: str) -> int:
        """Return the rows that a training of an arm runs through its model."""
        rows = self.source_length if arm == FULL else VARIANTS * self.rows
        return self.samples * rows * self.steps

    def as_dict(self) -> dict[str, object]:
        """Return everything that makes a training, as JSON holds it."""
        return {**dataclasses.asdict(self), "more": list(self.more)}


def training_flags(recipe: Recipe, arm: str, seed: int, corpus: Corpus, save: Path) -> Flags:
    """Return the command line of a training, by flag."""
    device: Flags = {"cpu": True} if recipe.cpu else {"bf16": True, "transformer_impl": recipe.transformer_impl}
    model: Flags = {**model_flags(recipe), "position_embedding_type": "gaussian_rope"}
    training: Flags = {
        "train_iters": recipe.steps,
        "lr": recipe.learning_rate,
        "min_lr": recipe.learning_rate / 10,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": recipe.steps // 20,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "clip_grad": 1.0,
        "seed": seed,
        "eval_iters": 0,
        "eval_interval": _NEVER,
        "log_interval": max(1, recipe.steps // 60),
        "num_workers": 0 if recipe.cpu else 1,
    }
    places: Flags = {
        "train_data_path": ["1.0", corpus.train],
        "valid_data_path": ["1.0", corpus.valid],
        # one for each run, because runs that build the same index at the same time would write over it
        "data_cache_path": str(save / CACHE),
        **token_flags(VOCABULARY, END_OF_DOCUMENT),
        "save": str(save),
        "save_interval": recipe.steps,
        "no_save_optim": True,
    }
    return {**device, **model, **_context_flags(recipe, arm), **training, **places}


def _context_flags(recipe: Recipe, arm: str) -> Flags:
    shared: Flags = {
        "megacontext": True,
        "mc_source_length": recipe.source_length,
        "mc_block_size": recipe.block_size,
        "mc_recent_tokens": recipe.recent_tokens,
        "mc_horizon": recipe.horizon,
    }
    if arm == FULL:
        own: Flags = {"seq_length": recipe.source_length, "mc_plan": "recency"}
        contexts = recipe.samples
    else:
        own = {"seq_length": recipe.rows, "mc_plan": recipe.training_plan, "mc_variants": VARIANTS, "mc_gist_kind": arm}
        contexts = recipe.samples * VARIANTS
    return {
        **shared,
        **own,
        "max_position_embeddings": own["seq_length"],
        "micro_batch_size": contexts,
        "global_batch_size": contexts,
    }


def evaluation_flags(recipe: Recipe, arm: str, corpus: Corpus, load: Path) -> Flags:
    """Return the command line of an evaluation: of whole micro-batches of different samples, the same in all arms."""
    size = -(-recipe.samples // VARIANTS) * VARIANTS
    available = (corpus.valid_tokens - 1) // recipe.source_length
    count = min(recipe.evaluated, available) // size * size
    if count < size:
        raise ConfigError(
            f"{corpus.valid} holds {available} samples of {recipe.source_length} tokens, less than the {size} of a "
            "micro-batch: give more text, raise --held-out or lower --batch-tokens."
        )
    device: Flags = {"cpu": True} if recipe.cpu else {}
    plan: Flags = {} if arm == FULL else {"mc_plan": recipe.plan}
    return {**device, **plan, "load": str(load), "micro_batch_size": size, "mc_eval_samples": count}


def newest_flags(recipe: Recipe) -> Flags:
    """Return what makes an evaluation of a model trained on all rows one of its newest `rows` alone."""
    return {
        "seq_length": recipe.rows,
        "max_position_embeddings": recipe.rows,
        "mc_plan": recipe.plan,
        "mc_eval_inputs": ["recency"],
        "finetune": True,
    }
