"""Another vocabulary: rows for a new tokenizer, of old rows.

Shared tokens keep their row, and others start from their pieces: the usual mean of old pieces, or sparse
combinations of shared tokens (Goddard & Fernandes Neto, "Training-Free Tokenizer Transplantation via
Orthogonal Matching Pursuit", 2025).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from growjax import values
from growjax.algebra import NONE, AxisMap
from growjax.axes import Axes
from growjax.cards import Card, Paper
from growjax.errors import GrowthError, raise_all
from growjax.growth.finishes import Finish, across
from growjax.growth.operator import Exactness, Operator
from growjax.values import Size


_PURSUIT = Paper(
    "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit",
    "Goddard, Charles and Fernandes Neto, Fernando",
    2025,
    arxiv="2506.06607",
)

Rows = tuple[tuple[int, ...], ...]
Weights = tuple[tuple[float, ...], ...]


def _row_faults(rows: Any) -> Iterator[str]:
    empty = [i for i, row in enumerate(rows) if not row]
    if not rows:
        yield "rows: expected the old ids of every new token, got none"
    if empty:
        yield f"rows: the new tokens {values.short(empty)} have no old ids"
    if not all(values.fits(int, i) and i >= 0 for row in rows for i in row):
        yield "rows: expected old ids, whole numbers from 0 on"


def _weight_faults(weights: Any) -> Iterator[str]:
    if not all(values.fits(float, w) for row in weights for w in row):
        yield "weights: expected finite numbers"


@dataclasses.dataclass(frozen=True)
class Pieces(Finish):
    """Rows that are sums of old rows.

    `rows` and `weights` are those of every new token; with `first` the head takes the first row alone.
    """

    rows: Rows
    weights: Weights
    first: bool

    def applied(self, move, slot, old, new, *, key):
        """Sums in rows without a source; the others are those of their token."""
        del key
        if slot.kind != "param":
            return new
        longest = max(map(len, self.rows))
        ids = np.asarray([[*row, *[row[0]] * (longest - len(row))] for row in self.rows])
        weights = np.asarray([[*w, *[0.0] * (longest - len(w))] for w in self.weights])
        for dim in slot.positions(move.axis):
            if self.first and slot.dims[dim].role != "lookup":
                total = jnp.take(old, ids[:, 0], axis=dim)
            else:
                total = jnp.zeros(new.shape, new.dtype)
                for n in range(longest):
                    weight = across(weights[:, n].astype(old.dtype), new.ndim, dim)
                    total = total + weight * jnp.take(old, ids[:, n], axis=dim)
            new = jnp.where(across(np.asarray(move.source) == NONE, new.ndim, dim), total, new)
        return new


@values.register
class Transplant(Operator):
    """The rows of another vocabulary; see `transplant`."""

    rows: Annotated[Rows, values.Faults("the old ids of every new token", _row_faults)] = eqx.field(
        static=True
    )
    weights: Annotated[Weights, values.Faults("a weight for every id", _weight_faults)] = eqx.field(
        static=True, default=()
    )
    output: Literal["mean", "first"] = eqx.field(static=True, default="mean")
    axis: str = eqx.field(static=True, default="vocab")
    exactness: ClassVar[Exactness] = "approximate"
    card: ClassVar[Card] = Card(
        use="A model that should go on with another tokenizer: a new language, code, or the tokenizer of "
        "a model that it drafts for.",
        traps=(
            "A plan has one tokenizer: transplant at its start, with `Start(folder)` and the operator in "
            "its first stage.",
            "Tokenizers that cut numbers in other ways do not map onto each other well.",
        ),
        example="transplant(((0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), (9,), (10,), (1, 2)))",
        by={"weights": (_PURSUIT,)},
    )

    def __check_init__(self):
        values.check(self, GrowthError)
        if self.weights and [*map(len, self.weights)] != [*map(len, self.rows)]:
            raise GrowthError("weights: expected one for every id in rows")

    def maps(self, axes: Axes) -> list[AxisMap]:
        """A source for every shared token, and none for the others."""
        old = axes.size(self.axis)
        faults = []
        if "lookup" not in axes.roles(self.axis):
            faults.append(f"axis: no table is looked up along {self.axis!r}")
        if any(slot.arrays() for slot in axes.of_kind("gate") if slot.own_axis == self.axis):
            faults.append(f"{self.axis} is still ramping; ramp it to 1 and settle it first")
        beyond = sorted({i for row in self.rows for i in row if i >= old})
        if beyond:
            faults.append(f"rows: {values.short(beyond)} are not among the {old} old rows")
        raise_all(GrowthError, "this vocabulary does not fit the model:", faults)
        weights = self.weights or tuple((1 / len(row),) * len(row) for row in self.rows)
        pairs = zip(self.rows, weights, strict=True)
        source = [row[0] if len(row) == 1 and w[0] == 1 else NONE for row, w in pairs]
        finish = Pieces(self.rows, weights, self.output == "first")
        return [AxisMap(self.axis, source, init="zeros", finish=finish)]


def transplant(
    rows: Sequence[Sequence[int]],
    *,
    weights: Sequence[Sequence[float]] = (),
    output: Literal["mean", "first"] = "mean",
    axis: str = "vocab",
) -> Transplant:
    """Give a model the vocabulary of another tokenizer, larger or smaller.

    A new token with one old id and the weight 1 keeps that row, in the table, the head and its bias, with
    its optimizer state. Any other is a weighted sum of old rows, and starts its state anew. Old rows that
    no token has are dropped. The function is not kept: the same text has other tokens.

    **Arguments**

    - `rows`: the old ids of every new token, in the order of the new ids; `gj.growth.pieces` makes them
      from two tokenizers, `gj.growth.pursuit` from a model that has the new one.
    - `weights`: of the ids; by default their mean.
    - `output`: `"first"` takes the row of the first id in a head of its own, since the first piece is
      what the old model would have predicted.
    - `axis`: the name of the axis of words.

    Raises `GrowthError` for ids that the model does not have.

    **Example**

        rows = gj.growth.pieces(old.get_vocab(), new.get_vocab(), old.encode)
        op = gj.growth.transplant(rows, output="first")
    """
    return Transplant(values.tuples(rows), values.tuples(weights), output, axis)


def pieces(
    old: Mapping[str, int], new: Mapping[str, int], encode: Callable[[str], Sequence[int]]
) -> Rows:
    """The old ids of every new token: its own if it is shared, else those of its pieces.

    **Arguments**

    - `old`, `new`: token to id. New ids have no gaps.
    - `encode`: the old tokenizer: the ids of a text, without special tokens.

    Raises `GrowthError` that lists tokens without a piece, and for ids with gaps.

    **Example**

        pieces({"a": 0, "b": 1}, {"b": 0, "ab": 1}, lambda text: [ord(c) - 97 for c in text])
    """
    faults = [
        f"{name}: expected the id of every token, got {values.short(ids)}"
        for name, ids in (("old", old), ("new", new))
        if not (isinstance(ids, Mapping) and all(values.fits(int, i) for i in ids.values()))
    ]
    if not callable(encode):
        faults.append(f"encode: expected a function of a text, got {values.short(encode)}")
    raise_all(GrowthError, "these vocabularies cannot be read:", faults)
    tokens = sorted(new, key=lambda token: new[token])
    if [new[token] for token in tokens] != list(range(len(tokens))):
        raise GrowthError(f"new: expected the ids 0 to {len(tokens) - 1}, each once")
    rows = [(old[t],) if t in old else tuple(int(i) for i in encode(t)) for t in tokens]
    raise_all(
        GrowthError,
        "encode gives no piece of these new tokens:",
        [repr(token) for token, row in zip(tokens, rows, strict=True) if not row],
    )
    return tuple(rows)


def pursuit(donor: Any, shared: Mapping[int, int], *, pieces: int = 8) -> tuple[Rows, Weights]:
    """Rows and weights for `transplant` by orthogonal matching pursuit.

    Each new token is a sum of at most so many shared tokens, by least squares in the table of a model
    that has the new tokenizer; the same sum of old rows is its row.

    **Arguments**

    - `donor`: `[new, width]` the table of that model.
    - `shared`: new id to old id, of the tokens in both vocabularies.
    - `pieces`: the most shared tokens in a sum.

    Raises `GrowthError` without shared tokens.

    **Example**

        rows, weights = pursuit(donor_table, {0: 5, 1: 2}, pieces=2)
        op = gj.growth.transplant(rows, weights=weights)
    """
    faults = list(values.faults(Size, pieces, "pieces"))
    try:
        table = np.asarray(donor, float)
    except (TypeError, ValueError):
        table = np.zeros(0)
    if table.ndim != 2 or not np.isfinite(table).all():
        faults.append(f"donor: expected a table [new, width] of numbers, got {values.short(donor)}")
    elif not isinstance(shared, Mapping) or not shared:
        faults.append(
            "shared: expected some tokens that both vocabularies have, as {new id: old id}"
        )
    elif not all(
        values.fits(int, i) and values.fits(int, old) and 0 <= i < len(table) and old >= 0
        for i, old in shared.items()
    ):
        faults.append(
            f"shared: expected ids of the donor's {len(table)} rows, and old ids from 0 on"
        )
    raise_all(GrowthError, "tokens cannot be pursued so:", faults)
    anchors = np.asarray(sorted(shared))
    atoms = table[anchors]
    lengths = np.maximum(np.sqrt(np.sum(atoms**2, axis=1)), np.finfo(float).tiny)
    rows, weights = [], []
    for token in range(len(table)):
        if token in shared:
            rows.append((int(shared[token]),))
            weights.append((1.0,))
            continue
        chosen: list[int] = []
        residual, solution = table[token], np.zeros(0)
        for _ in range(min(pieces, len(atoms))):
            fit = np.abs(atoms @ residual) / lengths
            fit[chosen] = -1.0
            chosen.append(int(fit.argmax()))
            solution = np.linalg.lstsq(atoms[chosen].T, table[token], rcond=None)[0]
            residual = table[token] - solution @ atoms[chosen]
            if np.sum(residual**2) <= 1e-18 * np.sum(table[token] ** 2):
                break
        rows.append(tuple(int(shared[int(anchors[i])]) for i in chosen))
        weights.append(tuple(map(float, solution)))
    return tuple(rows), tuple(weights)
