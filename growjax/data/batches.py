"""The batches of one stage. Batch n is a function of the seed, the stage's cursor and n alone.

It depends neither on the number of hosts and threads nor on where a run was resumed. So a checkpoint
holds no state of a loader: a run that resumes at step n asks for batch n.
"""

import dataclasses
import functools
import itertools
import time
import weakref
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any

import numpy as np

from growjax.data.blend import Blended, corpora_of, shares_of
from growjax.data.corpus import Corpus
from growjax.data.objectives import Example, Objective, Window
from growjax.data.order import blocks_of, blocks_used, windows_per_block
from growjax.errors import DataError, GrowjaxError, raise_all
from growjax.values import Range, check


Count = Annotated[int, Range("an integer of 1 or more", lambda n: n >= 1)]
Index = Annotated[int, Range("an integer of 0 or more", lambda n: n >= 0)]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The training batches of a stage, or one host's share of each.

    **Arguments**

    - `corpus`, `objective`: the tokens, and how examples are made from windows of them. `Blended` is
      several corpora, each block from one of them.
    - `batch`: rows of a step, on all hosts together.
    - `block`: the number of tokens that are shuffled as one unit: the longest `raw_length` of all stages
      of a run (None is that of this stage). It must be the same in all stages; otherwise parts of the
      corpus would be read twice and others never.
    - `start`: the cursor: how many blocks the stages before this one used, from their `used(steps)`.
    - `seed`: decides the order of blocks and the objectives' random draws.
    - `rank`, `count`: which of how many hosts this is. Host r has the r-th slice of every batch.
    - `threads`: how many threads read ahead, besides that of `iterate`; useful with slow discs only.

    Raises `DataError` that lists every fault.

    **Example**

        first = Batches(corpus, Causal(128), batch=32, block=1024)
        second = Batches(corpus, Causal(1024), batch=8, block=1024, start=first.used(1000))
        second.batch_at(0)["tokens"].shape     # (8, 1024)
    """

    corpus: Corpus | Blended
    objective: Objective
    batch: Count
    block: int | None = None
    start: Index = 0
    seed: Index = 0
    rank: int = 0
    count: Count = 1
    threads: Index = 0

    def __post_init__(self):
        check(self, DataError, "these batches cannot be made:", lambda: _faults(self))

    @property
    def rows(self) -> int:
        """Rows of a batch on this host."""
        return self.batch // self.count

    def used(self, steps: int) -> int:
        """The cursor after this many steps: the next stage's `start`."""
        raw = self.objective.raw_length
        return self.start + blocks_used(steps, batch=self.batch, block=self._block, raw_length=raw)

    def batch_at(self, n: int) -> Example:
        """The batch of step n, counted from the stage's first step."""
        self._check_step(n)
        rows = [self._rows[n * self.rows + k] for k in range(self.rows)]
        # From a list of examples to one array for each key
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def dataset(self, first: int = 0) -> Any:
        """The batches from step `first` on, as an infinite `grain.IterDataset`.

        The state of its iterators counts rows from `first`; `iterate(n)` resumes without any state.
        """
        from growjax.data import pipeline

        self._check_step(first)
        rows = pipeline.Rows(self._examples, self._index(first), self.batch, self.rank, self.count)
        return pipeline.batches(rows, self.rows, self.threads)

    def iterate(self, first: int = 0, *, buffer: int = 2) -> "Stream":
        """`(step, batch)` from step `first` on; a thread prepares up to `buffer` batches ahead.

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
        per_block = windows_per_block(self._block, self.objective.raw_length)
        return self.start * per_block + step * self.batch

    # pipeline imports Grain, which takes long and is not needed to plan: so it is imported at first use

    @functools.cached_property
    def _examples(self) -> Any:
        """All examples of the run, as a `grain.MapDataset` indexed from its beginning."""
        from growjax.data import pipeline

        return pipeline.examples(self.corpus, self.objective, self._block, self.seed)

    @functools.cached_property
    def _rows(self) -> Any:
        """This host's examples, from the first step of the stage on."""
        from growjax.data import pipeline

        return pipeline.Rows(self._examples, self._index(0), self.batch, self.rank, self.count)

    def _check_step(self, n: int) -> None:
        if n < 0:
            raise DataError(f"step: expected 0 or more, got {n}")


class Stream:
    """An iterator over `(step, batch)`, with the time that was waited for batches in `waited`.

    A `DataError` in the thread that prepares batches is raised here. Closing the stream, or leaving its
    `with` block, ends the thread.
    """

    def __init__(self, batches: Any, first: int):
        # A list, which `_end` can empty without a reference to this object
        self._batches, self._next = [batches], first
        # The finalizer also runs at the exit of the program, since Grain's iterators fail if they are
        # collected after its modules
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
            # The thread has ended with its error, and cannot go on
            self.close()
            raise
        self.waited += max(time.perf_counter() - start, 0.0)
        self._next += 1
        return self._next - 1, batch

    def close(self) -> None:
        """End the thread. Asking for another batch raises `DataError` from then on."""
        self._end()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(batches: list[Any]) -> None:
    """Remove the only iterator of a list, and close it."""
    batches.pop().close()


def held_out_batch(corpus: Corpus | Blended, objective: Objective, rows: int) -> Example:
    """A batch of evenly spaced windows with fixed draws: the same for every seed, stage and run.

    **Arguments**

    - `corpus`: the held-out corpus. Of several that are mixed by weight, each has its share of the
      windows, those of the first one before those of the next (`held_out_shares`).
    - `rows`: how many windows. They overlap if the corpus is small.

    Raises `DataError` if the corpus is shorter than a window, or if its vocabulary lacks tokens that the
    objective needs.

    **Example**

        held_out_batch(held_out, Causal(128), 64)["tokens"].shape     # (64, 128)
    """
    length = objective.raw_length + objective.lookahead
    faults = list(_fit_faults(corpus, objective))
    if rows < 1:
        faults.append(f"rows: expected 1 or more, got {rows}")
    for part in corpora_of(corpus):
        if len(part) < length:
            faults.append(f"corpus: expected the {length} tokens of a window, got {len(part)}")
    raise_all(DataError, "no held-out batch can be made:", faults)
    examples = []
    for part, count in zip(corpora_of(corpus), held_out_shares(corpus, rows), strict=True):
        for start in np.linspace(0, len(part) - length, count).astype(int).tolist():
            stop = start + length
            window = Window(part.read(start, stop), part.documents(start, stop))
            rng = np.random.default_rng([0, len(examples)])
            examples.append(objective(window, part.vocabulary, rng))
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def held_out_shares(corpus: Corpus | Blended, rows: int) -> list[int]:
    """How many of some held-out windows are from each corpus: its share by weight, rounded.

    **Example**

        held_out_shares(Blended((books, web), (0.7, 0.3), ("books", "web")), 10)     # [7, 3]
    """
    shares = shares_of(corpus)
    # In Python's integers and fractions: the products of shares and rows exceed 64 bits
    ends = [round(Fraction(rows * end, sum(shares))) for end in itertools.accumulate(shares)]
    # Rounded ends differ by whole numbers that sum to `rows`
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def disjoint_windows(corpus: Corpus | Blended, objective: Objective) -> int:
    """The most windows of a held-out batch that do not overlap; at least 1."""
    most = []
    shares = shares_of(corpus)
    for part, share in zip(corpora_of(corpus), shares, strict=True):
        windows = (len(part) - objective.lookahead) // objective.raw_length
        most.append(windows * sum(shares) // share)
    return max(min(most), 1)


def _fit_faults(corpus: Corpus | Blended, objective: Objective) -> Iterator[str]:
    """The special tokens and sentinels that the objective needs and the corpus lacks, as one fault."""
    try:
        name = type(objective).__name__
        corpus.vocabulary.require(name, objective.needs, objective.sentinels)
    except DataError as error:
        # Its lines become a list within the list of faults
        yield str(error).replace("\n", "\n    ")


def _faults(batches: Batches) -> Iterator[str]:
    b = batches
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
    else:
        for part in corpora_of(b.corpus):
            if not blocks_of(len(part), block):
                yield f"corpus: expected at least {block + 1} tokens, for one block, got {len(part)}"
    yield from _fit_faults(b.corpus, b.objective)
