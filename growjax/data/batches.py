"""The batches of one stage. Batch n is a function of the seed, the stage's cursor and n.

Nothing else has a say: not the number of hosts, not that of threads, and not where a run was resumed.
So a checkpoint holds no state of a loader, and to resume at step n is to ask for batch n.
"""

import dataclasses
import functools
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from growjax.data.corpus import Corpus
from growjax.data.objectives import Example, Objective, Window
from growjax.data.order import blocks_of, blocks_used, windows_per_block
from growjax.errors import DataError, GrowjaxError, raise_all


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """What the steps of a stage are trained on, or one host's share of it.

    **Arguments**

    - `corpus`, `objective`: what is read, and what is made of it.
    - `batch`: rows of a step, on all hosts together.
    - `block`: tokens that are shuffled as one; the longest `raw_length` of all stages of a run (None: of
      this one). Must be the same in all stages, or a corpus is read twice here and never there.
    - `start`: the cursor: how many blocks the stages before this one used. Their `used(steps)` says it.
    - `seed`: of the order and of what objectives draw.
    - `rank`, `count`: which of how many hosts this is. Host r has the r-th slice of every batch.
    - `threads`: that read ahead, besides that of `iterate`. They pay off on slow discs only.

    Raises `DataError` that lists every fault.

    **Example**

        first = Batches(corpus, Causal(128), batch=32, block=1024)
        second = Batches(corpus, Causal(1024), batch=8, block=1024, start=first.used(1000))
        second.batch_at(0)["tokens"].shape     # (8, 1024)
    """

    corpus: Corpus
    objective: Objective
    batch: int
    block: int | None = None
    start: int = 0
    seed: int = 0
    rank: int = 0
    count: int = 1
    threads: int = 0

    def __post_init__(self):
        raise_all(DataError, "these batches cannot be made:", _faults(self))

    @property
    def rows(self) -> int:
        """Rows of a batch on this host."""
        return self.batch // self.count

    def used(self, steps: int) -> int:
        """The cursor after so many steps: the next stage's `start`."""
        raw = self.objective.raw_length
        return self.start + blocks_used(steps, batch=self.batch, block=self._block, raw_length=raw)

    def batch_at(self, n: int) -> Example:
        """The rows of step n, which counts from the stage's first."""
        self._check_step(n)
        rows = [self._rows[n * self.rows + k] for k in range(self.rows)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def dataset(self, first: int = 0) -> Any:
        """The batches from step `first` on, as a `grain.IterDataset` without end.

        Its iterators' state counts rows from `first`; `iterate(n)` resumes without any state.
        """
        from growjax.data import pipeline

        self._check_step(first)
        rows = pipeline.rows(self._examples, self._index(first), self.batch, self.rank, self.count)
        return pipeline.batches(rows, self.rows, self.threads)

    def iterate(self, first: int = 0, *, buffer: int = 2) -> "Stream":
        """The steps from `first` on with their batches, made by a thread up to `buffer` ahead.

        **Example**

            with batches.iterate(first=resumed_at) as stream:
                for n, batch in stream:
                    ...
        """
        from growjax.data import pipeline

        if buffer < 1:
            raise DataError(f"buffer: expected 1 or more batches, got {buffer}")
        return Stream(pipeline.ahead(self.dataset(first), buffer), first)

    @property
    def _block(self) -> int:
        return self.objective.raw_length if self.block is None else self.block

    def _index(self, step: int) -> int:
        """The example that a step begins with, counted from the beginning of the run."""
        each = windows_per_block(self._block, self.objective.raw_length)
        return self.start * each + step * self.batch

    @functools.cached_property
    def _examples(self) -> Any:
        from growjax.data import pipeline

        return pipeline.examples(self.corpus, self.objective, self._block, self.seed)

    @functools.cached_property
    def _rows(self) -> Any:
        from growjax.data import pipeline

        return pipeline.rows(self._examples, self._index(0), self.batch, self.rank, self.count)

    def _check_step(self, n: int) -> None:
        if n < 0:
            raise DataError(f"step: expected 0 or more, got {n}")


class Stream:
    """The batches of a stage as they come, and how long was waited for them.

    A fault in the thread that makes them is raised here, as the `DataError` that it is. Close it, or use
    it in a `with`, when it is not needed any more: its thread ends then.
    """

    def __init__(self, batches: Any, first: int):
        self._batches, self._next = [batches], first
        # Also at the end of the program: Grain's iterators cannot be collected after its modules
        self._end = weakref.finalize(self, _end, self._batches)
        self.waited = 0.0  # seconds, over all batches so far

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        return self

    def __next__(self) -> tuple[int, Example]:
        if not self._batches:
            raise DataError("this stream is closed; make another with batches.iterate(first=...)")
        start = time.perf_counter()
        try:
            batch = next(self._batches[0])
        except GrowjaxError:
            self.close()
            raise
        self.waited += max(time.perf_counter() - start, 0.0)
        self._next += 1
        return self._next - 1, batch

    def close(self) -> None:
        """End the thread. Asking for another batch is an error then."""
        self._end()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(batches: list[Any]) -> None:
    batches.pop().close()


def held_out_batch(corpus: Corpus, objective: Objective, rows: int) -> Example:
    """Windows at even distances, with fixed draws: the same for every seed, stage and run.

    **Arguments**

    - `corpus`: the one held out.
    - `rows`: how many. They overlap if the corpus is small.

    Raises `DataError` if the corpus is shorter than a window, or has not what the objective needs.

    **Example**

        held_out_batch(held_out, Causal(128), 64)["tokens"].shape     # (64, 128)
    """
    length = objective.raw_length + objective.lookahead
    faults = list(_fit_faults(corpus, objective))
    if rows < 1:
        faults.append(f"rows: expected 1 or more, got {rows}")
    if len(corpus) < length:
        faults.append(f"corpus: expected the {length} tokens of a window, got {len(corpus)}")
    raise_all(DataError, "nothing can be held out:", faults)
    found = []
    for row, start in enumerate(np.linspace(0, len(corpus) - length, rows).astype(int).tolist()):
        stop = start + length
        window = Window(corpus.read(start, stop), corpus.documents(start, stop))
        found.append(objective(window, corpus.vocabulary, np.random.default_rng([0, row])))
    return {name: np.stack([example[name] for example in found]) for name in found[0]}


def _fit_faults(corpus: Corpus, objective: Objective) -> Iterator[str]:
    try:
        who = type(objective).__name__
        corpus.vocabulary.require(who, objective.needs, objective.sentinels)
    except DataError as error:
        yield str(error).replace("\n", "\n    ")


def _faults(batches: Batches) -> Iterator[str]:
    b = batches
    for name, value, least in [
        ("batch", b.batch, 1),
        ("start", b.start, 0),
        ("seed", b.seed, 0),
        ("count", b.count, 1),
        ("threads", b.threads, 0),
    ]:
        if not isinstance(value, int | np.integer) or value < least:
            yield f"{name}: expected an integer of {least} or more, got {value!r}"
            return
    if not 0 <= b.rank < b.count:
        yield f"rank: expected one of {b.count} hosts, counted from 0, got {b.rank}"
    if b.batch % b.count:
        yield f"batch: expected a multiple of the {b.count} hosts, got {b.batch}"
    raw, block = b.objective.raw_length, b._block
    if block < raw:
        yield (
            f"block: expected at least the {raw} tokens of a window, got {block}; take the longest "
            "raw_length of all stages"
        )
    elif not blocks_of(len(b.corpus), block):
        yield f"corpus: expected at least {block + 1} tokens, for one block, got {len(b.corpus)}"
    yield from _fit_faults(b.corpus, b.objective)
