"""Which heads of a layer a tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShare:
    """A rank's part of a layer's `heads` query heads in `groups` query groups of `width` channels each.

    `rank` is one of `ranks`, which hold equal, consecutive parts.
    """

    heads: int
    groups: int
    width: int
    ranks: int = 1
    rank: int = 0

    @property
    def local_heads(self) -> slice:
        """The rank's query heads, counted over the whole layer."""
        share = self.heads // self.ranks
        return slice(self.rank * share, (self.rank + 1) * share)

    @property
    def local_groups(self) -> slice:
        """The rank's query groups, counted over the whole layer."""
        share = self.groups // self.ranks
        return slice(self.rank * share, (self.rank + 1) * share)
