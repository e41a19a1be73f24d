"""How arms are trained: the sizes and settings that all arms of a tier share, and the flags in which arms differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from examples.command_line import Flags, model_flags, token_flags
from examples.far_recall.task import Task
from megacontext_megatron.config import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A model and its training, equal in all arms; `documents` written for training are repeated where too few.

    Raises ConfigError for settings that Megatron's schedule cannot hold.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    rotary_base: int = 1_000_000
    init_std: float = 0.1
    learning_rate: float = 3e-3
    warmup: int = 50
    steps: int = 1000
    batch: int = 32
    micro_batch: int = 32
    documents: int = 32_768
    evaluated: int = 2048
    gist_layers: int = 2
    gist_hidden: int = 64
    workers: int = 0
    log_interval: int = 10

    def __post_init__(self) -> None:
        """Refuse training that ends before its learning rate has risen."""
        if self.warmup >= self.steps:
            raise ConfigError(f"warmup={self.warmup} must be less than steps={self.steps}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to read the documents; `flags` are what it adds to the command line, `rows` how long its contexts are.

    `input` names the evaluation whose accuracy is the arm's.  An arm that is `trained_as` another one is that one's
    model, evaluated differently.
    """

    flags: Flags
    input: str
    rows: int
    trained_as: str | None = None


def arms(task: Task, recipe: Recipe) -> dict[str, Arm]:
    """Return all arms of a task by name."""
    return _by_distance(task) if task.ask == "distance" else _by_content(task, recipe)


def _by_content(task: Task, recipe: Recipe) -> dict[str, Arm]:
    mixed: Flags = {"mc_plan": "random", "mc_level2_prob": task.level2_prob}
    mean: Flags = {**mixed, "mc_gist_kind": "mean"}
    learned: Flags = {
        **mixed,
        "mc_gist_kind": "gistnet",
        "mc_gist_layers": recipe.gist_layers,
        "mc_gist_hidden_size": recipe.gist_hidden,
    }
    newest: Flags = {"mc_plan": "recency"}
    # Attention over all tokens needs (C / W)^2 times the memory.
    fitting = max(1, recipe.micro_batch * task.window // task.source_length)
    part = max(size for size in range(1, fitting + 1) if recipe.micro_batch % size == 0)
    full: Flags = {**newest, "seq_length": task.source_length, "micro_batch_size": part}
    return {
        "gistnet": Arm(flags=learned, input="mixed", rows=task.window),
        "mean": Arm(flags=mean, input="mixed", rows=task.window),
        "recency": Arm(flags=newest, input="recency", rows=task.window),
        "full": Arm(flags=full, input="recency", rows=task.source_length),
        "shuffled": Arm(flags=learned, input="shuffled", rows=task.window, trained_as="gistnet"),
    }


def _by_distance(task: Task) -> dict[str, Arm]:
    mean: Flags = {"mc_plan": "random", "mc_level2_prob": task.level2_prob, "mc_gist_kind": "mean"}
    rules: dict[str, Flags] = {
        "uniform": {"gaussian_rope_sigma": "uniform"},
        "width": {"gaussian_rope_sigma": "width"},
        "none": {"gaussian_rope_sigma": "none"},
        "learned": {"gaussian_rope_sigma": "uniform", "gaussian_rope_learnable_sigma": "level"},
    }
    return {name: Arm(flags={**mean, **rule}, input="mixed", rows=task.window) for name, rule in rules.items()}


def training_flags(task: Task, recipe: Recipe, arm: Arm, seed: int) -> Flags:
    """Return the command line of an arm's training, by flag, without the data and the places of files."""
    context = task.context
    shape: Flags = {
        "seq_length": context.window,
        "megacontext": True,
        "mc_source_length": context.source_length,
        "mc_block_size": context.block_size,
        "mc_max_level": context.max_level,
        "mc_recent_tokens": context.recent_tokens,
        "mc_horizon": context.horizon,
        "mc_loss_after_token": tuple(task.query_symbols),
        "position_embedding_type": "gaussian_rope",
        "rotary_base": recipe.rotary_base,
    }
    training: Flags = {
        "micro_batch_size": recipe.micro_batch,
        "global_batch_size": recipe.batch,
        "train_iters": recipe.steps,
        "lr": recipe.learning_rate,
        "min_lr": recipe.learning_rate,
        "lr_decay_style": "constant",
        "lr_warmup_iters": recipe.warmup,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "clip_grad": 1.0,
        "seed": seed,
        "eval_iters": 0,
        "eval_interval": 1_000_000,
        "save_interval": recipe.steps,
        "log_interval": recipe.log_interval,
        "num_workers": recipe.workers,
    }
    tokens = token_flags(task.vocabulary, task.end_of_document)
    values = {**shape, **model_flags(recipe), **training, **tokens, **arm.flags}
    return {**values, "max_position_embeddings": values["seq_length"]}


GPU = Recipe(steps=2000, evaluated=1024, documents=65_536, workers=1, log_interval=20)
FAR = Task(
    source_length=4096,
    window=256,
    block_size=32,
    max_level=2,
    recent_tokens=128,
    keys=32,
    values=64,
    noise=64,
    needles=32,
    queries=32,
    answer_tokens=2,
    copies=(1, 2, 4, 7),
    level2_prob=0.1,
)
BY_DISTANCE = Task(
    ask="distance",
    source_length=2048,
    window=560,
    block_size=32,
    recent_tokens=128,
    keys=0,
    distances=64,
    needles=0,
    distractors=0,
    queries=64,
)

TIERS: Mapping[tuple[str, str], tuple[Task, Recipe]] = {
    ("cpu", "content"): (Task(copies=(1, 2)), Recipe(steps=600)),
    ("cpu", "distance"): (
        Task(ask="distance", window=158, keys=0, distances=16, needles=0, distractors=0, queries=16),
        Recipe(rotary_base=10_000),
    ),
    ("gpu", "content"): (FAR, GPU),
    ("gpu", "distance"): (BY_DISTANCE, dataclasses.replace(GPU, rotary_base=10_000)),
}
"""Task and training by tier and by what is asked."""
