"""The add-one bigram baseline: what a table of pair counts predicts on the same targets as a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 24


def pair_counts(prefixes: Sequence[str], vocabulary: int) -> NDArray[np.int64]:
    """Count adjacent token pairs of whole data sets, end-of-document tokens included: int64 [vocabulary, vocabulary].

    Meant for byte-sized vocabularies: memory grows with the square.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    counts = np.zeros(vocabulary * vocabulary, dtype=np.int64)
    for prefix in prefixes:
        tokens = np.memmap(f"{prefix}.bin", dtype=IndexedDataset(prefix).index.dtype, mode="r")
        for begin in range(0, len(tokens) - 1, CHUNK):
            part = tokens[begin : begin + CHUNK + 1].astype(np.int64)
            counts += np.bincount(part[:-1] * vocabulary + part[1:], minlength=counts.size)
    return counts.reshape(vocabulary, vocabulary)


def add_one_nll(counts: NDArray[np.int64], texts: Iterable[NDArray[np.int64]], horizon: int) -> float:
    """Return the mean negative log-likelihood, in nats, of the last `horizon` tokens of each text given the one before.

    Laplace's rule: (count of the pair + 1) / (count of the first token + vocabulary).
    """
    total, targets = 0.0, 0
    row_sums = counts.sum(axis=1)
    for text in texts:
        before, after = text[-horizon - 1 : -1], text[-horizon:]
        total -= np.log((counts[before, after] + 1) / (row_sums[before] + counts.shape[0])).sum()
        targets += after.size
    return total / targets
