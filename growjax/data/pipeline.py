"""A Grain pipeline: blocks are shuffled and cut into windows, windows become examples, examples batches.

Up to the examples it is a random-access data set whose index counts from the beginning of the run. So
row k of batch n, with the objective's random draws, is a function of the seed and the cursor. Importing
this module imports Grain; `batches` does so only when it makes a batch.
"""

import functools
import sys
from typing import Any

import grain
import numpy as np

from growjax.data.blend import Blended, corpora_of, shares_of
from growjax.data.corpus import Corpus
from growjax.data.objectives import Example, Objective, Window
from growjax.data.order import blocks_of, corpus_of, windows_per_block


def examples(
    corpus: Corpus | Blended, objective: Objective, block: int, seed: int
) -> grain.MapDataset:
    """The infinite examples of a run; index i is window i % w of block i // w, with w in each block."""
    # Grain shuffles epoch e by seed + e: without mixing, seed 1 would begin with seed 0's second epoch
    order, draws = np.random.SeedSequence(seed).generate_state(2).tolist()
    orders = []
    for n, part in enumerate(corpora_of(corpus)):
        if n:
            order = int(np.random.SeedSequence([seed, n]).generate_state(1)[0])
        numbers = grain.MapDataset.range(blocks_of(len(part), block))
        orders.append(numbers.shuffle(seed=order).repeat())
    blocks = _Blocks(orders, shares_of(corpus))
    windows = _Windows(blocks, windows_per_block(block, objective.raw_length))
    read = functools.partial(_read, corpora_of(corpus), objective, block)
    return windows.map(read).random_map(functools.partial(_draw, corpus, objective), seed=draws)


def batches(parent: grain.MapDataset, batch: int, threads: int) -> grain.IterDataset:
    """Rows in batches. Grain's state counts rows, not batches, so it holds for any batch size."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=batch if threads else 0)
    return parent.to_iter_dataset(options).batch(batch)


def ahead(batches: grain.IterDataset, buffer: int) -> Any:
    """An iterator over batches that its own thread prepares, at most `buffer` ahead."""
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=buffer))


class _Infinite(grain.MapDataset):
    """A data set without an end; a subclass writes `_at`, the element at an index."""

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        return self.slice(index) if isinstance(index, slice) else self._at(index)

    def _at(self, index: int) -> Any:
        raise NotImplementedError


class _Blocks(_Infinite):
    """Pairs `(corpus, block)`: the blocks of each corpus in its order, mixed by their shares."""

    def __init__(self, parents: list[grain.MapDataset], shares: tuple[int, ...]):
        super().__init__(parents)
        self._shares = shares

    def _at(self, index: int) -> Any:
        corpus, number = corpus_of(index, self._shares)
        return corpus, self._parents[corpus][number]


class _Windows(_Infinite):
    """Pairs `(block, window)`: each block of the parent with each window number from 0."""

    def __init__(self, parent: grain.MapDataset, per_block: int):
        super().__init__(parent)
        self._per_block = per_block

    def _at(self, index: int) -> Any:
        block, window = divmod(index, self._per_block)
        return self._parent[block], window


class Rows(_Infinite):
    """One host's rows: row k of batch n is element `first + n * batch + k`, for k in the host's slice."""

    def __init__(self, parent: grain.MapDataset, first: int, batch: int, rank: int, count: int):
        super().__init__(parent)
        self._first = first + rank * (batch // count)
        self._batch, self._rows = batch, batch // count

    def _at(self, index: int) -> Any:
        n, k = divmod(index, self._rows)
        return self._parent[self._first + n * self._batch + k]


def _read(
    corpora: tuple[Corpus, ...], objective: Objective, block: int, at: tuple[tuple[int, int], int]
) -> Window:
    """The window `at` ((corpus, block), window); blocks have `block` tokens."""
    (number, place), window = at
    corpus = corpora[number]
    start = place * block + window * objective.raw_length
    stop = start + objective.raw_length + objective.lookahead
    return Window(corpus.read(start, stop), corpus.documents(start, stop))


def _draw(
    corpus: Corpus | Blended, objective: Objective, window: Window, rng: np.random.Generator
) -> Example:
    return objective(window, corpus.vocabulary, rng)
