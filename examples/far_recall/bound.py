"""What no training can exceed: accuracies that follow from how documents are drawn."""

from __future__ import annotations

import numpy as np

from examples.far_recall.task import Task


def bag_bound(task: Task, samples: int = 200_000, seed: int = 0) -> float:
    """Return the best accuracy of a reader that knows which symbols a needle's block holds but not where.

    That is all the mean of a block can tell.  Every value symbol in the block is the answer's next token with the same
    probability, so the best guess is the most frequent one, and it is right as often as its share among them.  Answer
    tokens that a query has already given are taken out.  Drawn `samples` times, with a standard error below 0.001.
    """
    generator = np.random.default_rng(seed)
    held = generator.integers(0, task.values, (samples, task.answer_tokens + task.distractors))
    counts = (held[..., None] == np.arange(task.values)).sum(axis=1)
    right = []
    for given in range(task.answer_tokens):
        right.append(counts.max(axis=1) / (held.shape[1] - given))
        counts[np.arange(samples), held[:, given]] -= 1
    return float(np.mean(right))
