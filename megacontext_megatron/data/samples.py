"""The outermost dataset wrapper: one Megatron sample is one working context of one raw sample of C + 1 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megacontext_megatron.config import ContextConfig

Item = dict[str, torch.Tensor]

ENDLESS = 2**40


class RawDataset(Protocol):
    """What the wrapper reads: Megatron's GPT or blended data set built at sequence length C."""

    def __len__(self) -> int:
        """Return the number of raw samples."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, torch.Tensor]:
        """Return `tokens`, `labels` (int64 [C]) and `loss_mask` (fp32 [C])."""
        ...


class RowPlanner(Protocol):
    """Derives a context's rows from its identity (see spans.plan.plan_rows)."""

    def __call__(
        self, key: tuple[int, int, int, int], end_of_document: NDArray[np.int64] | None, /
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return `start` and `level`, int64 [W], and `shortened`, int64 [1], for (seed, split, sample, variant)."""
        ...


class Teacher(Protocol):
    """Knows what a teacher said of raw samples (see data.teacher_cache.TeacherCache)."""

    def __call__(self, sample: int, text: torch.Tensor, /) -> Mapping[str, torch.Tensor]:
        """Return what a raw sample's items carry of it, by field of data.batch.Batch."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleIdentity:
    """What names the contexts of a data set: the run's seed, the split's number and the EOD token if plans need it."""

    seed: int
    split: int
    eod: int | None = None


class WorkingContextDataset(Dataset[Item]):
    """Maps item i to (raw sample i div V, variant i mod V).

    On pipeline stages that read no tokens `raw` is None and the items hold rows only; there are then as many as
    anybody asks for, because the stages that read tokens know where the data ends.
    """

    def __init__(
        self,
        raw: RawDataset | None,
        context: ContextConfig,
        identity: SampleIdentity,
        planner: RowPlanner,
        *,
        teacher: Teacher | None = None,
    ) -> None:
        self._raw = raw
        self._raw_length = ENDLESS if raw is None else len(raw)
        self._context = context
        self._identity = identity
        self._planner = planner
        self._teacher = teacher
        self._last: tuple[int, Item] | None = None
        # Megatron chooses training or evaluation batch sizes by this attribute of the outermost data set.
        self.split = Split(identity.split)

    def __len__(self) -> int:
        """Return the number of working contexts: V for each raw sample."""
        return self._raw_length * self._context.variants

    def __getitem__(self, index: int) -> Item:
        """Return one context.

        `start`, `level`: int64 [W]; `identity`: int64 [3], the raw sample, the variant and the history tokens left
        out under `no-cross`; with a raw data set also `text`, int64 [C + 1], and `mask`, int64 [C], 1 where the next
        token counts in the loss; with a teacher also what it said.
        """
        sample, variant = divmod(int(index), self._context.variants)
        item = dict(self._raw_item(sample)) if self._raw is not None else {}
        key = (self._identity.seed, self._identity.split, sample, variant)
        rows = self._planner(key, self._end_of_document(item))
        item["start"] = torch.from_numpy(rows["start"])
        item["level"] = torch.from_numpy(rows["level"])
        item["identity"] = torch.tensor([sample, variant, int(rows["shortened"][0])])
        return item

    def _raw_item(self, sample: int) -> Item:
        """Read a raw sample once for all its variants, which a data loader worker asks for one after another."""
        assert self._raw is not None
        if self._last is None or self._last[0] != sample:
            raw = self._raw[sample]
            text = torch.cat([raw["tokens"], raw["labels"][-1:]])
            taught = self._teacher(sample, text) if self._teacher is not None else {}
            self._last = sample, {"text": text, "mask": raw["loss_mask"].long(), **taught}
        return self._last[1]

    def _end_of_document(self, item: Item) -> NDArray[np.int64] | None:
        if self._identity.eod is None:
            return None
        return np.flatnonzero(item["text"][:-1].numpy() == self._identity.eod)
