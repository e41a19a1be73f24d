"""The training contract: contexts must mix tokens and gists, every part must train, and gists must differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext_megatron.config import ContextConfig, Guards

Complain = Callable[[str], None]
"""Takes the sentence that says which rule was broken; what it raises stops the run."""


def complain(guards: Guards, message: str) -> None:
    """Raise RuntimeError under `fatal`, print a warning under `warn`."""
    if guards == "fatal":
        raise RuntimeError(f"{message} (--mc-guards warn lets the run go on.)")
    if guards == "warn":
        print(f"WARNING: {message}", flush=True)


class GistGuard:
    """Counts rows of non-recency variants by level on the host, and complains when one kind is missing.

    `period` is the number of micro-batches over which both kinds must appear: the micro-batches of one step.
    """

    def __init__(self, context: ContextConfig, period: int, guards: Guards = "fatal") -> None:
        self._context, self._period = context, period
        self._guards: Guards = guards
        self._seen = self._tokens = self._gists = 0

    def count(self, level: Tensor) -> None:
        """Count a micro-batch's levels, int [b, W] on the CPU; raises RuntimeError at the end of a bad period."""
        mixed = level.view(-1, self._context.variants, level.shape[1])
        if self._context.variants > 1:
            mixed = mixed[:, 1:]
        gists = int((mixed > 0).sum())
        self._gists += gists
        self._tokens += mixed.numel() - gists
        self._seen += 1
        if self._seen < self._period:
            return
        if self._gists == 0 or self._tokens == 0:
            missing = "gist" if self._gists == 0 else "token"
            complain(
                self._guards,
                f"no {missing} row in {self._seen} micro-batches of working contexts: training would not mix levels "
                "of detail. Raise --mc-source-length, shorten documents' reach with --mc-eod-policy ignore, or ask "
                "for --mc-plan recency if tokens alone are meant.",
            )
        self._seen = self._tokens = self._gists = 0


def least_spread(dtype: torch.dtype) -> float:
    """Return the spread of gists that are the same but for the rounding of vectors of `dtype`.

    Each vector of length 1 is off by at most about two roundings, and so are two vectors from each other by four.
    """
    return (4.0 * torch.finfo(dtype).eps) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingGuard:
    """Judges what a step showed once `after` iterations have passed.

    `dtype` is that of gists.  Under a loss scale (`scaled`), gradients that are not finite are part of the search for
    it.  Where masks leave rows out (`sparse`), a step may have none that counts, and then no part has a gradient.
    """

    guards: Guards
    after: int
    dtype: torch.dtype
    scaled: bool
    sparse: bool = False

    def judge(self, iteration: int, squares: Mapping[str, float], idle: Set[str], spread: float | None) -> None:
        """Complain of parts without a gradient, or one that is not finite, and of gists that are all the same.

        `squares` are squared gradient norms by part, of which `idle` ones are not meant to train at present; `spread`
        is that of model.gist_terms.spread, None where gists are not learned.
        """
        if self.guards == "off" or iteration <= self.after:
            return
        dead = [part for part, square in squares.items() if square == 0.0 and part not in idle]
        if self.sparse and len(dead) == len(squares.keys() - idle):
            dead = []
        endless = [part for part, square in squares.items() if not math.isfinite(square) and not self.scaled]
        if endless:
            self._complain(f"the gradient of {', '.join(endless)} is not finite", iteration, "it cannot train")
        if dead:
            self._complain(f"the gradient of {', '.join(dead)} is exactly 0", iteration, "nothing trains it")
        if spread is not None and spread <= least_spread(self.dtype):
            self._complain(
                f"all gists point the same way, to rounding (spread {spread:.1e})", iteration, "they tell rows nothing"
            )

    def _complain(self, what: str, iteration: int, why: str) -> None:
        complain(
            self.guards,
            f"{what} in iteration {iteration}: {why}. Guards judge after --mc-guard-after {self.after} iterations.",
        )

    def warn_of_shuffled(self, iteration: int, delta: float | None) -> bool:
        """Return whether a probe found gists of other samples to be no worse, and print a warning if so."""
        if delta is None or delta > 0.0:
            return False
        if self.guards != "off" and iteration > self.after:
            print(
                f"WARNING: gists of other samples serve as well as the right ones in iteration {iteration} (delta "
                f"{delta:.4f} nats per token): collapsed history is not used yet",
                flush=True,
            )
        return True
