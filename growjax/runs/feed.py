"""The data of a run: the batches of each stage from its corpus, and held-out examples."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import equinox as eqx
import jax
import numpy as np

from growjax.data import (
    Batches,
    Blended,
    Corpus,
    Objective,
    Progress,
    Vocabulary,
    Window,
    batch_shapes,
    held_out_batch,
    load_tokenizer,
    prepare,
)
from growjax.data.batches import disjoint_windows, held_out_shares
from growjax.data.corpus import digest_of
from growjax.errors import DataError
from growjax.models.protocol import predictions, reads_beyond
from growjax.plan.losses import cross_entropy
from growjax.plan.plan import Plan
from growjax.plan.stages import Span
from growjax.trace import Read


class Feed(Protocol):
    """The protocol of a run's data. Batch n must depend on n alone, so that a run can be resumed."""

    @property
    def digest(self) -> str:
        """A digest of the data; a run is not resumed on data with another one."""
        ...

    def stream(self, span: Span, first: int) -> Any:
        """A context manager and iterator of `(i, batch)` from the stage's step `first` on.

        A batch is a dict of arrays with this host's rows. The iterator's `waited` is the number of
        seconds that `next` has blocked so far.
        """
        ...

    def held_out(self, objective: Objective, rows: int) -> Mapping[str, np.ndarray]:
        """Up to `rows` examples that are never trained on, spread evenly over the held-out text.

        They depend on the objective and the number alone: the same on every host and at every stage. A
        feed with a method `held_out_parts` of the same arguments, which returns slices of the rows by
        names, has a held-out loss for each of them.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class CorpusFeed:
    """The batches of a plan from one corpus (`training`), held-out examples from another (`validation`).

    Either may be several corpora that are mixed by weight (`growjax.data.Blended`). The corpus is read in
    blocks as long as the longest window of any stage, so that all stages share one position in it. Raises
    `DataError` if the tokenizer has more words than the model.

    **Example**

        CorpusFeed.of(plan, cache="cache")                     # the data that the plan names
        CorpusFeed(plan, *growjax.data.prepare(Text("books"), ByteTokenizer(), "cache"))
    """

    plan: Plan
    training: Corpus | Blended
    validation: Corpus | Blended

    def __post_init__(self):
        # The corpus has its words from the first stage on, where the vocabulary is smallest
        words, rows = self.training.vocabulary.size, self.plan.spans[0].sizes.get("vocab")
        if rows is not None and words > rows:
            raise DataError(
                f"vocab: the tokenizer has {words} words and the model {rows}; give the model at "
                "least as many, from its first stage on"
            )
        # A model's own axis of words may have any name, and its own loss any outputs
        outputs = _outputs(self.plan) if self.plan.loss is cross_entropy else None
        if outputs is not None and words > outputs:
            raise DataError(
                f"vocab: the tokenizer has {words} words, and the model gives logits of {outputs}"
            )
        for read in _reads_beyond(self.plan, self.training.vocabulary):
            raise DataError(
                f"vocab: the tokenizer has {words} words, and the model reads row {read.index} of an "
                f"array of {read.size}; give the model a row for every word, from its first stage on"
            )

    @classmethod
    def of(
        cls,
        plan: Plan,
        cache: str | Path,
        progress: Callable[[Progress], None] | None = None,
    ) -> "CorpusFeed":
        """Tokenise the data that the plan names, once, into a cache that later runs share.

        `progress` is called about twice a second while that is done.
        """
        if plan.data is None:
            raise DataError("data: the plan names none, and `train` was given no feed")
        tokenizer, validation = load_tokenizer(plan.tokenizer), plan.validation
        corpora = prepare(plan.data, tokenizer, cache, validation=validation, progress=progress)
        return cls(plan, *corpora)

    @property
    def digest(self) -> str:
        if self.plan.validation is None:
            # What is held out of the same text follows from it
            return self.training.digest
        return digest_of([self.training.digest, self.validation.digest])

    def batches(self, span: Span) -> Batches:
        """The batches of one stage, which begin where those of the stage before it end."""
        block = self.plan.block
        latest, start = None, 0
        for s in itertools.islice(self.plan.spans, span.index + 1):
            latest = Batches(
                self.training,
                s.objective,
                s.offered,
                block=block,
                start=start,
                seed=self.plan.seed,
                rank=jax.process_index(),
                count=jax.process_count(),
            )
            start = latest.used(s.steps)
        assert latest is not None
        return latest

    def stream(self, span: Span, first: int) -> Any:
        return self.batches(span).iterate(first)

    def held_out(self, objective: Objective, rows: int) -> Mapping[str, np.ndarray]:
        return held_out_batch(self.validation, objective, self._windows(objective, rows))

    def held_out_parts(self, objective: Objective, rows: int) -> Mapping[str, slice]:
        """The rows of `held_out` that are from each of several corpora, by the names of these."""
        if not isinstance(self.validation, Blended):
            return {}
        counts = held_out_shares(self.validation, self._windows(objective, rows))
        stops = itertools.accumulate(counts)
        rows_of = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
        return dict(zip(self.validation.names, rows_of, strict=True))

    def _windows(self, objective: Objective, rows: int) -> int:
        # At most the number of disjoint windows: overlapping ones would count some tokens twice
        return min(rows, disjoint_windows(self.validation, objective))


def _outputs(plan: Plan) -> int:
    """The number of words that the logits of a plan's first model have, from shapes alone."""
    span = plan.spans[0]
    shapes = batch_shapes(span.objective, 1)
    example = {key: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for key, x in shapes.items()}
    return eqx.filter_eval_shape(predictions, span.model, example).shape[1]


def _reads_beyond(plan: Plan, vocabulary: Vocabulary) -> list[Read]:
    """The reads of a plan's loss beyond the tables of its first model, which are the smallest."""
    span = plan.spans[0]
    length = span.objective.raw_length + span.objective.lookahead

    def example(token: int) -> dict[str, np.ndarray]:
        window = Window(np.full(length, token, np.int32), np.zeros(length, np.int32))
        return span.objective(window, vocabulary, np.random.default_rng(0))

    return reads_beyond(plan.loss, span.model, example(vocabulary.size - 1), example(0))
