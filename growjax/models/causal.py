"""How decoder-only models read: calls, examples, caches and logits, which GPT and `Decoder` share."""

import abc
import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from growjax.models.protocol import READ
from growjax.nn import (
    Block,
    Cache,
    Norm,
    Readout,
    Stacked,
    Words,
    causal,
    check_sequence,
    empty_cache,
)


class CausalModel(eqx.Module):
    """A decoder-only language model on one sequence; a subclass has the parts, and embeds the tokens."""

    embedding: eqx.AbstractVar[Words]
    blocks: eqx.AbstractVar[Stacked[Block]]
    norm: eqx.AbstractVar[Norm]
    # None: the table of the embedding
    head: eqx.AbstractVar[Float[Array, "embed vocab"] | None]
    dtype: eqx.AbstractVar[str | None]

    @abc.abstractmethod
    def _embed(
        self, tokens: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> tuple[Float[Array, "T embed"], tuple[Array, Array] | None]:
        """The residual stream, and the cosines and sines that turn heads (None: nothing does)."""

    @property
    def _places(self) -> int | None:
        """The number of positions that there are; None for any."""
        return None

    @property
    def _cap(self) -> float | None:
        """The cap of the logits; see `growjax.nn.Readout`."""
        return None

    def __call__(
        self,
        tokens: Int[Array, " T"],
        *,
        positions: Int[Array, " T"] | None = None,
        mask: Bool[Array, " T"] | Bool[Array, "T T"] | None = None,
        prefix: Bool[Array, " T"] | None = None,
        documents: Int[Array, " T"] | None = None,
    ) -> Float[Array, "T vocab"]:
        """Next-token logits; `positions` count from 0 by default.

        `mask` is True at real tokens, or `[T, T]` where one may see the other; tokens in the `prefix`
        are seen by all; of `documents` packed into one sequence, tokens see only their own number.
        Windows count places of the sequence, whatever its `positions`.

        Raises `AxisError` for more than one sequence, and for one longer than learned positions. Ids and
        positions beyond their tables are an error outside of `jit` and `vmap` alone.
        """
        return self._read(tokens, positions, mask, prefix, documents).logits()

    def predict(self, example: Mapping[str, Array]) -> Float[Array, "T vocab"]:
        """The logits on one example of an objective, whose keys say what there is to read."""
        return self(example["tokens"], **{name: example.get(key) for key, name in READ.items()})

    def readout(self, example: Mapping[str, Array]) -> Readout:
        """The same, with no logit computed yet."""
        return self._read(example["tokens"], *(example.get(key) for key in READ))

    def cache(self, size: int) -> Cache:
        """An empty cache for `extend`, of `size` places."""
        return empty_cache(self.blocks, size, self.dtype or self.embedding.table.dtype)

    def extend(
        self, tokens: Int[Array, " T"], cache: Cache, at: Int[Array, ""] | int
    ) -> tuple[Float[Array, "T vocab"], Cache]:
        """Logits of the tokens at the places from `at` on, and the cache with them in it.

        `cache` holds the places before `at`; any others in it are not seen, and are written over.
        """
        check_sequence(tokens, cache.keys.shape[2], at=at)
        check_sequence(tokens, self._places, at=at)
        x, turn = self._embed(tokens, at + jnp.arange(tokens.shape[0]))
        x, cache = self.blocks.extend(x, cache, None, at, turn=turn)
        return self._read_out(x).logits(), cache

    def _read(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"] | None,
        mask: Bool[Array, " T"] | Bool[Array, "T T"] | None,
        prefix: Bool[Array, " T"] | None,
        documents: Int[Array, " T"] | None,
    ) -> Readout:
        check_sequence(tokens, None if positions is not None else self._places)
        positions = jnp.arange(tokens.shape[0]) if positions is None else positions
        x, turn = self._embed(tokens, positions)
        x, auxiliary, exits = self.blocks.with_exits(
            x, mask=causal(mask, prefix, documents), turn=turn
        )
        readout = self._read_out(x, auxiliary)
        if exits is None:
            return readout
        weights = tuple(weight for _, weight in self.blocks.exits)
        return dataclasses.replace(readout, exits=jax.vmap(self.norm)(exits), weights=weights)

    def _read_out(
        self, x: Float[Array, "T embed"], auxiliary: Float[Array, ""] | None = None
    ) -> Readout:
        return Readout(
            self.norm(x),
            self.embedding.table if self.head is None else self.head,
            tied=self.head is None,
            auxiliary=auxiliary,
            cap=self._cap,
            gate=self.embedding.gate,
        )
