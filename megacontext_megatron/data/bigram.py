"""The add-one bigram baseline: what a table of pair counts predicts on the same targets as a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 24
GREATEST_VOCABULARY = 4096
"""Memory grows with the square of the vocabulary: 128 MiB at this one."""


def pair_counts(prefixes: Sequence[str], vocabulary: int, share: tuple[float, float] = (0.0, 1.0)) -> NDArray[np.int64]:
    """Count adjacent token pairs of data sets, end-of-document tokens included: int64 [vocabulary, vocabulary].

    `share` bounds the documents of each data set that count, as fractions, the way Megatron's `--split` cuts them.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    counts = np.zeros(vocabulary * vocabulary, dtype=np.int64)
    for prefix in prefixes:
        # Bound to a name: an index that is collected takes its memory map with it.
        dataset = IndexedDataset(prefix)
        begin, end = (round(bound * len(dataset.sequence_lengths)) for bound in share)
        places = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
        tokens = np.memmap(f"{prefix}.bin", dtype=dataset.index.dtype, mode="r")[places[begin] : places[end]]
        for begin in range(0, len(tokens) - 1, CHUNK):
            part = tokens[begin : begin + CHUNK + 1].astype(np.int64)
            counts += np.bincount(part[:-1] * vocabulary + part[1:], minlength=counts.size)
    return counts.reshape(vocabulary, vocabulary)


def add_one_nll(counts: NDArray[np.int64], samples: Iterable[Mapping[str, Tensor]], horizon: int) -> float:
    """Return the mean negative log-likelihood, in nats, of the last `horizon` targets of raw samples.

    Samples hold `tokens`, `labels` (int64 [C]) and `loss_mask` ([C]), as Megatron's data sets make them.  Laplace's
    rule: (count of the pair + 1) / (count of the first token + vocabulary).
    """
    total, targets = 0.0, 0
    row_sums = counts.sum(axis=1)
    for sample in samples:
        counted = sample["loss_mask"][-horizon:].bool()
        before, after = (sample[name][-horizon:][counted].numpy() for name in ("tokens", "labels"))
        total -= np.log((counts[before, after] + 1) / (row_sums[before] + counts.shape[0])).sum()
        targets += after.size
    return total / targets
