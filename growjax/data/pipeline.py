"""The order of reading as a Grain pipeline: blocks, shuffled, cut into windows, drawn, cut into rows.

Everything up to the rows is a random-access data set whose index counts from the beginning of the run,
so what row k of batch n holds, and what the objective draws for it, is a function of the seed and of
where the run stands. Grain is loaded with this module, and this module only when a batch is made.
"""

import functools
import sys
from typing import Any

import grain
import numpy as np

from growjax.data.corpus import Corpus
from growjax.data.objectives import Example, Objective, Window
from growjax.data.order import blocks_of, windows_per_block


def examples(corpus: Corpus, objective: Objective, block: int, seed: int) -> grain.MapDataset:
    """The examples of a run without end; index i is window i % w of block i // w, w in each."""
    # Grain shuffles epoch e by seed + e: without mixing, seed 1 would begin with seed 0's second epoch
    order, draws = np.random.SeedSequence(seed).generate_state(2).tolist()
    blocks = grain.MapDataset.range(blocks_of(len(corpus), block)).shuffle(seed=order).repeat()
    windows = _Windows(blocks, windows_per_block(block, objective.raw_length))
    read = functools.partial(_read, corpus, objective, block)
    return windows.map(read).random_map(functools.partial(_draw, corpus, objective), seed=draws)


def rows(parent: grain.MapDataset, first: int, batch: int, rank: int, count: int) -> Any:
    """Those of the examples from `first` on that stand in one host's slice of every batch."""
    return _Rows(parent, first, batch, rank, count)


def batches(parent: grain.MapDataset, batch: int, threads: int) -> grain.IterDataset:
    """Rows in batches. They are counted after reading: Grain's state then means the same for any size."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=batch if threads else 0)
    return parent.to_iter_dataset(options).batch(batch)


def ahead(batches: grain.IterDataset, buffer: int) -> Any:
    """An iterator whose batches are made by a thread of its own, at most so many ahead."""
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=buffer))


class _Windows(grain.MapDataset):
    """Each element of the parent so many times, with a number from 0."""

    def __init__(self, parent: grain.MapDataset, each: int):
        super().__init__(parent)
        self._each = each

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        block, window = divmod(index, self._each)
        return self._parent[block], window


class _Rows(grain.MapDataset):
    """Row k of batch n is element `first + n * batch + k`; a host has a slice of the ks."""

    def __init__(self, parent: grain.MapDataset, first: int, batch: int, rank: int, count: int):
        super().__init__(parent)
        self._first = first + rank * (batch // count)
        self._batch, self._rows = batch, batch // count

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        n, k = divmod(index, self._rows)
        return self._parent[self._first + n * self._batch + k]


def _read(corpus: Corpus, objective: Objective, block: int, at: tuple[int, int]) -> Window:
    start = at[0] * block + at[1] * objective.raw_length
    stop = start + objective.raw_length + objective.lookahead
    return Window(corpus.read(start, stop), corpus.documents(start, stop))


def _draw(
    corpus: Corpus, objective: Objective, window: Window, rng: np.random.Generator
) -> Example:
    return objective(window, corpus.vocabulary, rng)
