"""Attention masks as data: no `[T, S]` array is stored for a long sequence."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

from growjax.errors import AxisError


class Mask(eqx.Module):
    """Which of `S` keys each of `T` queries may see; every condition that is given must hold.

    Rows and columns are places of one sequence (or of two, in cross-attention), counted from 0.

    **Fields**

    - `causal`: keys that are not after the query.
    - `prefix`: keys that every query sees although they come after it (only with `causal`).
    - `window`: keys fewer than so many places away. An array is fine, so that a scan over layers can
      give each layer its own.
    - `keys`: keys that are real tokens.
    - `documents`: keys with the query's own number (documents packed into one sequence).
    - `pairs`: any other choice, pair by pair; of size `[T, S]`, so for short sequences.
    - `first`: the place of the first query, where the queries are a part of the sequence. The other
      fields are still those of the whole sequence.

    **Example**

        Mask(causal=True, window=1024, documents=segments)
    """

    causal: bool = eqx.field(static=True, default=False)
    prefix: Bool[Array, " S"] | None = None
    window: Int[Array, ""] | int | None = None
    keys: Bool[Array, " S"] | None = None
    documents: Int[Array, " S"] | None = None
    pairs: Bool[Array, "#T S"] | None = None
    first: Int[Array, ""] | None = None

    def tile(
        self, rows: Int[Array, " t"], columns: Int[Array, " s"], *, whole: bool = False
    ) -> Bool[Array, "#t #s"] | None:
        """The part of the mask with these rows and columns; None where everything is seen.

        Rows are counted from `first`. `whole` says that they are all rows and all columns, in order:
        nothing is gathered then.
        """
        rows = self.places(rows)

        def at(values: Array, places: Array) -> Array:
            if whole:
                return values.reshape(places.shape)
            return values.at[places].get(mode="clip")

        query, key = rows[:, None], columns[None, :]
        conditions = []
        if self.causal:
            behind = key <= query
            conditions.append(behind if self.prefix is None else behind | at(self.prefix, key))
        if self.window is not None:
            conditions.append(jnp.abs(query - key) < self.window)
        if self.keys is not None:
            conditions.append(at(self.keys, key))
        if self.documents is not None:
            conditions.append(at(self.documents, query) == at(self.documents, key))
        if self.pairs is not None and whole:
            conditions.append(self.pairs)
        elif self.pairs is not None:
            row = jnp.minimum(query, self.pairs.shape[0] - 1)  # of the query, or the one for all
            conditions.append(self.pairs.at[row, key].get(mode="clip"))
        if not conditions:
            return None
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = seen & condition
        return seen

    def places(self, rows: Int[Array, " t"]) -> Int[Array, " t"]:
        """The places of some queries in the sequence, which are counted from `first`."""
        return rows if self.first is None else rows + self.first

    def of(self, places: Int[Array, " s"]) -> "Mask":
        """The mask between some places of one sequence, in order; it must have no window."""
        if self.window is not None:
            raise AxisError("a window counts all tokens, and this layer reads some of them alone")

        def at(values: Array | None, *dims: int) -> Array | None:
            if values is None:
                return None
            for dim in dims:
                values = values if values.shape[dim] == 1 else jnp.take(values, places, axis=dim)
            return values

        return Mask(
            causal=self.causal,
            prefix=at(self.prefix, 0),
            keys=at(self.keys, 0),
            documents=at(self.documents, 0),
            pairs=at(self.pairs, 0, 1),
        )

    def misfits(self, queries: int, keys: int) -> list[str]:
        """The fields that do not fit so many queries and keys: tiles would read them at wrong places."""
        each, pairs = [(keys,)], [(queries, keys), (1, keys)]
        faults = []
        for name, value, shapes in (
            ("prefix", self.prefix, each),
            ("keys", self.keys, each),
            ("documents", self.documents, each),
            ("pairs", self.pairs, pairs),
        ):
            if value is not None and value.shape not in shapes:
                faults.append(f"{name}: expected {list(shapes[0])}, got {list(value.shape)}")
        if self.documents is not None and queries != keys:
            faults.append(
                f"documents: they number one sequence, and {queries} queries see {keys} keys"
            )
        return faults

    def reach(
        self, first: Int[ArrayLike, ""], count: int, keys: int
    ) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
        """The first key that any of `count` queries from `first` on can see, and the last, plus one.

        By position alone, so attention can skip the keys outside of this range.
        """
        low, high = 0, keys
        first = first if self.first is None else first + self.first
        if self.window is not None:
            low = jnp.maximum(first - self.window + 1, 0)
            high = jnp.minimum(first + count - 1 + self.window, keys)
        if self.causal and self.prefix is None:
            high = jnp.minimum(first + count, high)
        return low, high


ALL = Mask()
