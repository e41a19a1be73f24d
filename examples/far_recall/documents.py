"""Documents of a task, drawn with numpy and written as Megatron data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.far_recall.task import Task
from megacontext_megatron.data.writing import new_datasets

Tokens = NDArray[np.int32]
Indices = NDArray[np.int64]

CHUNK_TOKENS = 1 << 24
"""Tokens drawn at a time, which bounds memory."""


def documents(task: Task, count: int, generator: np.random.Generator) -> Tokens:
    """Return `count` documents, int32 [count, C]."""
    write = _by_content if task.ask == "content" else _by_distance
    return write(task, count, generator)


def write_dataset(prefix: Path, task: Task, count: int, seed: int) -> None:
    """Write `count` documents to `prefix`.bin and .idx, without tokens between them.

    Every document is C tokens long, so the samples that Megatron cuts at `--seq-length` C are the documents, each
    with the first token of another one as its last label, which no row that counts predicts.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_TOKENS // task.source_length)
    with new_datasets([str(prefix)], task.vocabulary) as (dataset,):
        for done in range(0, count, chunk):
            for document in documents(task, min(chunk, count - done), generator):
                dataset.add(document)
        dataset.builder.finalize(f"{prefix}.idx")


def _by_content(task: Task, count: int, generator: np.random.Generator) -> Tokens:
    out = generator.integers(
        task.first_noise, task.first_noise + task.noise, (count, task.source_length), dtype=np.int32
    )
    far = task.far_blocks
    blocks = far.start + _distinct(generator, (count, len(far)), task.needles)
    keys = _distinct(generator, (count, task.keys), task.needles)
    values = _values(task, generator, (count, task.needles, task.answer_tokens))
    needles = np.concatenate([keys[..., None], values], axis=-1).astype(np.int32)
    copies = generator.choice(np.array(task.copies), size=count)
    for number in np.unique(copies):
        these = np.flatnonzero(copies == number)
        places, distractors = _places(task, (len(these), int(number)), generator)
        start = blocks[these, :, None] * task.block_size
        rows = these[:, None, None]
        out[rows, start + distractors] = _values(task, generator, distractors.shape)
        tokens = (start + places)[..., None] + np.arange(needles.shape[-1])
        out[rows[..., None], tokens] = np.broadcast_to(needles[these, :, None], tokens.shape)
    asked = _distinct(generator, (count, task.needles), task.queries)
    _ask(out, task, np.take_along_axis(keys, asked, 1), values[np.arange(count)[:, None], asked])
    return out


def _places(task: Task, shape: tuple[int, int], generator: np.random.Generator) -> tuple[Indices, Indices]:
    """Return where copies of needles and distractors begin in their blocks, for shape = (documents, copies).

    All orders of copies, distractors and single noise tokens are equally likely.  Shapes [documents, needles, copies]
    and [documents, needles, distractors].
    """
    count, copies = shape
    units = task.block_size - copies * task.answer_tokens
    rank = _distinct(generator, (count, task.needles, units), copies + task.distractors)
    earlier = (rank[..., None, :copies] < rank[..., None]).sum(axis=-1)
    begin = rank + task.answer_tokens * earlier
    return begin[..., :copies], begin[..., copies:]


def _by_distance(task: Task, count: int, generator: np.random.Generator) -> Tokens:
    blocks = task.source_length // task.block_size
    out = np.repeat(_values(task, generator, (count, blocks)), task.block_size, axis=1)
    tail = (count, task.recent_tokens)
    out[:, -task.recent_tokens :] = generator.integers(task.first_noise, task.first_noise + task.noise, tail)
    symbol = generator.integers(0, task.distances, (count, task.queries))
    lengths = np.array([task.distance(number) for number in range(task.distances)])
    asking = task.source_length - task.query_tokens + 2 * np.arange(task.queries)
    answers = np.take_along_axis(out, asking - lengths[symbol], axis=1)
    _ask(out, task, symbol, answers[..., None])
    return out


def _ask(out: Tokens, task: Task, things: Indices, answers: Tokens) -> None:
    """Write queries to the end of the documents `out`: for things [n, q], symbol and token of answers [n, q, t]."""
    symbols = task.query_symbols.start + np.arange(task.answer_tokens) * task.asked + things[..., None]
    queries = np.stack([symbols, answers], axis=-1).reshape(len(out), -1)
    out[:, task.source_length - task.query_tokens :] = queries


def _values(task: Task, generator: np.random.Generator, shape: tuple[int, ...]) -> Tokens:
    return generator.integers(task.first_value, task.first_value + task.values, shape, dtype=np.int32)


def _distinct(generator: np.random.Generator, shape: tuple[int, ...], count: int) -> Indices:
    """Return `count` different numbers below the last of `shape`, in random order, for each of the others."""
    return generator.random(shape, dtype=np.float32).argsort(axis=-1)[..., :count]
