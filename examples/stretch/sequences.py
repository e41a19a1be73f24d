"""Generated sequences, drawn with numpy, and the Megatron data sets they are written to.

Every law draws bodies, int32 [count, length]: ids below `symbols`, and every token of a body follows from those before
it as the law says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megacontext_megatron.data.writing import new_datasets

Tokens = NDArray[np.int32]

SYMBOLS = 16
OFFSET = 5
NOISE = 0.1
PERIODS = (8, 24)


def offset_copy(count: int, length: int, generator: np.random.Generator) -> Tokens:
    """Return bodies in which each token is that OFFSET back, or any with the probability NOISE."""
    drawn = _symbols((count, length), generator)
    copied = generator.random((count, length)) >= NOISE
    for place in range(OFFSET, length):
        drawn[:, place] = np.where(copied[:, place], drawn[:, place - OFFSET], drawn[:, place])
    return drawn


def repeat(
    count: int,
    length: int,
    generator: np.random.Generator,
    periods: tuple[int, int] = PERIODS,
    text: Tokens | None = None,
) -> Tokens:
    """Return bodies that repeat one pattern, as long as a draw from `periods`, both ends included.

    Patterns are of random symbols, or, with `text`, passages from random places of it.
    """
    longest = periods[1]
    period = generator.integers(periods[0], longest + 1, (count, 1))
    if text is None:
        pattern = _symbols((count, longest), generator)
    else:
        begin = generator.integers(0, len(text) - longest + 1, (count, 1))
        pattern = text[begin + np.arange(longest)].astype(np.int32)
    return np.take_along_axis(pattern, np.arange(length) % period, axis=1)


def mixture(count: int, length: int, generator: np.random.Generator) -> Tokens:
    """Return as many bodies of offset_copy as of repeat, in turns."""
    bodies = np.empty((count, length), dtype=np.int32)
    bodies[::2] = offset_copy(len(bodies[::2]), length, generator)
    bodies[1::2] = repeat(len(bodies[1::2]), length, generator)
    return bodies


def long_copy(
    count: int, length: int, generator: np.random.Generator, trained: int, text: Tokens | None = None
) -> Tokens:
    """Return bodies that repeat a pattern of more than `trained` tokens and at most twice as many.

    What a token repeats lies further back than a base trained at `trained` tokens has ever looked.
    """
    return repeat(count, length, generator, (trained + 1, 2 * trained), text)


def ordering(count: int, length: int, generator: np.random.Generator, first: int = 0) -> Tokens:
    """Return bodies that repeat one order of SYMBOLS symbols and, for their last two turns, another one.

    The last SYMBOLS tokens follow from what each symbol was followed by last: once by the second order, before that as
    often as the body is long by the first.  Ids start at `first`.
    """
    old, new = (generator.random((count, SYMBOLS)).argsort(axis=1) for _ in range(2))
    bodies = np.take_along_axis(old, np.broadcast_to(np.arange(length) % SYMBOLS, (count, length)), axis=1)
    # One token more than two turns, so that the step from the last symbol to the first has been seen as well.
    tail = 2 * SYMBOLS + 1
    bodies[:, -tail:] = np.take_along_axis(new, np.broadcast_to(np.arange(tail) % SYMBOLS, (count, tail)), axis=1)
    return (bodies + first).astype(np.int32)


def _symbols(shape: tuple[int, ...], generator: np.random.Generator) -> Tokens:
    return generator.integers(0, SYMBOLS, shape, dtype=np.int32)


def stream(bodies: Tokens) -> Tokens:
    """Return bodies [count, length] as one sequence whose samples of `length` tokens have a body each as labels.

    A sample's inputs are the token before its body and the body without its last token: so no label belongs to another
    body, as the last of a sample would if bodies were laid end to end.
    """
    return np.concatenate([bodies[:1, :1].ravel(), bodies.ravel()])


def write(prefix: Path, bodies: Tokens, vocabulary: int) -> None:
    """Write bodies to `prefix`.bin and .idx as one document, which Megatron cuts in order at `--seq-length`."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with new_datasets([str(prefix)], vocabulary) as (dataset,):
        dataset.add(stream(bodies))
        dataset.builder.finalize(f"{prefix}.idx")


def read_tokens(prefix: str) -> Tokens:
    """Return all tokens of a data set, its documents one behind the other, int32 [tokens]."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return np.concatenate([np.asarray(dataset[number]) for number in range(len(dataset))]).astype(np.int32)
