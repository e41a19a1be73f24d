"""The training contract: contexts beyond the recency baseline must really mix tokens and gists."""

from __future__ import annotations

from torch import Tensor

from megacontext_megatron.config import ContextConfig


class GistGuard:
    """Counts rows of non-recency variants by level on the host, and fails loudly when one kind is missing.

    `period` is the number of micro-batches over which both kinds must appear: the micro-batches of one step.
    """

    def __init__(self, context: ContextConfig, period: int) -> None:
        self._context, self._period = context, period
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
            raise RuntimeError(
                f"no {missing} row in {self._seen} micro-batches of working contexts: training would not mix levels "
                "of detail. Raise --mc-source-length, shorten documents' reach with --mc-eod-policy ignore, or ask "
                "for --mc-plan recency if tokens alone are meant."
            )
        self._seen = self._tokens = self._gists = 0
